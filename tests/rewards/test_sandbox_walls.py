"""The walls seen from the host: what the kernel says of a program while it runs.

Several walls stop the same attack; here each is checked by itself.
"""

from __future__ import annotations

import os
import platform
import subprocess
import threading
import time
from pathlib import Path

import pytest

from rewards.sandbox import cgroups, seccomp
from rewards.sandbox.executor import JailExecutor
from rewards.sandbox.jobs import Job
from rewards.sandbox.limits import Limits

LIMITS = Limits(
    cpu_s=3, wall_s=30, memory_bytes=200 << 20, file_bytes=8 << 20, processes=5, open_files=40
)
NAMESPACES = ("user", "mnt", "pid", "net", "ipc", "uts", "cgroup")


@pytest.fixture(scope="module")
def executor(namespaces):
    made = JailExecutor(largest=LIMITS)
    yield made
    made.close()


def children(pid: int) -> list[int]:
    return [
        int(child)
        for entry in Path(f"/proc/{pid}/task").glob("*/children")
        for child in entry.read_text().split()
    ]


@pytest.fixture(scope="module")
def program(executor):
    """Process id, on the host, of a program that sleeps in its jail."""
    (zygote,) = children(executor.pid)
    payload = {"mode": "script", "source": "import time\nprint(1, flush=True)\ntime.sleep(60)"}
    with Job(executor._socket, payload, b"some input", LIMITS) as job:
        os.read(job._pipes[1], 1)
        (pid,) = children(zygote)
        yield pid
    assert children(zygote) == []


