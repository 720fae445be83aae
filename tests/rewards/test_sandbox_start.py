"""Starting and refusing a sandbox, as root and as an ordinary user; ending with its owner."""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rewards.sandbox import seccomp

ROOT = str(Path(__file__).parents[2])


def test_zygote_ends_with_its_owner(namespaces):
    """Killed without a chance to tidy up, the owner leaves no zygote behind."""
    source = (
        "from rewards.sandbox.executor import JailExecutor\nimport os\n"
        "e = JailExecutor()\nprint(e.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", source], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert _gone(int(ran.stdout))


def _gone(pid: int) -> bool:
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.05)
    return False


USER_SOURCE = """
import os
from h1r_rl.errors import ConfigError
from rewards.sandbox.executor import JailExecutor
from rewards.sandbox.limits import Limits
assert os.geteuid() != 0
try:
    executor = JailExecutor()
except ConfigError as error:
    print("refused", error)
    raise SystemExit
limits = Limits(wall_s=5)
print(executor.script("print(6 * 7)", b"", limits).stdout.decode().strip())
print(executor.call("def f(x): return [x]", "f", [3], limits).value)
fork = "import os\\ntry:\\n    while True: os.fork() or os._exit(0)\\nexcept OSError: pass\\n"
print(executor.script(fork, b"", limits).state)
seen = "import os\\nprint(os.path.exists('/root'), os.listdir('/tmp'), os.getpid())"
print(executor.script(seen, b"", limits).stdout.decode().strip())
executor.close()
"""


def test_an_ordinary_user_gets_the_same_walls(namespaces, tmp_path):
    """Runs as nobody when we are root; everything else tests the user that we are."""
    if os.geteuid() != 0:
        pytest.skip("the other tests ran as an ordinary user")
    if shutil.which("setpriv") is None:
        pytest.skip("needs util-linux")
    # The interpreter may lie where only root may walk: that right alone is kept.
    ran = subprocess.run(
        ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups",
         "--inh-caps=-all,+dac_read_search", "--ambient-caps=+dac_read_search",
         sys.executable, "-c", USER_SOURCE],
        cwd=ROOT, timeout=60, capture_output=True, text=True,
        env={"PATH": os.environ["PATH"], "HOME": str(tmp_path)},
    )
    if ran.stdout.startswith("refused"):
        pytest.skip("this kernel gives namespaces to root only")
    assert ran.returncode == 0, ran.stderr
    lines = ran.stdout.splitlines()
    assert lines[:2] == ["42", "[3]"]
    assert lines[2] in ("finished", "timeout")
    assert lines[3] == "False [] 1"


GROUPS_SOURCE = """
import os
from pathlib import Path
from rewards.sandbox.executor import JailExecutor
os.setgroups([4, 4242])
executor = JailExecutor()
(zygote,) = Path(f"/proc/{executor.pid}/task/{executor.pid}/children").read_text().split()
(line,) = [x for x in Path(f"/proc/{zygote}/status").read_text().splitlines() if "Groups" in x]
print(line.split()[1:])
executor.close()
"""


