"""The conversation of a weight transfer: epoch of membership, send, commit.

Invariant: engines hold `version` when `sent()` returns, and from then until `publish` or
`unchanged` nothing reads the learner's tensors; one transfer at a time; when the set of live
engines changed, the epoch is closed and a new one opened before anything is sent.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from h1r_rl.errors import RunFailed, WeightTransferError
from h1r_rl.records import Prompt
from h1r_rl.weight_manifest import TransferEpoch, WeightManifest, assign_ranks

logger = logging.getLogger(__name__)

ATTEMPTS = 5  # one fails with each member lost in it; the next one goes to those that are left
MAX_LATE = 2  # an engine that missed a version this often while its peers got it is killed

Then = Callable[[], Awaitable[None]]


class WeightSync:
    def __init__(
        self,
        learner: Any,
        pool: Any,
        manifest: WeightManifest,
        *,
        overlap: bool = True,
        probe: Prompt | None = None,
        probe_limit: float = 0.0,
    ) -> None:
        """`overlap` False (ZeRO-3): sending is a step of all ranks' compute, not beside a forward.
        `probe`: a prompt whose log-probabilities every engine gives with each version; the first
        one is pushed twice, and a difference above `probe_limit` then ends the run."""
        self._learner = learner
        self._pool = pool
        self._manifest = manifest
        self._overlap = overlap
        self._probe = probe
        self._probe_limit = probe_limit
        self._pushed_twice = probe is None
        self._sends = self._attempts = 0
        self.probed: dict[str, NDArray[np.float32]] = {}  # by engine, under `engine_version`
        self._epoch: TransferEpoch | None = None
        self._version = 0  # of the learner's tensors
        self._then: Then | None = None  # published and not yet sent
        self._readable = True  # the learner's tensors are `_version`, whole
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()
        self.engine_version = 0
        self.metrics: dict[str, float] = {}
        pool.on_change(self._wake.set)

    async def serve(self) -> None:
        """Consumes what is published; sends the same version again to engines that joined since.
        Waits for either. Endless: the run loop's task group ends with whatever this raises."""
        while True:
            await self._wake.wait()
            self._wake.clear()
            if self._then is None and not (self._readable and self._pool.behind()):
                continue
            self._idle.clear()
            then, self._then = self._then, None
            await self._send(self._version)
            if then is not None:
                await then()
            self._idle.set()

    def publish(self, version: int, then: Then) -> None:
        """Send the learner's parameters as `version`; `then` runs once engines hold it."""
        self._version, self._then, self._readable = version, then, True
        self._idle.clear()
        self._wake.set()

    def unchanged(self) -> None:
        """The step was skipped: the tensors are still those of the last version."""
        self._readable = True
        self._wake.set()

    async def before_forward(self) -> None:
        """Wait for what must not run beside the learner's forward pass, and let nothing begin."""
        if not self._overlap:
            await self.sent()

    async def sent(self) -> None:
        """Wait for the transfers under way: the learner's tensors may change afterwards, until
        `publish` or `unchanged`."""
        while not self._idle.is_set():  # an engine that joined meanwhile has begun another one
            await self._idle.wait()
        self._readable = False

    @property
    def probe_ids(self) -> NDArray[np.int32]:
        assert self._probe is not None
        return self._probe.token_ids

    async def probe_engines(self) -> dict[str, NDArray[np.float32]]:
        """The probe's [tokens - 1] log-probabilities under `engine_version`, by engine."""
        if not self.probed and self._probe is not None:
            self.probed = await self._pool.probe(self._probe)  # the weights that they started with
        return self.probed

    def new_epoch(self) -> None:
        """The learner is another process now: the next transfer begins with a meeting."""
        self._epoch = None

    async def _send(self, version: int) -> None:
        started = time.monotonic()
        sent, pause_s = await self._deliver(version)
        self.metrics = {
            "weights/sync_s": time.monotonic() - started,
            "weights/pause_s": pause_s,
            "weights/transfer_s": sent["transfer_s"],
            "weights/bytes_per_s": sent["bytes_per_s"],
            "weights/epoch": float(self._epoch.number if self._epoch else 0),
            "weights/sends": float(self._sends),
            "weights/attempts": float(self._attempts),
        }
        if self._probe is not None:
            self.probed = await self._pool.probe(self._probe)
        if not self._pushed_twice and version > 0 and self.probed:
            self.metrics["weights/identical_push_gap"] = await self._push_again(version)
        self.engine_version = version

    async def _deliver(self, version: int) -> tuple[dict[str, float], float]:
        """One transfer, to whoever is left when members are lost in it."""
        failures: list[str] = []
        late: Counter[str] = Counter()
        while True:
            await self._pool.any_engine()
            self._attempts += 1
            try:
                await self._open_epoch_if_changed()
                await self._pool.begin_receive(self._manifest)
                sent = await self._learner.send()
                pause_s = await self._pool.commit(str(version))
                self._sends += 1
                return sent, pause_s
            except WeightTransferError as error:
                self._epoch = None
                failures.append(str(error))
                attempt = len(failures)
                logger.warning("version %d, attempt %d: %s", version, attempt, error)
                if len(failures) == ATTEMPTS:
                    raise WeightTransferError(
                        f"version {version} did not reach the engines in {ATTEMPTS} attempts: "
                        + " / ".join(failures)
                    ) from error
                await self._pool.drop_silent()
                # Of the rest, those that peers have left behind with this version.
                behind = self._pool.behind() if self._pool.newest() == str(version) else []
                late.update(behind)
                self._pool.give_up([name for name in behind if late[name] >= MAX_LATE], error)
            except RunFailed as error:
                words = await self._pool.receivers_words()
                raise RunFailed(f"{error} (the engines: {words or 'whole'})") from error
            finally:
                self._pool.end_transfer()

    async def _open_epoch_if_changed(self) -> None:
        offsets, world_size = assign_ranks(self._pool.members())
        if self._epoch is not None and self._epoch.rank_offsets == offsets:
            return
        epoch = await self._learner.open_epoch(world_size, offsets)
        outcomes = await asyncio.gather(
            self._learner.join_epoch(epoch), self._pool.join_epoch(epoch), return_exceptions=True
        )
        failed = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
        for outcome in failed:
            if not isinstance(outcome, WeightTransferError):
                raise outcome
        if failed:  # a side that waited in vain does not know for whom
            raise WeightTransferError(
                f"joining epoch {epoch.number}: the learner (rank 0) and {', '.join(offsets)} did "
                "not meet: " + "; ".join(map(str, failed))
            )
        self._epoch = epoch

    async def _push_again(self, version: int) -> float:
        """A hot reload can corrupt a hybrid without a word (aliased or unloaded tensors): the same
        weights once more must give the same state-space tensors, bit for bit, and the same
        log-probabilities. Returns their largest difference."""
        before, held = self.probed, await self._pool.ask_worker("held_tensors")
        await self._deliver(version)
        after = self.probed = await self._pool.probe(self._probe)
        again = await self._pool.ask_worker("held_tensors")
        moved = [
            f"{engine}: {name}"
            for engine in held.keys() & again.keys()
            for name in held[engine].keys() | again[engine].keys()
            if held[engine].get(name) != again[engine].get(name)
        ]
        if moved:
            raise RunFailed(
                f"version {version} pushed twice left {len(moved)} tensors other than they were "
                f"({', '.join(sorted(moved)[:3])}): the engine's reload corrupts this model"
            )
        gaps = {n: float(np.abs(after[n] - before[n]).max()) for n in before.keys() & after.keys()}
        self._pushed_twice = bool(gaps)  # nobody was there for both: the next version tells
        wrong = {n: gap for n, gap in gaps.items() if not gap <= self._probe_limit}
        if wrong:
            raise RunFailed(
                f"version {version} pushed twice gave other log-probabilities of one prompt: "
                + ", ".join(f"{n} by {gap:.3g}" for n, gap in sorted(wrong.items()))
                + f" (limit {self._probe_limit:g}). The engine's reload corrupts this model: its "
                "rollouts would come from other weights than the learner's"
            )
        return max(gaps.values(), default=0.0)