@pytest.fixture(scope="module")
def status(program):
    lines = Path(f"/proc/{program}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines if ":\t" in line)


@pytest.mark.parametrize("kind", NAMESPACES)
def test_namespace_is_its_own(kind, program, executor):
    (zygote,) = children(executor.pid)
    seen = {os.readlink(f"/proc/{pid}/ns/{kind}") for pid in ("self", zygote, program)}
    assert len(seen) == 3  # the host's, the zygote's, the program's


@pytest.mark.parametrize("kind", ["CapInh", "CapPrm", "CapEff", "CapAmb"])
def test_no_capability(kind, status):
    assert int(status[kind], 16) == 0


def test_no_way_to_gain_one(status):
    assert status["NoNewPrivs"].strip() == "1"
    assert status["Seccomp"].strip() == "2"
    assert status["Seccomp_filters"].strip() == "1"


def test_is_nobody_on_the_host(status):
    for name in ("Uid", "Gid"):
        ids = {int(part) for part in status[name].split()}
        assert len(ids) == 1
        own = os.getuid() if name == "Uid" else os.getgid()
        assert ids != {0} if own == 0 else ids == {own}
    if os.getuid() == 0:
        assert status["Groups"].strip() == ""


def test_files_are_its_own(status):
    assert status["Umask"].strip() == "0077"


def test_is_init_of_its_namespace(status):
    assert status["NSpid"].split()[-1] == "1"


def test_limits(program):
    names = {
        "Max cpu time": 3, "Max address space": 200 << 20, "Max file size": 8 << 20,
        "Max open files": 40, "Max processes": 6, "Max core file size": 0,
        "Max locked memory": 0, "Max msgqueue size": 0,
    }
    text = Path(f"/proc/{program}/limits").read_text()
    for name, value in names.items():
        (line,) = [line for line in text.splitlines() if line.startswith(name)]
        assert line[len(name) :].split()[:2] == [str(value)] * 2, line


def test_descriptors(program):
    files = {
        int(name): os.readlink(f"/proc/{program}/fd/{name}")
        for name in os.listdir(f"/proc/{program}/fd")
    }
    assert sorted(files) == [0, 1, 2]
    assert "memfd" in files[0] and "pipe" in files[1] and "pipe" in files[2]


def test_what_it_is_given_cannot_be_written(executor):
    """The input's file is sealed: neither overwritten nor grown beside the limits of /tmp."""
    source = """
import os
for attempt in (lambda: os.pwrite(0, b"x", 0), lambda: os.pwrite(0, b"x", 1 << 20)):
    try:
        print(attempt())
    except OSError as error:
        print(error.errno == 1)
"""
    assert executor.script(source, b"some input", LIMITS).stdout == b"True\nTrue\n"


def test_a_message_too_large_to_be_one_is_not_waited_for(executor):
    source = "import os, time\ndef f():\n    os.write(3, b'\\0\\0\\0\\x70')\n    time.sleep(60)\n"
    started = time.monotonic()
    assert executor.call(source, "f", [], LIMITS).state == "runtime_error"
    assert time.monotonic() - started < LIMITS.wall_s / 2


def test_environment_is_empty(program):
    text = Path(f"/proc/{program}/environ").read_bytes()
    names = {entry.split(b"=")[0] for entry in text.split(b"\0") if entry}
    assert names == {b"HOME", b"LANG", b"PYTHONHASHSEED", b"PYTHONUTF8"}


def mounts(pid: int) -> dict[str, tuple[set[str], str]]:
    """Mount point -> options of the mount, and of its file system."""
    found = {}
    for line in Path(f"/proc/{pid}/mountinfo").read_text().splitlines():
        fields = line.split()
        found[fields[4]] = (set(fields[5].split(",")), fields[-1])
    return found


def test_mounts(program):
    seen = mounts(program)
    library = "/usr/lib/python"
    devices = {"/dev/null", "/dev/zero", "/dev/urandom"}
    assert set(seen) - {f"{library}/site-packages"} == {"/", "/tmp", library, *devices}
    for point, (options, _) in seen.items():
        assert "nosuid" in options, point
        assert ("ro" in options) == (point != "/tmp"), point
        assert "nodev" in options or point in devices, point
    assert "noexec" in seen["/tmp"][0]
    assert "size=8192k" in seen["/tmp"][1] and "nr_inodes=1024" in seen["/tmp"][1]


def test_interpreter_has_run_no_code_of_the_host(executor):
    """`site` would run what site-packages tells it to, before the walls stand."""
    source = "import sys\nprint(sys.flags.no_site, 'site' in sys.modules)"
    assert executor.script(source, b"", LIMITS).stdout == b"1 False\n"


def test_work_folder_is_private(program):
    assert Path(f"/proc/{program}/root/tmp").stat().st_mode & 0o777 == 0o700


def test_killed_first_when_memory_runs_out(program):
    assert Path(f"/proc/{program}/oom_score_adj").read_text().strip() == "1000"


def test_control_group(program, executor):
    if executor.cgroup is None:
        pytest.skip("no control group can be made here")
    assert executor.cgroup.folders
    for folder in executor.cgroup.folders:
        assert str(program) in (folder / "cgroup.procs").read_text().split()
    values = [
        int(path.read_text())
        for folder in executor.cgroup.folders
        for path in (folder / "memory.limit_in_bytes", folder / "memory.max")
        if path.exists()
    ]
    assert values and max(values) < 1 << 30
    counts = [folder / "pids.max" for folder in executor.cgroup.folders]
    assert all(int(path.read_text()) < 100 for path in counts if path.exists())


@pytest.mark.parametrize("version", [1, 2])
def test_control_group_of_either_version(version, tmp_path, monkeypatch):
    """On a copy of the kernel's tree, since few machines let every user make one."""
    own = {"": "ours"} if version == 2 else {"memory": "ours", "pids": "ours"}
    parents = [tmp_path / kind / "ours" for kind in own]
    for parent in parents:
        parent.mkdir(parents=True)
        (parent / "cgroup.subtree_control").write_text("cpu memory pids")
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "_own_groups", lambda: own)
    made = cgroups.make_cgroup(memory_bytes=1000, processes=5)
    assert made is not None and [folder.parent for folder in made.folders] == parents
    made.add(77)
    found = {path.name: path.read_text() for folder in made.folders for path in folder.iterdir()}
    limits = {"memory.max": "1000", "memory.swap.max": "0"}
    if version == 1:
        limits = {"memory.limit_in_bytes": "1000"}
    assert found == limits | {"pids.max": "5", "cgroup.procs": "77"}


