"""Defences of the reward services, each with a change that takes it away: `bench_defences` runs
them.

Invariant: a mutant breaks one defence, as an unlucky edit would (a call deleted, a limit widened, a
check that says yes); `old` stands once in its file. `tests` are those that should notice.
"""

from __future__ import annotations

from typing import NamedTuple

TABLE_S = 240.0  # the agreement table: computer algebra on two thousand pairs


class Mutant(NamedTuple):
    """Example: Mutant("umask", "rewards/sandbox/jail.py", "0o077", "0o022", ("...::test_x",))."""

    name: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]
    timeout_s: float = 60.0  # of one test: those that hang are killed


def _mutant(name: str, file: str, old: str, new: str, *tests: str) -> Mutant:
    """`tests` as "sandbox_walls::test_limits", several in a file joined by commas."""
    nodes = []
    for group in tests:
        module, _, names = group.partition("::")
        path = f"tests/rewards/test_{module}.py"
        nodes += [f"{path}::{one}" for one in names.split(",")] if names else [path]
    slow = any("test_agreement_table" in node for node in nodes)
    return Mutant(name, f"rewards/{file}", old, new, tuple(nodes), *((TABLE_S,) if slow else ()))


# What stands around programs -----------------------------------------------------------------

_ZYGOTE, _JAIL, _JOBS = "sandbox/zygote.py", "sandbox/jail.py", "sandbox/jobs.py"
_KINDS = {  # of namespaces: as /proc names them, and as `linux` does
    "user": "USER", "mnt": "NS", "pid": "PID", "net": "NET", "ipc": "IPC", "uts": "UTS",
    "cgroup": "CGROUP",
}


def _namespaces(side: str, call: str) -> list[Mutant]:
    return [
        _mutant(
            f"{side} {kind} namespace", _ZYGOTE, f"linux.{call}(NAMESPACES)",
            f"linux.{call}(NAMESPACES & ~linux.CLONE_NEW{flag})",
            f"sandbox_walls::test_namespace_is_its_own[{kind}]",
        )
        for kind, flag in _KINDS.items()
    ]


_ROOT = [
    _mutant(
        "pivot_root, not chroot", "sandbox/linux.py",
        '    _syscall("pivot_root", here, here)\n'
        '    _call("umount2", _libc.umount2(here, ctypes.c_int(MNT_DETACH)))\n',
        '    os.chroot(".")\n',
        "sandbox_walls::test_mounts",
    ),
    _mutant(
        "old root unmounted", "sandbox/linux.py",
        '    _call("umount2", _libc.umount2(here, ctypes.c_int(MNT_DETACH)))\n', "",
        "sandbox_walls::test_mounts",
    ),
    _mutant(
        "mounts private", _ZYGOTE,
        '    linux.mount("none", "/", None, linux.MS_REC | linux.MS_PRIVATE)\n', "",
        "sandbox_start::test_nothing_that_the_host_mounts_later_comes_through",
    ),
    _mutant(
        "minimal root", _ZYGOTE, 'DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")',
        'DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/full")',
        "sandbox_walls::test_mounts",
    ),
    _mutant(
        "root read-only", _ZYGOTE,
        "    linux.seal_mount(root, SEALED | linux.MOUNT_ATTR_NODEV)\n", "",
        "sandbox_walls::test_mounts",
    ),
    _mutant(
        "library read-only", _ZYGOTE,
        "    linux.seal_mount(root + LIBRARY, SEALED | linux.MOUNT_ATTR_NODEV, below=True)\n", "",
        "sandbox_walls::test_mounts",
    ),
    _mutant(
        "devices sealed", _ZYGOTE, "        linux.seal_mount(root + device, SEALED)\n", "",
        "sandbox_walls::test_mounts",
    ),
    _mutant(
        "root nosuid", _ZYGOTE, "SEALED = linux.MOUNT_ATTR_RDONLY | linux.MOUNT_ATTR_NOSUID",
        "SEALED = linux.MOUNT_ATTR_RDONLY", "sandbox_walls::test_mounts",
    ),
    _mutant(
        "library nodev", _ZYGOTE, "root + LIBRARY, SEALED | linux.MOUNT_ATTR_NODEV, below=True",
        "root + LIBRARY, SEALED, below=True", "sandbox_walls::test_mounts",
    ),
    _mutant(
        "site-packages hidden", _ZYGOTE,
        'if os.path.isdir(root + LIBRARY + "/site-packages"):', "if False:",
        "attacks::test_attack_is_contained[whole_tree]",
    ),
    _mutant(
        "host's paths forgotten", _ZYGOTE, "    _forget_host_paths(library)\n", "",
        "attacks::test_attack_is_contained[host_paths_in_the_interpreter]",
    ),
    _mutant(
        "host name", _ZYGOTE, '    linux.set_hostname("jail")\n', "",
        "attacks::test_attack_is_contained[hostname]",
    ),
    _mutant(
        "work folder nosuid", _JAIL, "linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC",
        "linux.MS_NODEV | linux.MS_NOEXEC", "sandbox_walls::test_mounts",
    ),
    _mutant(
        "work folder nodev", _JAIL, "linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC",
        "linux.MS_NOSUID | linux.MS_NOEXEC", "sandbox_walls::test_mounts",
    ),
    _mutant(
        "work folder noexec", _JAIL, "linux.MS_NOSUID | linux.MS_NODEV | linux.MS_NOEXEC",
        "linux.MS_NOSUID | linux.MS_NODEV", "sandbox_walls::test_mounts",
    ),
    _mutant(
        "work folder's size", _JAIL, "size={limits.file_bytes},nr_inodes", "nr_inodes",
        "sandbox_walls::test_mounts",
    ),
    _mutant(
        "work folder's files", _JAIL, ",nr_inodes={MAX_FILES}", "", "sandbox_walls::test_mounts"
    ),
    _mutant(
        "work folder fresh", _ZYGOTE,
        '    linux.seal_mount(root + LIBRARY, SEALED | linux.MOUNT_ATTR_NODEV, below=True)\n',
        '    linux.seal_mount(root + LIBRARY, SEALED | linux.MOUNT_ATTR_NODEV, below=True)\n'
        '    linux.mount("tmpfs", root + "/tmp", "tmpfs", 0, "mode=0777")\n',
        "attacks::test_nothing_survives_a_program",
    ),
]

MUTANTS = [
    *_namespaces("zygote's", "unshare"),
    *_namespaces("program's", "clone"),
    *_ROOT,
]
