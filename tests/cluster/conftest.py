"""The run loop around stubs: the pool, buffer, weight conversation and scaling are the real ones;
engines, learner and verifiers answer from memory.
"""

from __future__ import annotations

import asyncio
import itertools
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.exceptions import RayActorError

from cluster.grpo_loop import GRPORun
from cluster.learner_service import LearnerService
from cluster.scale import ControlFolder, Scaling
from cluster.weight_sync import WeightSync
from h1r_rl.config.load import load_run
from h1r_rl.errors import DataError, WeightTransferError
from h1r_rl.grpo.group_buffer import GroupBuffer
from h1r_rl.records import GroupPart, Prompt, StepResult, Verdict, VersionSpan
from h1r_rl.weight_manifest import ParameterSpec, TransferEpoch, WeightManifest

sys.path.insert(0, str(Path(__file__).parent))  # for the tests too

from live_runs import Live  # noqa: E402

ROOT = Path(__file__).parents[2]
RUN = ROOT / "cluster" / "runs" / "tiny-cpu.yaml"
MANIFEST = WeightManifest((ParameterSpec("w", (4,), "float32"),), 64)


class Remote:
    def __init__(self, call: Callable[..., Any]) -> None:
        self._call = call

    def options(self, **_: Any) -> Remote:
        return self

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        answer = self._call(*args, **kwargs)
        return asyncio.ensure_future(answer) if asyncio.iscoroutine(answer) else answer


class StubEngine:
    """Takes `seconds` for a sample; dies when killed, with whatever it was asked for."""

    def __init__(self, name: str, world: SimpleNamespace) -> None:
        self.name, self.world, self.holds, self.received = name, world, "0", False
        self.commits = 0
        self.dead = asyncio.get_running_loop().create_future()
        self.asked: list[tuple[str, str]] = []  # (prompt, version that it held)
        self.at_work, self.busy_s, self.since = 0, 0.0, time.monotonic()
        self.room = asyncio.Semaphore(world.at_once)

    def __getattr__(self, method: str) -> Remote:
        return Remote(getattr(self, f"_{method}"))

    def kill(self) -> None:
        if not self.dead.done():
            self.dead.set_result(None)

    async def _alive(self, answer: Any = None, seconds: float = 0.0) -> Any:
        sleep = asyncio.ensure_future(asyncio.sleep(seconds))
        await asyncio.wait([sleep, self.dead], return_when=asyncio.FIRST_COMPLETED)
        sleep.cancel()
        if self.dead.done():
            raise RayActorError()
        return answer

    async def _start(self, *_: Any, **__: Any) -> None:
        await self._alive(seconds=self.world.start_s)

    async def _close(self) -> None:
        self.kill()

    async def _generate(self, prompt: Prompt, indices: Any, sampling: Any) -> Any:
        if prompt.prompt_id in self.world.too_long:
            raise DataError(f"prompt {prompt.key} leaves no room")
        self.asked.append((prompt.key, self.holds))
        first = int(self.holds)
        for index in indices:
            if prompt.prompt_id in self.world.poison:
                self.kill()
            self._count(1)
            try:
                async with self.room:
                    await self._alive(seconds=self.world.sample_s(prompt, index))
            finally:
                self._count(-1)
            spans = [VersionSpan(str(first), 0, 2), VersionSpan(self.holds, 2, 4)]
            part = GroupPart((index,), (4,), ("stop",), (tuple(spans),), (0.5,), self.name, 0.0)
            for answer in (part, [None]):
                yield await _done(answer)

    def _count(self, samples: int) -> None:
        """Keep the time with samples to work on."""
        now = time.monotonic()
        self.busy_s += (now - self.since) * (self.at_work > 0)
        self.since, self.at_work = now, self.at_work + samples

    async def _facts(self) -> dict[str, Any]:
        return await self._alive({"pid": 1})

    async def _version(self) -> str:
        return await self._alive(self.holds)

    async def _score(self, prompt: Prompt) -> np.ndarray:
        return await self._alive(np.zeros(3) + self.world.reload_noise.get(self.name, 0.0))

    async def _stats(self) -> dict[str, float]:
        keys = ("running", "waiting", "kv_usage", "tokens", "prefill_tokens", "cached_tokens")
        self._count(0)
        totals = dict.fromkeys((*keys, "reprefilled", "preemptions", "pause_s"), 1.0)
        return await self._alive(totals | {"busy_s": self.busy_s})

    async def _ask_worker(self, method: str) -> dict[str, Any]:
        assert method == "held_tensors"
        value = self.world.held_value + self.world.reload_shift * self.commits
        return await self._alive({self.world.held_name: ("float32", [-1.0, value])})

    async def _join_epoch(self, epoch: TransferEpoch) -> None:
        await self._alive()
        if self.world.missed and self.name in self.world.missed[0]:
            raise WeightTransferError(f"{self.name}: no meeting", (self.name,))

    async def _begin_receive(self, manifest: Any) -> None:
        await self._alive()
        self.received = True

    async def _staged(self) -> None:
        await self._alive(seconds=0.001)
        if self.world.damage.get(self.name, 0):
            self.world.damage[self.name] -= 1
            raise WeightTransferError(f"{self.name}: checksum of w", (self.name,))

    async def _commit(self, version: str) -> float:
        assert self.received, "a commit without a transfer"
        await self._alive(seconds=self.world.commit_s.get(self.name, 0.0))
        self.holds, self.received, self.commits = version, False, self.commits + 1
        if self.name in self.world.reload_noise:
            self.world.reload_noise[self.name] += 0.002
        return 0.001