def test_control_groups_of_the_dead_are_removed(tmp_path):
    ended = subprocess.Popen(["true"])
    ended.wait()
    names = [f"h1r-sandbox-{pid}-ab" for pid in (ended.pid, os.getpid())] + ["another"]
    for name in names:
        (tmp_path / name).mkdir()
    cgroups._sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == set(names[1:])


def test_zygote_has_let_go_of_the_host(executor):
    (zygote,) = children(executor.pid)
    status = Path(f"/proc/{zygote}/status").read_text()
    for kind in ("CapInh", "CapPrm", "CapEff", "CapAmb"):
        assert f"{kind}:\t0000000000000000" in status
    assert "NSpid:" in status and "/" in mounts(zygote)
    assert set(os.listdir(f"/proc/{zygote}/root")) == {"usr", "dev", "tmp"}


# x86_64, aarch64. With no arguments an allowed call fails otherwise, or not at all.
FORBIDDEN = {
    "ptrace": (101, 117), "process_vm_readv": (310, 270), "process_vm_writev": (311, 271),
    "mount": (165, 40), "umount2": (166, 39), "pivot_root": (155, 41), "chroot": (161, 51),
    "move_mount": (429, 429), "fsopen": (430, 430), "open_tree": (428, 428),
    "mount_setattr": (442, 442), "unshare": (272, 97), "setns": (308, 268),
    "add_key": (248, 217), "request_key": (249, 218), "keyctl": (250, 219),
    "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "bpf": (321, 280),
    "userfaultfd": (323, 282), "perf_event_open": (298, 241), "memfd_create": (319, 279),
    "execve": (59, 221), "execveat": (322, 281), "socket": (41, 198), "connect": (42, 203),
    "bind": (49, 200), "accept4": (288, 242), "shmget": (29, 194), "msgget": (68, 186),
    "semget": (64, 190), "mq_open": (240, 180), "init_module": (175, 105),
    "kexec_load": (246, 104), "open_by_handle_at": (304, 265), "name_to_handle_at": (303, 264),
    "setuid": (105, 146), "setgid": (106, 144), "setgroups": (116, 159), "capset": (126, 91),
    "seccomp": (317, 277), "sethostname": (170, 161), "syslog": (103, 116), "reboot": (169, 142),
    "settimeofday": (164, 170), "clock_settime": (227, 112), "swapon": (167, 224),
    "personality": (135, 92), "pidfd_getfd": (438, 438), "process_madvise": (440, 440),
    "kcmp": (312, 272), "quotactl": (179, 60), "acct": (163, 89), "fanotify_init": (300, 262),
    "landlock_create_ruleset": (444, 444), "setpriority": (141, 140), "mknodat": (259, 33),
    "fchownat": (260, 54), "pidfd_open": (434, 434), "splice": (275, 76),
    "vmsplice": (278, 75), "tee": (276, 77), "migrate_pages": (256, 238),
    "unknown_to_come": (9999, 9999),
}


def test_forbidden_calls(executor):
    """Each says EPERM, whatever else would have stopped it."""
    column = {"x86_64": 0, "aarch64": 1}[platform.machine()]
    numbers = {name: pair[column] for name, pair in FORBIDDEN.items()}
    source = f"""
import ctypes
libc = ctypes.CDLL(None, use_errno=True)
for name, number in {numbers!r}.items():
    if libc.syscall(ctypes.c_long(number), 0, 0, 0, 0, 0, 0) != -1 or ctypes.get_errno() != 1:
        print(name, ctypes.get_errno())
print("all tried")  # one that was let through may end the program
"""
    assert executor.script(source, b"", LIMITS).stdout == b"all tried\n"


def test_forbidden_calls_are_not_listed():
    """On either machine, and those too to which the kernel itself would say EPERM here."""
    for column in (0, 1):
        selected = {numbers[column] for numbers, *_ in seccomp.SELECTED.values()}
        listed = selected.union(seccomp.allowed_numbers(column))
        assert not [name for name, numbers in FORBIDDEN.items() if numbers[column] in listed]


