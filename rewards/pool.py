"""Reward workers behind one address: routing, back-pressure, replacement of the lost.

Invariant: every completion handed in comes back as one verdict, as soon as it is there, or the
call raises RolloutLost because the completions themselves are gone. A lost worker costs the
verdicts that it still owed a retry, a second loss in a row gives these no score (`worker_lost`),
never zeros. At most QUEUE_PER_WORKER calls wait in a worker; further callers wait here, which is
the back-pressure.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray
from ray.exceptions import ObjectLostError, RayActorError, RayTaskError

from h1r_rl.config.schema import RewardConfig
from h1r_rl.errors import ConfigError, RolloutLost, RunFailed
from h1r_rl.records import Completion, GroupPart, Prompt, Verdict
from rewards.registry import item_deadline_s
from rewards.reward_stats import RewardStats
from rewards.reward_worker import Judged, RewardWorker

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
        self,
        config: RewardConfig,
        max_response_tokens: int,
        start_timeout_s: float,
        verifiers: frozenset[str],
    ) -> None:
        self._config = config
        self._max_response_tokens = max_response_tokens
        self._start_timeout_s = start_timeout_s
        self._verifiers = verifiers
        self._workers: list[_Worker] = []
        self._free = asyncio.Condition()
        self._waiting = 0
        self._closing: set[asyncio.Task[None]] = set()
        self._stats = RewardStats()

    @classmethod
    async def start(
        cls,
        config: RewardConfig,
        max_response_tokens: int,
        start_timeout_s: float = 120.0,
        verifiers: frozenset[str] = frozenset(),
    ) -> RewardPool:
        """A pool with `config.workers` workers that have all answered. `verifiers` that are known
        to be needed are tried: ConfigError says what a machine lacks for them."""
        pool = cls(config, max_response_tokens, start_timeout_s, verifiers)
        try:
            await pool.resize(config.workers)
        except BaseException:
            await pool.close()
            raise
        return pool

    async def score(self, prompt: Prompt, part: GroupPart) -> list[Verdict]:
        """One verdict for each of `part.sample_indices`, in that order."""
        verdicts: dict[int, Verdict] = {}
        async for position, verdict, _ in self.stream(prompt, part):
            verdicts[position] = verdict
        return [verdicts[position] for position in range(len(part.sample_indices))]

    async def stream(
        self, prompt: Prompt, part: GroupPart
    ) -> AsyncIterator[tuple[int, Verdict, float]]:
        """The same as (position in the part, verdict, seconds), each as it is made."""
        count, engine = len(part.sample_indices), part.engine
        # The reference goes at top level: Ray resolves it in the worker, never here.
        async for item in self._judge(prompt, part.completions_ref, count, prompt, engine):
            yield item

    async def stream_each(
        self, prompts: Sequence[Prompt], completions: Sequence[Completion]
    ) -> AsyncIterator[tuple[int, Verdict, float]]:
        """A verdict for each pair, streamed alike: for completions that lie here."""
        slowest = max(prompts, key=lambda p: item_deadline_s(p.verifier, self._config))
        async for item in self._judge(prompts, completions, len(prompts), slowest, "the caller"):
            yield item

    async def resize(self, workers: int) -> None:
        """Grow or shrink to `workers`; those that leave finish what they hold."""
        staying = [worker for worker in self._workers if not worker.leaving]
        missing = max(0, workers - len(staying))
        await asyncio.gather(*(self._add_worker() for _ in range(missing)))
        surplus = max(0, len(staying) - workers)
        for worker in sorted(staying, key=lambda w: w.in_flight)[:surplus]:
            worker.leaving = True
            if worker.in_flight == 0:
                self._retire(worker)

    def num_workers(self) -> int:
        """Workers that stay."""
        return sum(not worker.leaving for worker in self._workers)

    def stats(self) -> dict[str, float]:
        """Counts since the start, and the load now."""
        return self._stats.snapshot() | {
            "reward/workers": float(self.num_workers()),
            "reward/queue_depth": float(self._waiting),
            "reward/in_flight": float(sum(w.in_flight for w in self._workers)),
        }

    async def close(self) -> None:
        """Kill the workers and what they run."""
        for worker in list(self._workers):
            self._retire(worker)
        if self._closing:
            await asyncio.wait(self._closing, timeout=2 * CLOSE_TIMEOUT_S)

    async def _judge(
        self, prompts: Any, completions: Any, count: int, slowest: Prompt, engine: str
    ) -> AsyncIterator[tuple[int, Verdict, float]]:
        """`prompts` and `completions` as the worker takes them; `count` verdicts are due."""
        done = 0
        for attempt in (1, 2):
            worker = await self._take_worker()
            try:
                batches = worker.handle.score.remote(prompts, completions, done)
                while done < count:
                    batch = await self._next(batches, slowest, count - done, engine)
                    if batch is None or done + len(batch.verdicts) > count:
                        raise _wrong_count(slowest, count)
                    self._stats.add_kills(batch.kills)
                    for verdict, seconds in zip(batch.verdicts, batch.seconds, strict=True):
                        self._stats.add(_verifier_of(prompts, done), verdict, seconds)
                        yield done, verdict, seconds
                        done += 1
                if await self._next(batches, slowest, 1, engine) is not None:
                    raise _wrong_count(slowest, count)
                return
            except (RayActorError, TimeoutError) as error:
                logger.warning("reward worker lost (attempt %d): %s", attempt, error)
                reason = "deadline" if isinstance(error, TimeoutError) else "died"
                await self._replace(worker, reason)
            finally:
                await self._give_back(worker)
        for position in range(done, count):
            verdict = Verdict(None, {}, "worker_lost")
            self._stats.add(_verifier_of(prompts, position), verdict, 0.0)
            yield position, verdict, 0.0

    async def _next(self, batches: Any, prompt: Prompt, left: int, engine: str) -> Judged | None:
        """The next verdicts of a worker; None after the last."""
        per_item = item_deadline_s(prompt.verifier, self._config)
        deadline = QUEUE_PER_WORKER * (PART_OVERHEAD_S + 2 * per_item * left)
        try:
            async with asyncio.timeout(deadline):
                return await (await anext(batches))
        except StopAsyncIteration:
            return None
        except ObjectLostError as error:
            raise RolloutLost(engine, f"its completions are gone: {error}") from error

    async def _take_worker(self) -> _Worker:
        self._waiting += 1
        try:
            async with self._free:
                while True:
                    open_for_work = [
                        w for w in self._workers if not w.leaving and w.in_flight < QUEUE_PER_WORKER
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

    async def _replace(self, worker: _Worker, reason: str) -> None:
        """Several callers may lose the same worker: the first one replaces it."""
        if worker not in self._workers:
            return
        self._workers.remove(worker)
        ray.kill(worker.handle)
        self._stats.workers_lost[reason] += 1
        if not worker.leaving:
            await self._add_worker()

    async def _add_worker(self) -> None:
        options = {"num_cpus": self._config.num_cpus, "max_restarts": 0}
        actor = ray.remote(RewardWorker).options(**options)
        handle = actor.remote(self._config, self._max_response_tokens, self._verifiers)
        try:
            await asyncio.wait_for(handle.ready.remote(), self._start_timeout_s)
        except (RayActorError, RayTaskError, TimeoutError) as error:
            ray.kill(handle)
            _raise_what_is_missing(error)
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


def _verifier_of(prompts: Prompt | Sequence[Prompt], position: int) -> str:
    return (prompts if isinstance(prompts, Prompt) else prompts[position]).verifier


def _wrong_count(prompt: Prompt, count: int) -> RunFailed:
    return RunFailed(
        f"{prompt.key}: expected {count} completions behind the part's reference, found another "
        "number; the rollout pool broke its contract"
    )


def _raise_what_is_missing(error: BaseException) -> None:
    """A worker that found that its machine lacks something says so itself."""
    cause = getattr(error, "cause", None)
    if isinstance(cause, ConfigError):
        raise cause from None


async def _end(handle: Any) -> None:
    """Let the worker end what it runs and exit; kill it if it does not."""
    try:
        await asyncio.wait_for(handle.close.remote(), CLOSE_TIMEOUT_S)
    except RayActorError:  # it has exited, as asked
        return
    except TimeoutError:
        logger.warning("reward worker did not close within %.0f s", CLOSE_TIMEOUT_S)
    ray.kill(handle)
