"""The last words of an engine process, which writes into its actor's log."""

from __future__ import annotations

import os
from pathlib import Path

LOG_LINES = 8


def log_tail() -> str:
    """Last lines of this process's log, which its engine processes share."""
    try:
        with open(os.readlink("/proc/self/fd/2"), "rb") as log:
            log.seek(max(0, Path(log.name).stat().st_size - 4096))
            lines = log.read().decode(errors="replace").splitlines()[-LOG_LINES:]
    except OSError:
        return "no log to be read"
    return "last log lines: " + " | ".join(line.strip() for line in lines if line.strip())
