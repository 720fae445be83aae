"""An engine's processes end when the actor that owns them ends, however it ended.

Ray kills the actor's process alone and a killed process cleans nothing up: each engine process
waits on its owner's pidfd, which costs nothing and cannot mistake a reused process id. A stopped
process waits for nothing: the kernel kills that one when its parent ends.
"""

from __future__ import annotations

import ctypes
import os
import select
import signal
import threading

OWNER = "H1R_ENGINE_OWNER"
PR_SET_PDEATHSIG = 1
_watching: set[int] = set()  # process ids: a forked child must start a watch of its own


def own_engine_processes() -> None:
    """Called in the owner before it starts an engine; the engine's processes inherit the mark."""
    os.environ[OWNER] = str(os.getpid())


def die_with_owner() -> None:
    """Called in each engine process; does nothing elsewhere and may be called again."""
    owner = int(os.environ.get(OWNER, "0"))
    if not owner or owner == os.getpid() or os.getpid() in _watching:
        return
    _watching.add(os.getpid())
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        pidfd = os.pidfd_open(owner)
    except ProcessLookupError:
        os.kill(os.getpid(), signal.SIGKILL)
        return
    threading.Thread(target=_wait, args=(pidfd,), name="owner-watch", daemon=True).start()


def _wait(pidfd: int) -> None:
    select.select([pidfd], [], [])  # readable once the owner has ended
    os.kill(os.getpid(), signal.SIGKILL)
