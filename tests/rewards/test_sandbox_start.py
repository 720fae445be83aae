"""Starting and refusing a sandbox, as root and as an ordinary user; ending with its owner."""

from __future__ import annotations

import os
import shutil
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


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_filter_jumps_stay_within_it(machine):
    """Every path of the BPF program ends in a return; no jump leaves it."""
    program = seccomp.build_filter(machine)
    size = len(program) // 8
    assert size <= 4096
    for at in range(size):
        code, if_true, if_false = program[8 * at], program[8 * at + 2], program[8 * at + 3]
        if code in (0x15, 0x45):
            assert at + 1 + max(if_true, if_false) < size
    assert program[-8] == 0x06
    numbers = seccomp.allowed_numbers(seccomp._ARCHITECTURES[machine][0])
    assert len(set(numbers)) == len(numbers)