async def _done(answer: Any) -> Any:
    future = asyncio.get_running_loop().create_future()
    future.set_result(answer)
    return future


class StubLearner:
    def __init__(self, world: SimpleNamespace, version: int = 0) -> None:
        self.world, self.version, self.epochs = world, version, 0
        world.learners.append(self)

    async def forward_backward(self, plan: Any) -> dict[str, float]:
        self.world.plans.append(plan)
        await asyncio.sleep(self.world.learn_s)
        return {"loss": 0.0, "logprob_gap": self.world.logprob_gap, "entropy": 1.0}

    async def score(self, ids: np.ndarray) -> np.ndarray:
        return np.full(len(ids) - 1, self.world.probe_gap)

    async def computed_values(self) -> dict[str, np.ndarray]:
        return {"mixer.0.A": np.array([-1.0, -2.0], np.float32)}

    async def optimizer_step(self) -> StepResult:
        assert not self.world.sending, "the tensors change while they are sent"
        skipped = len(self.world.plans) in self.world.skip
        self.version += not skipped
        return StepResult(self.version, skipped, {"grad_norm": 1.0})

    async def open_epoch(self, world_size: int, offsets: dict[str, int]) -> TransferEpoch:
        self.epochs += 1
        return TransferEpoch(self.epochs, "gloo", "", 0, world_size, offsets, 5.0)

    async def join_epoch(self, epoch: TransferEpoch) -> None:
        await asyncio.sleep(0.001)
        if self.world.missed and "learner" in self.world.missed.pop(0):
            raise WeightTransferError("learner rank 0 failed in join_epoch: no meeting")

    async def weight_manifest(self) -> WeightManifest:
        return MANIFEST

    async def send(self) -> dict[str, float]:
        self.world.sending = True
        await asyncio.sleep(self.world.send_s)
        self.world.sending = False
        self.world.num_sends += 1
        if self.world.send_errors:
            raise self.world.send_errors.pop(0)
        return {"transfer_s": 0.01, "bytes_per_s": 1e6}

    async def save_checkpoint(self, folder: str) -> str:
        self.world.saved = self.version
        return folder

    async def load_checkpoint(self, folder: str) -> int:
        self.version = self.world.saved
        return self.version

    async def close(self) -> None: ...


class StubRewards:
    def __init__(self, world: SimpleNamespace) -> None:
        self.world, self.workers = world, 1

    async def score(self, prompt: Prompt, part: GroupPart) -> list[Verdict]:
        if self.world.score_errors:
            raise self.world.score_errors.pop()
        flat = prompt.prompt_id in self.world.flat
        return [Verdict(0.0 if flat else float(i % 2)) for i in part.sample_indices]

    async def resize(self, workers: int) -> None:
        self.workers = workers

    def num_workers(self) -> int:
        return self.workers

    def stats(self) -> dict[str, float]:
        return {"reward/workers": float(self.workers)}


class Prompts:
    """p0, p1, ... without end; remembers what it issued."""

    def __init__(self) -> None:
        self.issued: list[str] = []

    def next(self) -> Prompt:
        self.issued.append(f"p{len(self.issued)}/0")
        ids = np.arange(4, dtype=np.int32)
        return Prompt(self.issued[-1].split("/")[0], 0, ids, "q", "math", "1")


class Tracker:
    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self.tags: dict[str, str] = {}

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        self.steps.append(metrics)

    def log_table(self, name: str, rows: Any) -> None: ...

    def set_tag(self, name: str, value: str) -> None:
        self.tags[name] = value