def test_arguments_that_are_let_through(executor):
    """prctl, prlimit64, ioctl and clone: a few arguments pass, the others do not."""
    source = """
import ctypes, fcntl, os, platform, resource, termios
libc = ctypes.CDLL(None, use_errno=True)
x86 = platform.machine() == "x86_64"
def refused(*arguments):
    return libc.syscall(*map(ctypes.c_long, arguments)) == -1 and ctypes.get_errno() == 1
PRCTL, PRLIMIT, IOCTL, CLONE = (157, 302, 16, 56) if x86 else (167, 261, 29, 220)
print(refused(PRCTL, 4, 1), refused(PRCTL, 22, 0), refused(PRCTL, 38, 1, 0, 0))
print(refused(PRLIMIT, 1, 0, 0, 0), refused(IOCTL, 0, 0x5412, 0))
print(*(refused(CLONE, flag | 17, 0, 0, 0, 0) for flag in (0x10000000, 0x20000, 0x40000000)))
name = ctypes.create_string_buffer(16)
print(libc.prctl(16, name, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CPU), os.isatty(0))
print(libc.syscall(435, 0, 0), ctypes.get_errno())
"""
    lines = executor.script(source, b"", LIMITS).stdout.decode().splitlines()
    assert lines[:3] == ["True True True", "True True", "True True True"]
    assert lines[3] == "0 (3, 3) False"
    assert lines[4] == "-1 38"  # ENOSYS: libc then uses clone


def test_stop_ends_every_process(executor):
    """Leaving the job early, with children that ignore all signals."""
    (zygote,) = children(executor.pid)
    before = children(zygote)
    source = (
        "import os, signal, time\n"
        "for _ in range(2):\n    os.fork()\n"  # four in all: a refused fork would end the first one
        "[signal.signal(n, signal.SIG_IGN) for n in range(1, 65) if n not in (9, 19, 32, 33)]\n"
        "os.setsid() if os.getpid() > 1 else None\nprint(1, flush=True)\ntime.sleep(100)"
    )
    with Job(executor._socket, {"mode": "script", "source": source}, b"", LIMITS) as job:
        os.read(job._pipes[1], 1)
        assert len(children(zygote)) == len(before) + 1
    assert children(zygote) == before


def test_closing_ends_zygote_and_programs(namespaces):
    executor = JailExecutor(largest=LIMITS)
    (zygote,) = children(executor.pid)
    cgroup = executor.cgroup
    folders = list(cgroup.folders) if cgroup else []
    job = Job(executor._socket, {"mode": "script", "source": "while True: pass"}, b"", LIMITS)
    while not children(zygote):
        time.sleep(0.01)
    (program,) = children(zygote)
    executor.close()
    deadline = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in (zygote, program)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert not any(folder.exists() for folder in folders)
    job._release()


def test_all_goes_with_the_process_that_waits_outside(namespaces):
    """It is what the worker sees of the zygote; killed, it leaves neither zygote nor programs."""
    executor = JailExecutor(largest=LIMITS)
    try:
        first = executor.pid
        (zygote,) = children(first)
        os.kill(first, 9)
        deadline = time.monotonic() + 30
        while Path(f"/proc/{zygote}").exists():
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert executor.script("print(1)", b"", LIMITS).stdout == b"1\n"
        assert executor.pid != first
    finally:
        executor.close()


def test_lost_zygote_is_replaced(namespaces):
    executor = JailExecutor(largest=LIMITS)
    try:
        first = executor.pid
        os.kill(children(first)[0], 9)
        assert executor.script("print(1)", b"", LIMITS).stdout == b"1\n"
        assert executor.pid != first
        timer = threading.Timer(0.3, lambda: os.kill(children(executor.pid)[0], 9))
        timer.start()
        slow = "import time\ntime.sleep(1)\nprint(2)"
        assert executor.script(slow, b"", LIMITS).stdout == b"2\n"  # run once more
    finally:
        executor.close()
