"""Reward workers behind one address: routing, back-pressure, replacement of the lost.

Invariant: every part handed to `score` comes back as one verdict a sample, or `score` raises
RolloutLost because the samples themselves are gone. A lost worker costs a retry, a second loss in
a row gives verdicts without a score (`worker_lost`), never zeros. At most QUEUE_PER_WORKER parts
wait in a worker; further callers of `score` wait here, which is the back-pressure.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError

from h1r_rl.config.schema import RewardConfig
from h1r_rl.errors import RolloutLost, RunFailed
from h1r_rl.records import GroupPart, Prompt, Verdict
from rewards.registry import item_deadline_s
from rewards.reward_stats import RewardStats
from rewards.reward_worker import RewardWorker

logger = logging.getLogger(__name__)

QUEUE_PER_WORKER = 2  # one being judged, one at hand
PART_OVERHEAD_S = 60.0  # fetching the completions, starting a verifier process on a busy machine
CLOSE_TIMEOUT_S = 5.0


@dataclass(eq=False, slots=True)
class _Worker:
    handle: Any
    in_flight: int = 0
    leaving: bool = False


class RewardPool:
    """Made by `start`; scores until `close`."""

    def __init__(
        self, config: RewardConfig, max_response_tokens: int, start_timeout_s: float
    ) -> None:
        self._config = config
        self._max_response_tokens = max_response_tokens
        self._start_timeout_s = start_timeout_s
        self._workers: list[_Worker] = []
        self._free = asyncio.Condition()
        self._waiting = 0
        self._closing: set[asyncio.Task[None]] = set()
        self._stats = RewardStats()

    @classmethod
    async def start(
        cls, config: RewardConfig, max_response_tokens: int, start_timeout_s: float = 120.0
    ) -> RewardPool:
        """A pool with `config.workers` workers that have all answered."""
        pool = cls(config, max_response_tokens, start_timeout_s)
        try:
            await pool.scale(config.workers)
        except BaseException:
            await pool.close()
            raise
        return pool

    async def score(self, prompt: Prompt, part: GroupPart) -> list[Verdict]:
        """One verdict for each of `part.sample_indices`, in that order."""
        for attempt in (1, 2):
            worker = await self._take_worker()
            try:
                judged = await self._ask(worker, prompt, part)
            except (RayActorError, TimeoutError) as error:
                logger.warning("reward worker lost (attempt %d): %s", attempt, error)
                await self._replace(worker)
                continue
            finally:
                await self._give_back(worker)
            for verdict, seconds in judged:
                self._stats.add(verdict, seconds)
            return [verdict for verdict, _ in judged]
        lost = [Verdict(None, {}, "worker_lost") for _ in part.sample_indices]
        for verdict in lost:
            self._stats.add(verdict, 0.0)
        return lost

    async def scale(self, workers: int) -> None:
        """Grow or shrink to `workers`; those that leave finish what they hold."""
        staying = [worker for worker in self._workers if not worker.leaving]
        missing = max(0, workers - len(staying))
        await asyncio.gather(*(self._add_worker() for _ in range(missing)))
        surplus = max(0, len(staying) - workers)
        for worker in sorted(staying, key=lambda w: w.in_flight)[:surplus]:
            worker.leaving = True
            if worker.in_flight == 0:
                self._retire(worker)

    def stats(self) -> dict[str, float]:
        """Counts since the start, and the load now."""
        return self._stats.snapshot() | {
            "reward/workers": float(sum(not w.leaving for w in self._workers)),
            "reward/queue_depth": float(self._waiting),
            "reward/in_flight": float(sum(w.in_flight for w in self._workers)),
        }

    async def close(self) -> None:
        """Kill the workers and what they run."""
        for worker in list(self._workers):
            self._retire(worker)
        if self._closing:
            await asyncio.wait(self._closing, timeout=2 * CLOSE_TIMEOUT_S)

    async def _ask(
        self, worker: _Worker, prompt: Prompt, part: GroupPart
    ) -> list[tuple[Verdict, float]]:
        per_item = item_deadline_s(prompt.verifier, self._config)
        deadline = QUEUE_PER_WORKER * (PART_OVERHEAD_S + 2 * per_item * len(part.sample_indices))
        try:
            # The reference goes at top level: Ray resolves it in the worker, never here.
            judged = await asyncio.wait_for(
                worker.handle.score.remote(prompt, part.completions_ref), deadline
            )
        except ObjectLostError as error:
            raise RolloutLost(part.engine, f"its completions are gone: {error}") from error
        if len(judged) != len(part.sample_indices):
            raise RunFailed(
                f"{prompt.key}: expected {len(part.sample_indices)} completions behind the part's "
                f"reference, found {len(judged)}; the rollout pool broke its contract"
            )
        return judged

    async def _take_worker(self) -> _Worker:
        self._waiting += 1
        try:
            async with self._free:
                while True:
                    open_for_work = [
                        w for w in self._workers
                        if not w.leaving and w.in_flight < QUEUE_PER_WORKER
                    ]
                    if open_for_work:
                        worker = min(open_for_work, key=lambda w: w.in_flight)
                        worker.in_flight += 1
                        return worker
                    await self._free.wait()
        finally:
            self._waiting -= 1

    async def _give_back(self, worker: _Worker) -> None:
        worker.in_flight -= 1
        if worker.leaving and worker.in_flight == 0:
            self._retire(worker)
        async with self._free:
            self._free.notify()

    async def _replace(self, worker: _Worker) -> None:
        """Several callers may lose the same worker: the first one replaces it."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        ray.kill(worker.handle)
        self._stats.workers_lost += 1
        if not worker.leaving:
            await self._add_worker()

    async def _add_worker(self) -> None:
        options = {"num_cpus": self._config.num_cpus, "max_restarts": 0}
        actor = ray.remote(RewardWorker).options(**options)
        handle = actor.remote(self._config, self._max_response_tokens)
        try:
            await asyncio.wait_for(handle.ready.remote(), self._start_timeout_s)
        except (RayActorError, TimeoutError) as error:
            ray.kill(handle)
            raise RunFailed(
                f"a reward worker did not start within {self._start_timeout_s:.0f} s: {error}; "
                f"does the cluster have reward.workers ({self._config.workers}) x reward.num_cpus "
                f"({self._config.num_cpus:g}) CPUs to spare?"
            ) from error
        async with self._free:
            self._workers.append(_Worker(handle))
            self._free.notify_all()

    def _retire(self, worker: _Worker) -> None:
        if worker in self._workers:
            self._workers.remove(worker)
            task = asyncio.create_task(_end(worker.handle))
            self._closing.add(task)
            task.add_done_callback(self._closing.discard)


async def _end(handle: Any) -> None:
    """Let the worker end what it runs and exit; kill it if it does not."""
    try:
        await asyncio.wait_for(handle.close.remote(), CLOSE_TIMEOUT_S)
    except RayActorError:  # it has exited, as asked
        return
    except TimeoutError:
        logger.warning("reward worker did not close within %.0f s", CLOSE_TIMEOUT_S)
    ray.kill(handle)
