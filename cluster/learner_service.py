"""The learner under an address that outlives its processes.

Invariant: a restart is between two steps and changes nothing of what is learned: weights, optimizer
state and version go through a checkpoint in the run folder, bit for bit. Engines go on meanwhile.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

from h1r_rl.errors import RunFailed

logger = logging.getLogger(__name__)


class LearnerService:
    """Every call of a LearnerGroup goes to the one that is up."""

    def __init__(self, start: Callable[..., Awaitable[Any]], group: Any, checkpoints: Path) -> None:
        self._start = start
        self._group = group
        self._checkpoints = checkpoints

    @classmethod
    async def start(cls, start: Callable[..., Awaitable[Any]], checkpoints: Path) -> LearnerService:
        """`start`: makes a LearnerGroup, at `initial_version` where one is given."""
        return cls(start, await start(), checkpoints)

    async def restart(self, version: int) -> None:
        """Other processes with the same state."""
        started = time.monotonic()
        told = await self._group.weight_manifest()
        await self._group.save_checkpoint(str(self._checkpoints))
        await self._group.close()
        self._group = await self._start(initial_version=version)
        restored = await self._group.load_checkpoint(str(self._checkpoints))
        if restored != version:
            raise RunFailed(f"the learner came back with version {restored}, expected {version}")
        other = (await self._group.weight_manifest()).difference(told)  # each rank derives its own
        if other:
            raise RunFailed(f"the learner came back with parameters that engines have not: {other}")
        logger.info("learner restarted at version %d, %.1f s", version, time.monotonic() - started)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._group, name)
