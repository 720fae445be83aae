"""What asynchrony is worth where lengths have a long tail: the real run loop, pool, buffer and
weight conversation around engines and a learner that sleep for as long as their work would take.

One sample in 16 is eight times as long as the others; a group has 8 samples, a step 8 groups; the
learner takes as long for a step as the engines take for one of its own; staleness 2 against 0.
Engines batch: a sample takes its length, however many run beside it. What sleeps shares no core, so
this measures the schedule alone.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "cluster")]
STEPS, WARM_UP = 40, 5
SAMPLE_S = 0.1
LONG, TIMES = 1 / 16, 8
LEARN_S = SAMPLE_S * TIMES  # a synchronous step of 64 samples all but always has a long one
REPEATS = 2


def engine_class() -> Any:
    from conftest import StubEngine, _done

    from h1r_rl.records import GroupPart, VersionSpan

    class Batching(StubEngine):
        """All samples of a group at once; each is its own part when it is finished."""

        async def _generate(self, prompt: Any, indices: Any, sampling: Any) -> Any:
            async def sample(index: int) -> int:
                await self._alive(seconds=self.world.sample_s(prompt, index))
                return index

            first = self.holds
            tasks = [asyncio.create_task(sample(i)) for i in indices]
            try:
                for finished in asyncio.as_completed(tasks):
                    index = await finished
                    spans = (VersionSpan(first, 0, 2), VersionSpan(self.holds, 2, 4))
                    part = GroupPart((index,), (4,), ("stop",), (spans,), (0.5,), self.name, 0.0)
                    yield await _done(part)
                    yield await _done([None])
            finally:
                for task in tasks:
                    task.cancel()

    return Batching


def sample_s(prompt: Any, index: int) -> float:
    rng = np.random.default_rng((int(prompt.prompt_id[1:]), index))
    return SAMPLE_S * (TIMES if rng.random() < LONG else 1)


async def run(staleness: int) -> tuple[float, float, float]:
    """(seconds a step, the learner's bubble, groups dropped as stale) after the warm-up."""
    from conftest import stub_world

    from cluster.grpo_loop import train_grpo

    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        world = stub_world(patch, Path(folder), engine_class())
        world.sample_s, world.learn_s, world.send_s = sample_s, LEARN_S, 0.005
        built = await world.build(
            f"grpo.max_staleness={staleness}", f"grpo.steps={STEPS}", "grpo.prompts_per_step=8",
            "grpo.samples_per_prompt=8",
        )  # fmt: skip
        times: list[float] = []
        log = built.tracker.log_step

        def log_step(step: int, metrics: dict[str, float]) -> None:
            times.append(time.perf_counter())
            log(step, metrics)

        built.tracker.log_step = log_step
        await train_grpo(built)
        await built.rollouts.close()
        step_s = (times[-1] - times[WARM_UP]) / (len(times) - 1 - WARM_UP)
        waited = sum(step["time/wait_s"] for step in built.tracker.steps[WARM_UP + 1 :])
        return step_s, waited / (times[-1] - times[WARM_UP]), built.buffer.dropped["stale"]


def main() -> None:
    from results_file import metric, write_results

    runs: dict[int, list[tuple[float, float, float]]] = {0: [], 2: []}
    for _ in range(REPEATS):
        for staleness in runs:
            runs[staleness].append(asyncio.run(run(staleness)))
    synchronous, asynchronous = min(runs[0]), min(runs[2])
    speedup, bubble = synchronous[0] / asynchronous[0], asynchronous[1]
    assert asynchronous[2] == 0
    what = (
        f"engines and learner sleep; {synchronous[0]:.2f} s a step at staleness 0, "
        f"{asynchronous[0]:.2f} s at 2, the learner's own {LEARN_S:.2f} s; none dropped as stale"
    )
    write_results(
        "rollouts_loop",
        [
            metric("async_speedup_long_tail", speedup, "ratio", ">= 1.3", speedup >= 1.3, what),
            metric("bubble_long_tail", bubble, "share", "<= 0.10", bubble <= 0.1,
                   f"the learner's wait for groups; {synchronous[1]:.2f} at staleness 0"),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
