"""The conversation of a weight transfer: epoch of membership, send, commit.

Invariant: engines hold `version` when `sent()` returns; one transfer at a time; when the set of
live engines changed, the epoch is closed and a new one opened before anything is sent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

from h1r_rl.errors import WeightTransferError
from h1r_rl.weight_manifest import TransferEpoch, WeightManifest

ATTEMPTS = 3  # an attempt fails with a member; the next one goes to those that are left


class WeightSync:
    def __init__(self, learner: Any, pool: Any, manifest: WeightManifest) -> None:
        self._learner = learner
        self._pool = pool
        self._manifest = manifest
        self._epoch: TransferEpoch | None = None
        self._transfer: asyncio.Task[None] | None = None
        self.engine_version = 0
        self.metrics: dict[str, float] = {}

    def publish(self, version: int, then: Callable[[], Awaitable[None]]) -> None:
        """Begin to send the learner's parameters as `version`; `then` runs once engines hold it."""
        self._transfer = asyncio.create_task(self._send(version, then))

    async def sent(self) -> None:
        """Wait for the transfer under way: the learner's tensors may change afterwards."""
        if self._transfer is not None:
            transfer, self._transfer = self._transfer, None
            await transfer

    async def _send(self, version: int, then: Callable[[], Awaitable[None]]) -> None:
        started = time.monotonic()
        for attempt in range(1, ATTEMPTS + 1):
            try:
                await self._open_epoch_if_changed()
                await self._pool.begin_receive(self._manifest)
                sent = await self._learner.send()
                pause_s = await self._pool.commit(str(version))
                break
            except WeightTransferError:
                self._epoch = None
                if attempt == ATTEMPTS:
                    raise
        self.engine_version = version
        self.metrics = {
            "weights/sync_s": time.monotonic() - started,
            "weights/pause_s": pause_s,
            "weights/transfer_s": sent["transfer_s"],
            "weights/bytes_per_s": sent["bytes_per_s"],
        }
        await then()

    async def _open_epoch_if_changed(self) -> None:
        offsets, world_size = {}, 1
        for name, ranks in self._pool.members().items():
            offsets[name] = world_size
            world_size += ranks
        if self._epoch is not None and self._epoch.rank_offsets == offsets:
            return
        epoch = await self._learner.open_epoch(world_size, offsets)
        await asyncio.gather(self._learner.join_epoch(epoch), self._pool.join_epoch(epoch))
        self._epoch = epoch
