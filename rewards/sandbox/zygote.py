"""The process that all programs are forked from: an interpreter behind walls of its own.

Invariant: it reads no program, no input and no answer (they pass through it as file descriptors),
so its memory, which every program inherits as a copy, holds nothing worth finding. Its root is a
read-only tmpfs with the standard library and three devices; it has left the host's namespaces and
its capabilities. Each program gets fresh namespaces beneath these, so nothing that one program can
write is seen by the next. It ends when its socket closes, and every program with it.

Started by `rewards.sandbox.start`, which maps its ids: the sequence is `left` -> `mapped` ->
`ready`, or `refused` with the reason.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import select
import signal
import socket
import struct
import sys
from typing import Any, NamedTuple, NoReturn

from rewards.sandbox import linux, seccomp
from rewards.sandbox.codec import decode, encode
from rewards.sandbox.jail import CONTROL, INSIDE_ID, REPORT, Walls, enter, report, report_failure

NAMESPACES = (
    linux.CLONE_NEWUSER | linux.CLONE_NEWNS | linux.CLONE_NEWPID | linux.CLONE_NEWNET
    | linux.CLONE_NEWIPC | linux.CLONE_NEWUTS | linux.CLONE_NEWCGROUP
)
SOCKET = 3  # requests arrive here
MAX_FILES = 6  # of a request
LIBRARY = "/usr/lib/python"  # where programs find the standard library
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")
SEALED = linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID

# Imported once for all programs: what solutions use most. Each further one costs all programs: the
# kernel copies its mappings, and modules with something to do after a fork do it in each.
PRELOADED = (
    "bisect", "collections", "copy", "functools", "heapq", "io", "itertools", "math", "operator",
    "re", "string", "traceback", "typing",
)

NEED_HOST_LIBRARIES = ("_bz2", "_lzma", "zlib")  # shared ones, out of reach behind the walls


class Program(NamedTuple):
    """One that runs."""

    pid: int
    process: int  # process descriptor
    control: int
    folder: str | None  # to be removed, where it has no file system of its own


def main(jailed: bool) -> NoReturn:
    channel = socket.socket(fileno=SOCKET)
    try:
        walls = _leave_host(channel) if jailed else None
        for name in PRELOADED:
            importlib.import_module(name)
    except OSError as error:
        channel.send(encode({"state": "refused", "error": str(error), "errno": error.errno or 0}))
        os._exit(1)
    gc.disable()
    gc.collect()
    gc.freeze()  # forked programs share these pages for as long as nobody writes to them
    channel.send(encode({"state": "ready"}))
    _serve(channel, walls)


def _serve(channel: socket.socket, walls: Walls | None) -> NoReturn:
    """Start programs as they are asked for; end them when they end, or when told to."""
    poll = select.poll()
    poll.register(channel, select.POLLIN)
    running: dict[int, Program] = {}  # by process descriptor and by control socket
    while True:
        for file, _ in poll.poll():
            if file == SOCKET:
                message, files = _receive(channel)
                started = _start(message, files, walls)
                for file in files[1:]:
                    os.close(file)
                if started is None:
                    os.close(files[CONTROL])
                    continue
                for file in (started.process, started.control):
                    running[file] = started
                    poll.register(file, select.POLLIN)
            elif file in running:
                ended = running[file]
                if file == ended.control:
                    signal.pidfd_send_signal(ended.process, signal.SIGKILL)
                _end(ended)
                for file in (ended.process, ended.control):
                    del running[file]
                    poll.unregister(file)
                    os.close(file)


def _receive(channel: socket.socket) -> tuple[bytes, tuple[int, ...]]:
    """A request: its limits, unread, and its files. The end of the socket is our own."""
    message, ancillary, _, _ = channel.recvmsg(1024, socket.CMSG_SPACE(4 * MAX_FILES))
    if not message:
        os._exit(0)
    data = ancillary[0][2]
    return message, struct.unpack(f"{len(data) // 4}i", data)


def _start(limits: bytes, files: tuple[int, ...], walls: Walls | None) -> Program | None:
    folder = "/tmp" if walls is not None else _make_folder()
    try:
        child = os.fork() if walls is None else linux.clone(NAMESPACES)
    except OSError as error:
        report_failure(files[CONTROL], error)
        return None
    if child == 0:
        enter(limits, files, walls, folder)
    return Program(child, os.pidfd_open(child), files[CONTROL], None if walls else folder)


def _end(ended: Program) -> None:
    """When `wait4` returns, every process of the program's pid namespace is gone."""
    _, status, usage = os.wait4(ended.pid, 0)
    if ended.folder is not None:
        try:
            os.killpg(ended.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        _remove_folder(ended.folder)
    cpu_s = usage.ru_utime + usage.ru_stime
    report(ended.control, REPORT.pack(True, os.waitstatus_to_exitcode(status), cpu_s))


def _make_folder() -> str:
    import tempfile  # jails need neither

    return tempfile.mkdtemp(prefix="h1r-code-")


def _remove_folder(folder: str) -> None:
    import shutil

    shutil.rmtree(folder, ignore_errors=True)


def _leave_host(channel: socket.socket) -> Walls:
    """Into namespaces of our own, as the init process there, behind our own root."""
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    filter = seccomp.prepare(seccomp.build_filter(linux.machine()))
    library = os.path.dirname(os.__file__)
    for name in NEED_HOST_LIBRARIES:
        with contextlib.suppress(ImportError):  # an interpreter built without it
            importlib.import_module(name)
    os.chdir(library)  # while we may still walk there, and into the new mount namespace with it
    linux.unshare(NAMESPACES)
    channel.send(encode({"state": "left"}))
    reply: dict[str, Any] = decode(channel.recv(1024))
    if reply["state"] != "mapped":
        os._exit(1)
    source = os.open(".", os.O_PATH | os.O_DIRECTORY)
    _become_mapped_user()
    _build_root(source)
    os.close(source)
    _forget_host_paths(library)
    _become_init()
    linux.drop_capabilities()
    # Should the process that waits outside be killed, all in here goes with it.
    linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    return Walls(proc, filter)


def _become_mapped_user() -> None:
    try:
        os.setgroups([])
    except PermissionError:  # an ordinary user may not: the groups stay, the walls hold without
        pass
    os.setresgid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    os.setresuid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
    linux.prctl(linux.PR_SET_DUMPABLE, 1)  # or /proc/self/uid_map would belong to the real root


def _build_root(library: int) -> None:
    """A read-only tmpfs: the standard library, three devices, an empty /tmp; then live in it."""
    root = "/proc"  # a folder that is always there, hides no source, and is not needed any more
    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)
    linux.mount("tmpfs", root, "tmpfs", linux.MS_NOSUID | linux.MS_NODEV, "size=1m,mode=0755")
    for folder in ("/dev", "/tmp", LIBRARY):
        os.makedirs(root + folder)
    os.symlink("/tmp", root + "/dev/shm")
    for device in DEVICES:
        os.close(os.open(root + device, os.O_CREAT | os.O_WRONLY, 0o600))
        linux.mount(device, root + device, None, linux.MS_BIND)
        linux.seal_mount(root + device, SEALED)
    os.fchdir(library)
    linux.mount(".", root + LIBRARY, None, linux.MS_BIND | linux.MS_REC)
    if os.path.isdir(root + LIBRARY + "/site-packages"):
        linux.mount("tmpfs", root + LIBRARY + "/site-packages", "tmpfs", linux.MS_RDONLY, "size=4k")
    linux.seal_mount(root + LIBRARY, SEALED | linux.MOUNT_ATTR_NODEV, below=True)
    linux.seal_mount(root, SEALED | linux.MOUNT_ATTR_NODEV)
    linux.enter_root(root)
    linux.set_hostname("jail")


def _forget_host_paths(library: str) -> None:
    """Imports find the library at its new place; names of the host's folders go."""
    for module in list(sys.modules.values()):
        paths = getattr(module, "__path__", None)
        if isinstance(paths, list):
            paths[:] = [path.replace(library, LIBRARY, 1) for path in paths]
    sys.path[:] = [LIBRARY, LIBRARY + "/lib-dynload"]
    sys.path_importer_cache.clear()
    sys.executable = sys._base_executable = ""
    sys.prefix = sys.base_prefix = sys.exec_prefix = sys.base_exec_prefix = "/usr"
    sys.argv, sys.orig_argv = [""], []
    ctypes._reset_cache()


def _become_init() -> None:
    """Init of the pid namespace goes on; the process that left the host only waits for it."""
    child = os.fork()
    if child == 0:
        return
    os.close(SOCKET)
    _, status = os.waitpid(child, 0)
    os._exit(os.waitstatus_to_exitcode(status) & 0xFF)
