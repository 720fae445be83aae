"""The few Linux system calls that Python 3.11 has no name for, through libc by ctypes.

Invariant: every call raises OSError with its name and errno; nothing here knows what it is used
for. x86_64 and aarch64.
"""

from __future__ import annotations

import ctypes
import os
import platform

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY, MS_NOSUID, MS_NODEV, MS_NOEXEC = 1, 2, 4, 8
MS_REMOUNT, MS_BIND, MS_REC, MS_PRIVATE = 32, 4096, 16384, 1 << 18
MNT_DETACH = 2

AT_RECURSIVE, AT_FDCWD = 0x8000, -100
MOUNT_ATTR_RDONLY, MOUNT_ATTR_NOSUID, MOUNT_ATTR_NODEV = 1, 2, 4

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38
SECCOMP_MODE_FILTER = 2

_SIGCHLD = 17
_MOUNT_ATTR_SIZE = 32
_CAPABILITY_VERSION_3 = 0x20080522

_NUMBERS = {
    "x86_64": {"clone": 56, "capset": 126, "pivot_root": 155, "mount_setattr": 442},
    "aarch64": {"clone": 220, "capset": 91, "pivot_root": 41, "mount_setattr": 442},
}

# PyDLL keeps the interpreter lock during the call, which `clone` needs.
_libc = ctypes.PyDLL(None, use_errno=True)


def machine() -> str:
    """x86_64 or aarch64; OSError elsewhere."""
    name = platform.machine()
    if name not in _NUMBERS:
        raise OSError(f"expected x86_64 or aarch64, found {name}")
    return name


def _call(name: str, result: int) -> int:
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def _syscall(name: str, *arguments: object) -> int:
    number = _NUMBERS[machine()][name]
    return _call(name, _libc.syscall(ctypes.c_long(number), *arguments))


def unshare(flags: int) -> None:
    _call("unshare", _libc.unshare(ctypes.c_int(flags)))


def clone(flags: int) -> int:
    """fork() into new namespaces: 0 in the child, its process id in the parent.

    The raw system call skips what the interpreter does around os.fork, so it is done here.
    """
    _before_fork()
    result = _libc.syscall(_CLONE, ctypes.c_ulong(flags | _SIGCHLD), _NULL, _NULL, _NULL, _NULL)
    if result == 0:
        _after_fork_child()
        return 0
    number = ctypes.get_errno()
    _after_fork_parent()
    if result < 0:
        raise OSError(number, f"clone: {os.strerror(number)}")
    return result


def mount(source: str, target: str, kind: str | None, flags: int, data: str = "") -> None:
    _call(
        f"mount {target}",
        _libc.mount(
            source.encode(), target.encode(), kind.encode() if kind else None,
            ctypes.c_ulong(flags), data.encode(),
        ),
    )


def seal_mount(target: str, attributes: int, below: bool = False) -> None:
    """Set MOUNT_ATTR_* on the mount at `target`, on request also on all below it (Linux 5.12)."""
    request = (ctypes.c_uint64 * 4)(attributes, 0, 0, 0)
    _syscall(
        "mount_setattr", ctypes.c_int(AT_FDCWD), ctypes.c_char_p(target.encode()),
        ctypes.c_uint(AT_RECURSIVE if below else 0), request, ctypes.c_size_t(_MOUNT_ATTR_SIZE),
    )


def enter_root(new_root: str) -> None:
    """Make `new_root` the root and let go of the old one."""
    os.chdir(new_root)
    here = ctypes.c_char_p(b".")
    _syscall("pivot_root", here, here)
    _call("umount2", _libc.umount2(here, ctypes.c_int(MNT_DETACH)))
    os.chdir("/")


def set_hostname(name: str) -> None:
    _call("sethostname", _libc.sethostname(name.encode(), ctypes.c_size_t(len(name))))


def prctl(option: int, argument: int, pointer: object = None) -> None:
    _call("prctl", _libc.prctl(ctypes.c_int(option), ctypes.c_ulong(argument),
                               pointer, ctypes.c_ulong(0), ctypes.c_ulong(0)))


def drop_capabilities() -> None:
    """No effective, permitted or inheritable capability is left (ambient ones go with them)."""
    _syscall("capset", _CAPABILITY_HEADER, _NO_CAPABILITIES)


# Made once: a clone's first use of anything costs it page faults.
_CLONE = ctypes.c_long(_NUMBERS.get(platform.machine(), {}).get("clone", -1))
_NULL = ctypes.c_ulong(0)
_CAPABILITY_HEADER = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
_NO_CAPABILITIES = (ctypes.c_uint32 * 6)()
_before_fork = ctypes.pythonapi.PyOS_BeforeFork
_after_fork_child = ctypes.pythonapi.PyOS_AfterFork_Child
_after_fork_parent = ctypes.pythonapi.PyOS_AfterFork_Parent