class Ledger(GroupBuffer):
    """Remembers by key what was given back, and why."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.given_back: dict[str, list[str]] = {}

    async def drop(self, keys: Any, reason: str) -> None:
        keys = list(keys)
        self.given_back.setdefault(reason, []).extend(keys)
        await super().drop(keys, reason)


def account(run: GRPORun, world: SimpleNamespace) -> None:
    """Every prompt issued was trained, dropped for a reason, or is in flight: exactly one of them,
    each by its name, and as many as the buffer counts."""
    buffer = run.buffer
    in_flight = [key for key, slot in buffer._slots.items() if not slot.taken]
    taken = [group.key for plan in world.plans for group in plan.groups]
    skipped = buffer.given_back.get("skipped_step", [])
    assert set(skipped) <= set(taken)
    trained = [key for key in taken if key not in skipped]
    ends = [*trained, *in_flight, *(key for keys in buffer.given_back.values() for key in keys)]
    assert len(ends) == len(set(ends)), "a prompt has ended in two ways"
    waiting = set(run.prompts.issued) - set(ends)  # one may wait for its slot
    assert set(ends) <= set(run.prompts.issued) and waiting <= {run.prompts.issued[-1]}
    counted = {reason: len(keys) for reason, keys in buffer.given_back.items()}
    assert buffer.dropped == {"stale": 0} | counted
    assert (buffer.admitted, buffer.trained) == (len(ends), len(trained))


@pytest.fixture
def loop_world(monkeypatch, tmp_path) -> SimpleNamespace:
    return stub_world(monkeypatch, tmp_path)


def stub_world(
    monkeypatch: pytest.MonkeyPatch, folder: Path, engine_class: type[StubEngine] = StubEngine
) -> SimpleNamespace:
    """What the stubs do, and `build(*overrides)`: a run around them."""
    engines: dict[str, StubEngine] = {}
    world = SimpleNamespace(
        engines=engines, learners=[], plans=[], start_s=0.01, learn_s=0.005, send_s=0.002,
        sample_s=lambda prompt, index: 0.002, at_once=1000, sending=False, num_sends=0, saved=None,
        too_long=set(), poison=set(), flat=set(), skip=set(), send_errors=[], score_errors=[],
        reload_noise={}, probe_gap=0.0, logprob_gap=0.0, held_value=-2.0, held_name="mixer.0.A",
        reload_shift=0.0,
        commit_s={}, damage={},
        missed=[],  # per meeting, who does not come
        free={"CPU": 99.0}, control=ControlFolder(folder), account=account,
    )  # fmt: skip

    def start_actor(name: str, *_: Any) -> tuple[Any, Any]:
        engines[name] = engine_class(name, world)
        return engines[name], engines[name].start.remote()

    async def close_actors(actors: list[StubEngine]) -> None:
        for actor in actors:
            actor.kill()

    monkeypatch.setattr("actors.engines.start_actor", start_actor)
    monkeypatch.setattr("actors.engines.kill_actor", lambda actor: actor.kill())
    monkeypatch.setattr("actors.engines.close_actors", close_actors)
    monkeypatch.setattr("cluster.grpo_loop.sample_rows", _no_rows)

    async def build(*overrides: str, probe: bool = False) -> GRPORun:
        from actors.rollout_pool import RolloutPool

        small = ("grpo.prompts_per_step=4", "grpo.samples_per_prompt=2", "grpo.steps=6")
        config = load_run(RUN, (*small, *overrides))
        grpo = config.grpo
        rollouts = await RolloutPool.start(
            config.rollout, config.weights, model_folder="m", seed=0, initial_version="0",
            run_name="r", start_timeout_s=5,
        )  # fmt: skip
        learners = itertools.count()

        async def start_learner(initial_version: int = 0) -> StubLearner:
            await asyncio.sleep(world.start_s if next(learners) else 0)
            return StubLearner(world, initial_version)

        learner = await LearnerService.start(start_learner, folder)
        rewards, tracker, prompts = StubRewards(world), Tracker(), Prompts()
        buffer = Ledger(
            prompts_per_step=grpo.prompts_per_step, max_staleness=grpo.max_staleness,
            max_backfill=grpo.max_backfill, generation_cache=grpo.generation_cache,
        )  # fmt: skip
        return GRPORun(
            config=config, learner=learner, rollouts=rollouts, rewards=rewards, prompts=prompts,
            buffer=buffer,
            weights=WeightSync(
                learner, rollouts, MANIFEST,
                probe=Prompts().next() if probe else None, probe_limit=1e-3,
            ),
            tracker=tracker,
            scaling=Scaling(
                config, world.control, rollouts=rollouts, rewards=rewards, tracker=tracker,
                free=lambda: world.free, wave=buffer.max_staleness + 1,
            ),
        )  # fmt: skip

    world.build = build
    return world


async def _no_rows(groups: Any) -> list[Any]:
    return []


@pytest.fixture
def live_run() -> Iterator[Callable[[list[str]], Live]]:
    """Starts commands in the background; whatever a test leaves of them is killed."""
    started: list[Live] = []
    yield lambda command: started.append(Live(command)) or started[-1]
    for live in started:
        live.kill_all()
