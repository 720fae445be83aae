"""From a fresh copy of the zygote to a program behind its walls.

Invariant: before the program's first line runs, the process is the init process of namespaces of
its own, so the kernel ends every process it ever made, daemons included, when it ends. It has no
capability and no way to gain one, the seccomp filter, its limits, an empty file system of its own
at /tmp, and no file descriptor beside its standard streams and its channel. What fails before that
is reported as `failed`, which is never a wrong answer.
"""

from __future__ import annotations

import gc
import os
import resource
import socket
from dataclasses import dataclass
from typing import Any, NoReturn

from rewards.sandbox import linux, program, seccomp
from rewards.sandbox.codec import decode, encode
from rewards.sandbox.limits import Limits

INSIDE_ID = 1000  # the zygote's and the programs' only user and group, as they see them
MAX_FILES = 1024  # inodes of its /tmp
HIGHEST_FD = 65_536


@dataclass(frozen=True, slots=True)
class Request:
    """A program as the zygote gets it: limits, and files it never reads itself."""

    limits: Limits
    control: int  # a packet socket: reports out; shut by the outside, it means "stop"
    payload: int  # a sealed memory file: `program.run`'s argument
    stdin: int
    stdout: int
    stderr: int
    channel: int | None


@dataclass(frozen=True, slots=True)
class Walls:
    """What the zygote has prepared for all programs."""

    proc: int  # the host's /proc, for the id maps; closed before the program runs
    filter: bytes  # the seccomp program


def enter(request: Request, walls: Walls | None, folder: str) -> NoReturn:
    """Become the program. Without walls: limits alone, for code that the user says to trust."""
    try:
        payload = decode(os.pread(request.payload, os.fstat(request.payload).st_size, 0))
        if walls is not None:
            _map_ids(walls.proc)
            _mount_work_folder(request.limits)
        _stage(request, folder)
        _limit(request.limits, walls is not None)
        if walls is not None:
            linux.drop_capabilities()
            linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
            seccomp.install(walls.filter)
    except BaseException as error:
        report(request.control, {"state": "failed", "error": repr(error)})
        os._exit(1)
    os.closerange(program.CHANNEL + (request.channel is not None), HIGHEST_FD)
    gc.enable()
    program.run(payload)


def report(control: int, message: dict[str, Any]) -> None:
    with socket.socket(fileno=os.dup(control)) as channel:
        try:
            channel.send(encode(message))
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


def _stage(request: Request, folder: str) -> None:
    os.setsid()
    os.chdir(folder)
    os.umask(0o077)
    os.dup2(request.stdin, 0)
    os.dup2(request.stdout, 1)
    os.dup2(request.stderr, 2)
    if request.channel is not None:
        os.dup2(request.channel, program.CHANNEL)


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
    }
    if jailed:  # counted in the program's own user namespace
        values[resource.RLIMIT_NPROC] = (limits.processes + 1,) * 2
    for limit, value in values.items():
        resource.setrlimit(limit, value)