def test_groups_of_root_stay_outside(namespaces):
    if os.geteuid() != 0:
        pytest.skip("an ordinary user may not leave a group")
    ran = subprocess.run(
        [sys.executable, "-c", GROUPS_SOURCE], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert ran.stdout.strip() == "[]", ran.stderr


SHARED_SOURCE = """
from pathlib import Path
from rewards.sandbox.executor import JailExecutor
executor = JailExecutor()
(zygote,) = Path(f"/proc/{executor.pid}/task/{executor.pid}/children").read_text().split()
tags = Path("/proc/self/mountinfo").read_text(), Path(f"/proc/{zygote}/mountinfo").read_text()
print(*("shared:" in text or "master:" in text for text in tags))
executor.close()
"""


def test_nothing_that_the_host_mounts_later_comes_through(namespaces):
    """Where the host's mounts are shared, as systemd has them, the zygote's follow none of them."""
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and util-linux")
    shell = 'mount --make-rshared / || exit 77; exec "$0" -c "$1"'
    ran = subprocess.run(
        ["unshare", "-m", "sh", "-c", shell, sys.executable, SHARED_SOURCE],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )
    if ran.returncode == 77:
        pytest.skip(f"mounts cannot be shared here: {ran.stderr.strip()[-200:]}")
    assert ran.stdout.split() == ["True", "False"], ran.stderr


REFUSED_SOURCE = """
from h1r_rl.errors import ConfigError
from rewards.sandbox.executor import JailExecutor
try:
    JailExecutor()
except ConfigError as error:
    print(error)
"""


def test_refusal_says_what_to_enable():
    """Under a limit of no further user namespaces there is no jail, and no weaker one."""
    if shutil.which("unshare") is None:
        pytest.skip("needs util-linux")
    shell = 'echo 0 > /proc/sys/user/max_user_namespaces || exit 77; exec "$0" -c "$1"'
    ran = subprocess.run(
        ["unshare", "-Ur", "sh", "-c", shell, sys.executable, REFUSED_SOURCE],
        cwd=ROOT, capture_output=True, text=True, timeout=60,
    )
    if ran.returncode:
        pytest.skip(f"cannot set the limit here: {ran.stderr.strip()[-200:]}")
    for word in ("reward.sandbox", "max_user_namespaces", "Kubernetes", "none-i-trust-this-code"):
        assert word in ran.stdout


def run_filter(program: bytes, number: int, argument: list[int], audit: int) -> int:
    """What the kernel's interpreter of BPF returns; leaving the program is an IndexError."""
    data = struct.pack("<iIQ6Q", number, audit, 0, *argument)
    steps = [struct.unpack_from("<HBBI", program, at) for at in range(0, len(program), 8)]
    at = value = 0
    while True:
        code, if_true, if_false, constant = steps[at]
        at += 1
        if code == 0x06:
            return constant
        if code == 0x20:
            (value,) = struct.unpack_from("<I", data, constant)
        elif code == 0x05:
            at += constant
        else:
            met = {0x15: value == constant, 0x35: value >= constant, 0x45: value & constant}[code]
            at += if_true if met else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_lets_the_listed_calls_through_and_no_other(machine):
    column, audit = seccomp._ARCHITECTURES[machine]
    program = seccomp.build_filter(machine)
    assert len(program) // 8 <= 4096
    allowed = seccomp.allowed_numbers(column)
    assert len(set(allowed)) == len(allowed)
    selected = {numbers[column]: rest for numbers, *rest in seccomp.SELECTED.values()}
    clone, clone3 = seccomp.CLONE[column], seccomp.CLONE3[column]
    assert len({*allowed, *selected, clone, clone3}) == len(allowed) + len(selected) + 2
    none = [0] * 6
    for number in [*range(1200), 0x40000000, 0x40000000 + allowed[0], 0x7FFFFFFF]:
        action = run_filter(program, number, none, audit)
        if number in allowed or number == clone:
            assert action == 0x7FFF0000, number
        elif number == clone3:
            assert action == 0x00050000 | errno.ENOSYS
        elif number not in selected:
            assert action == 0x00050000 | errno.EPERM, number
        assert run_filter(program, number, none, audit ^ 1) == 0x80000000
    for number, (index, values) in selected.items():
        for value in [*range(300), *range(0x5400, 0x5500), 1 << 31]:
            arguments = [value if k == index else 7 for k in range(6)]
            right = 0x7FFF0000 if value in values else 0x00050000 | errno.EPERM
            assert run_filter(program, number, arguments, audit) == right
    for bit in range(32):
        action = run_filter(program, clone, [1 << bit, *none[1:]], audit)
        assert (action == 0x7FFF0000) == (not seccomp.NEW_NAMESPACES >> bit & 1)


def test_a_filter_longer_than_a_jump_is_searched_right():
    """Ranges beyond the reach of a conditional jump."""
    ranges = [(n, [seccomp._step(0x06, n)]) for n in range(1000)]
    program = b"".join([seccomp._step(0x20, 0), *seccomp._search(ranges)])
    assert all(run_filter(program, n, [0] * 6, 0) == n for n in range(1000))
