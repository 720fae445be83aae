"""One control group for a zygote and all its programs, where this process may make one.

Invariant: an extra wall, never the only one: without it, memory is bounded by processes x address
space. Made in our own group's folder (v2 where its controllers are delegated, else v1); removed on
close. Nothing here raises: what cannot be had is logged once and left out.
"""

from __future__ import annotations

import logging
import os
import time
from pathlib import Path

logger = logging.getLogger(__name__)

ROOT = Path("/sys/fs/cgroup")
CLOSE_TIMEOUT_S = 2.0
PREFIX = "h1r-sandbox-"


class Cgroup:
    """Folders (one for v2; memory and pids for v1) that the zygote is put into."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders = folders

    def add(self, pid: int) -> None:
        for folder in self.folders:
            _write(folder / "cgroup.procs", str(pid))

    def close(self) -> None:
        """Remove the folders; the kernel allows it once the last process is gone."""
        for folder in self.folders:
            end = time.monotonic() + CLOSE_TIMEOUT_S
            while (error := _remove(folder)) is not None and time.monotonic() < end:
                time.sleep(0.02)
            if error is not None:
                logger.warning("control group %s stays behind: %s", folder, error)
        self.folders = []


def make_cgroup(memory_bytes: int, processes: int) -> Cgroup | None:
    """A group with these limits, or None."""
    name = f"{PREFIX}{os.getpid()}-{os.urandom(4).hex()}"
    own = _own_groups()
    limits = {
        "memory": {"memory.max": memory_bytes, "memory.swap.max": 0},
        "pids": {"pids.max": processes},
    }
    if "" in own and set(limits) <= _delegated(ROOT / own[""]):
        folders = {ROOT / own[""] / name: limits["memory"] | limits["pids"]}
    else:
        limits["memory"] = {"memory.limit_in_bytes": memory_bytes}
        folders = {
            ROOT / kind / own[kind] / name: values for kind, values in limits.items() if kind in own
        }
    for folder in folders:
        _sweep(folder.parent)
    made = [folder for folder, values in folders.items() if _make(folder, values)]
    if not made:
        logger.info("no control group for the sandbox: processes x memory bounds a memory bomb")
    return Cgroup(made) if made else None


def _sweep(parent: Path) -> None:
    """Remove what owners that were killed left; the kernel keeps any that is in use."""
    for folder in parent.glob(f"{PREFIX}*"):
        owner = folder.name.removeprefix(PREFIX).partition("-")[0]
        if not Path(f"/proc/{owner}").exists():
            _remove(folder)


def _own_groups() -> dict[str, str]:
    """Controller (v2: "") -> our group's path without its leading slash."""
    groups = {}
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        groups.update(dict.fromkeys(controllers.split(","), path.lstrip("/")))
    return groups


def _delegated(folder: Path) -> set[str]:
    try:
        return set((folder / "cgroup.subtree_control").read_text().split())
    except OSError:
        return set()


def _make(folder: Path, values: dict[str, int]) -> bool:
    try:
        folder.mkdir()
    except OSError:
        return False
    written = [_write(folder / name, str(value)) for name, value in values.items()]
    if any(written):
        return True
    folder.rmdir()
    return False


def _remove(folder: Path) -> OSError | None:
    try:
        folder.rmdir()
    except OSError as error:
        return error
    return None


def _write(path: Path, text: str) -> bool:
    try:
        path.write_text(text)
    except OSError:
        return False
    return True
