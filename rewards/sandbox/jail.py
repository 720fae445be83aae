"""From a fresh copy of the zygote to a program behind its walls.

Invariant: before the program's first line runs, the process is the init process of namespaces of
its own, so the kernel ends every process it ever made, daemons included, when it ends. It has no
capability and no way to gain one, the seccomp filter, its limits, an empty file system of its own
at /tmp, and no file descriptor beside its standard streams and its channel. What fails before that
is reported as `failed`, which is never a wrong answer.
"""

from __future__ import annotations

import gc
import marshal
import os
import resource
import struct
from dataclasses import dataclass
from typing import Any, NoReturn

from rewards.sandbox import linux, program, seccomp
from rewards.sandbox.limits import Limits

INSIDE_ID = 1000  # the zygote's and the programs' only user and group, as they see them
MAX_FILES = 1024  # inodes of its /tmp
HIGHEST_FD = 65_536
STACK_BYTES = 64 << 20
REPORT = struct.Struct("<?id")  # ended, exit code, CPU seconds; behind it, if not ended, why not

# Where a request's files stand, in the order of `jobs.Job`: the packet socket for reports, which
# means "stop" once the outside shuts it; a sealed memory file, `program.run`'s argument; the
# streams; and, for all modes but "script", the channel.
CONTROL, PAYLOAD, STDIN, STDOUT, STDERR, CHANNEL = range(6)


@dataclass(frozen=True, slots=True)
class Walls:
    """What the zygote has prepared for all programs."""

    proc: int  # the host's /proc, for the id maps; closed before the program runs
    filter: Any  # the seccomp program, as `seccomp.install` takes it


def enter(limits: bytes, files: tuple[int, ...], walls: Walls | None, folder: str) -> NoReturn:
    """Become the program. Without walls: limits alone, for code that the user says to trust."""
    try:
        allowed = Limits(*marshal.loads(limits))
        payload = marshal.loads(os.pread(files[PAYLOAD], os.lseek(files[PAYLOAD], 0, 2), 0))
        if walls is not None:
            _map_ids(walls.proc)
            _mount_work_folder(allowed)
        _stage(files, folder)
        _limit(allowed, walls is not None)
        if walls is not None:
            linux.drop_capabilities()
            linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
            seccomp.install(walls.filter)
    except BaseException as error:
        report_failure(files[CONTROL], error)
        os._exit(1)
    os.closerange(program.CHANNEL + (len(files) > CHANNEL), HIGHEST_FD)
    gc.enable()
    program.run(payload)


def report_failure(control: int, error: BaseException) -> None:
    report(control, REPORT.pack(False, 0, 0.0) + repr(error).encode()[:1000])


def report(control: int, message: bytes) -> None:
    try:
        os.write(control, message)
    except OSError:  # nobody waits for it any more
        pass


def _map_ids(proc: int) -> None:
    """This namespace's only user and group; `setgroups` is closed for good."""
    _write_proc(proc, "setgroups", "deny")
    _write_proc(proc, "gid_map", f"{INSIDE_ID} {INSIDE_ID} 1")
    _write_proc(proc, "uid_map", f"{INSIDE_ID} {INSIDE_ID} 1")
    # Should memory run out, the kernel takes this process and its children first.
    _write_proc(proc, "oom_score_adj", "1000")


def _write_proc(proc: int, name: str, text: str) -> None:
    file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
    try:
        os.write(file, text.encode())
    finally:
        os.close(file)


def _mount_work_folder(limits: Limits) -> None:
    linux.mount(
        "tmpfs", "/tmp", "tmpfs", linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC,
        f"size={limits.file_bytes},nr_inodes={MAX_FILES},mode=0700",
    )


def _stage(files: tuple[int, ...], folder: str) -> None:
    os.setsid()
    os.chdir(folder)
    os.umask(0o077)
    os.dup2(files[STDIN], 0)
    os.dup2(files[STDOUT], 1)
    os.dup2(files[STDERR], 2)
    if len(files) > CHANNEL:
        os.dup2(files[CHANNEL], program.CHANNEL)


def _stack_bytes() -> int:
    """For deep recursion through C (`functools.cache`); the address space bounds it as well."""
    _, hard = resource.getrlimit(resource.RLIMIT_STACK)
    return STACK_BYTES if hard == resource.RLIM_INFINITY else min(STACK_BYTES, hard)


def _limit(limits: Limits, jailed: bool) -> None:
    cpu_s = max(1, int(-(-limits.cpu_s // 1)))
    values = {
        # Init processes do not hear SIGXCPU by default, so the hard limit's SIGKILL is the one.
        resource.RLIMIT_CPU: (cpu_s, cpu_s),
        resource.RLIMIT_AS: (limits.memory_bytes,) * 2,
        resource.RLIMIT_FSIZE: (limits.file_bytes,) * 2,
        resource.RLIMIT_NOFILE: (limits.open_files,) * 2,
        resource.RLIMIT_CORE: (0, 0),
        resource.RLIMIT_MEMLOCK: (0, 0),
        resource.RLIMIT_MSGQUEUE: (0, 0),
        resource.RLIMIT_STACK: (_stack_bytes(),) * 2,
    }
    if jailed:  # counted in the program's own user namespace
        values[resource.RLIMIT_NPROC] = (limits.processes + 1,) * 2
    for limit, value in values.items():
        resource.setrlimit(limit, value)
