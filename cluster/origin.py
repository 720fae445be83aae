"""What made the results of a stage: the code's commit and the machine of the command line.

Invariant: recorded as the stage begins, so a run that is resumed under other code says so, and one
that is resumed with nothing left to do keeps what it said.
"""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path
from typing import Any

ROOMS = ("h1r_rl", "rewards", "actors", "learners", "cluster")
GIT_DEADLINE_S = 20.0


def origin() -> dict[str, Any]:
    """{"commit", "machine": {"cpu", "cores", "memory" in bytes}}."""
    return {"commit": commit_of(Path(__file__).parents[1]), "machine": machine()}


def commit_of(checkout: Path) -> str | None:
    """HEAD of the checkout that the code lies in, with "-dirty" where a tracked file of the rooms
    differs from it; None where the code is not of a checkout (an installed wheel)."""

    def git(*words: str) -> str:
        command = ["git", "-C", str(checkout), *words]
        done = subprocess.run(command, capture_output=True, text=True, timeout=GIT_DEADLINE_S)
        if done.returncode:
            raise OSError(done.stderr)
        return done.stdout.strip()

    rooms = [room for room in ROOMS if (checkout / room).is_dir()]
    try:
        git("ls-files", "--error-unmatch", f"{ROOMS[0]}/__init__.py")  # not of a repository around
        changed = git("status", "--porcelain", "--untracked-files=no", "--", *rooms)
        return git("rev-parse", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.TimeoutExpired):
        return None


def machine() -> dict[str, Any]:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {"cpu": _cpu(), "cores": os.cpu_count(), "memory": memory}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
