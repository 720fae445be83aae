"""The GRPO loop: prompts -> rollouts -> verdicts -> slots -> learner -> weights, on one screen.

Invariant: asynchrony is bounded by the buffer's slots alone; `max_staleness: 0` is the same loop.
The step loop is the only finite one: a producer that returns or raises ends the run.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from actors.sampling_guard import rl_sampling
from cluster.agreement import probe_gap, values_agree
from cluster.sample_table import sample_rows
from cluster.scale import Scaling
from cluster.step_metrics import (
    EngineMeter,
    advantage_metrics,
    finished_metrics,
    one_line,
    trained_metrics,
)
from cluster.weight_sync import WeightSync
from h1r_rl.config.schema import RunConfig
from h1r_rl.data.prompt_stream import PromptStream
from h1r_rl.errors import DataError, RolloutLost, RunFailed
from h1r_rl.grpo.advantages import has_signal
from h1r_rl.grpo.build_batch import plan_train_batch, trained_scores
from h1r_rl.grpo.group_buffer import GroupBuffer
from h1r_rl.grpo.tripwires import Tripwires
from h1r_rl.records import Group, Prompt, Sample
from rewards.controls import shuffle_scores

logger = logging.getLogger(__name__)

MAX_EMPTY_STEPS = 10
CHECKED_STEPS = 2  # the weights as loaded, and as they came with the first transfer
SUSPECT = 2  # a prompt aboard this many engines that died is tried alone among such prompts
MAX_QUARANTINED = 100  # in a row, without a group finished between them


@dataclass
class GRPORun:
    """What the loop works on; built by the stage, closed by it."""

    config: RunConfig
    learner: Any
    rollouts: Any
    rewards: Any
    prompts: PromptStream
    buffer: GroupBuffer
    weights: WeightSync
    tracker: Any
    scaling: Scaling | None = None
    counts: Counter[str] = field(default_factory=Counter)
    trial: asyncio.Lock = field(default_factory=asyncio.Lock)  # one suspect at a time
    quarantined_in_a_row: int = 0
    meter: EngineMeter = field(default_factory=EngineMeter)
    recent: list[tuple[Group, float]] = field(default_factory=list)  # finished since last step


async def train_grpo(run: GRPORun) -> None:
    """Run `grpo.steps` optimizer steps; returns with the engines holding the last version."""
    grpo, learner = run.config.grpo, run.config.learner
    assert grpo is not None
    version = empty = 0
    tripwires = Tripwires(grpo, run.config.rollout, learner)
    async with asyncio.TaskGroup() as tasks:
        endless = [tasks.create_task(_produce(run, tasks)), tasks.create_task(run.weights.serve())]
        step, started = 0, time.monotonic()
        while step < grpo.steps:
            await _take_requests(run, step, version)
            groups = await run.buffer.take_step(version)
            waited_s = time.monotonic() - started  # with steps before it that found no group
            if not groups:
                empty += 1
                _give_up_without_signal(run, empty)
                continue
            empty = 0
            plan = plan_train_batch(
                _controlled(groups, run.config, step),
                grpo.algorithm,
                ranks=learner.ranks,
                micro_batch_tokens=learner.micro_batch_tokens,
                learner_version=version,
                max_staleness=run.buffer.max_staleness,
            )
            held_up = Stopwatch()
            with held_up:
                await run.weights.before_forward()
            metrics = await run.learner.forward_backward(plan)
            with held_up:
                await run.weights.sent()  # engines hold `version` as well now
            metrics |= await probe_gap(run.weights, run.learner)
            if step < CHECKED_STEPS:
                await values_agree(
                    step, run.rollouts, run.learner, run.config.rollout.tensor_parallel
                )
            tripwires.before_update(step, metrics)
            result = await run.learner.optimizer_step()
            keys = [group.key for group in groups]
            if result.skipped:
                await run.buffer.drop(keys, "skipped_step")
                run.weights.unchanged()
            else:
                run.weights.publish(result.version, then=lambda k=keys: run.buffer.release(k))
            metrics = {f"learner/{k}": v for k, v in (metrics | result.metrics).items()}
            metrics |= trained_metrics(groups, version, run.buffer.max_staleness)
            metrics |= advantage_metrics(plan, grpo.algorithm)
            metrics |= await _service_metrics(run)
            now = time.monotonic()
            metrics |= {"time/step_s": now - started, "time/wait_s": waited_s}
            metrics["time/transfer_wait_s"] = held_up.seconds
            metrics["learner/bubble"] = (waited_s + held_up.seconds) / (now - started)
            started = now
            if run.scaling is not None:
                run.scaling.after_step(metrics)
            metrics |= tripwires.after_step(step, metrics)
            run.tracker.log_step(step, metrics)
            logger.info(one_line(step, metrics))
            if step % grpo.log_samples_every == 0:
                run.tracker.log_table(f"samples-{step:05d}", await sample_rows(groups))
            version = result.version
            step += 1
        await run.weights.sent()
        for task in endless:
            task.cancel()


class Stopwatch:
    """Seconds spent inside its `with` blocks."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds += time.monotonic() - self._started


async def _produce(run: GRPORun, tasks: asyncio.TaskGroup) -> None:
    """Consumes prompts, waits for slots; starts a task for every admitted group. Endless."""
    running: set[asyncio.Task[None]] = set()
    try:
        while True:
            prompt = run.prompts.next()
            await run.buffer.admit(prompt.key, lambda: run.weights.engine_version)
            task = tasks.create_task(_roll_out(run, prompt))
            running.add(task)
            task.add_done_callback(running.discard)
    finally:
        for task in running:
            task.cancel()


async def _roll_out(run: GRPORun, prompt: Prompt) -> None:
    """One group: generated, judged as samples finish, handed to the buffer. Samples that a lost
    engine still owed are issued again under the same slot. Groups that were aboard two engines that
    died are tried one at a time, so that of all who were aboard the guilty one is quarantined."""
    grpo, rollout = run.config.grpo, run.config.rollout
    assert grpo is not None
    sampling = rl_sampling(rollout)
    started = time.monotonic()
    samples: dict[int, Sample] = {}
    engines_killed = 0
    async with asyncio.TaskGroup() as judges:
        while missing := [i for i in range(grpo.samples_per_prompt) if i not in samples]:
            judging: list[asyncio.Task[list[Sample]]] = []
            on_trial = engines_killed >= SUSPECT
            try:
                async with run.trial if on_trial else nullcontext():
                    async for part in run.rollouts.generate(prompt, missing, sampling):
                        judging.append(judges.create_task(_judge(run, prompt, part)))
            except RolloutLost as error:
                run.counts["engines_left" if error.planned else "engines_lost"] += 1
                engines_killed += not error.planned
                logger.warning("%s: %d samples issued again: %s", prompt.key, len(missing), error)
            except DataError as error:
                await _quarantine(run, prompt, str(error))
                return
            for task in judging:
                samples |= {sample.sample_index: sample for sample in await task}
            if engines_killed > SUSPECT:
                await _quarantine(run, prompt, f"{engines_killed} engines died of it, one on trial")
                return
    ordered = tuple(samples[i] for i in sorted(samples))
    group = Group(prompt, ordered, run.buffer.admitted_version(prompt.key))
    run.recent.append((group, time.monotonic() - started))
    run.quarantined_in_a_row = 0
    if has_signal(trained_scores(group, grpo.algorithm)):
        await run.buffer.add(group)
    else:
        await run.buffer.drop([group.key], "no_signal")


async def _quarantine(run: GRPORun, prompt: Prompt, cause: str) -> None:
    """The prompt is out of this run, counted and told; its slot goes to another one."""
    run.counts["quarantined"] += 1
    run.quarantined_in_a_row += 1
    logger.warning("prompt %s is quarantined: %s", prompt.key, cause)
    if run.quarantined_in_a_row >= MAX_QUARANTINED:
        raise RunFailed(f"{MAX_QUARANTINED} prompts in a row were quarantined; the last: {cause}")
    await run.buffer.drop([prompt.key], "quarantined")


async def _judge(run: GRPORun, prompt: Prompt, part: Any) -> list[Sample]:
    """Samples with their verdicts; none where the completions themselves are gone with the node
    that held them: they are generated again."""
    try:
        verdicts = await run.rewards.score(prompt, part)
    except RolloutLost as error:
        run.counts["completions_lost"] += 1
        logger.warning("%s: %s", prompt.key, error)
        return []
    return [
        Sample(
            sample_index=index,
            length=part.lengths[position],
            finish_reason=part.finish_reasons[position],
            version_spans=part.version_spans[position],
            verdict=verdicts[position],
            completions_ref=part.completions_ref,
            position=position,
            engine=part.engine,
        )
        for position, index in enumerate(part.sample_indices)
    ]


def _controlled(groups: list[Group], config: RunConfig, step: int) -> list[Group]:
    """The groups as trained on: unchanged, or with the step's scores shuffled (control)."""
    if config.reward.control != "shuffled":
        return groups
    rng = np.random.default_rng((config.seed, step))
    shuffled = shuffle_scores([group.scores() for group in groups], rng)
    return [
        replace(
            group,
            samples=tuple(
                replace(s, verdict=replace(s.verdict, score=None if np.isnan(x) else float(x)))
                for s, x in zip(group.samples, scores, strict=True)
            ),
        )
        for group, scores in zip(groups, shuffled, strict=True)
    ]


def _give_up_without_signal(run: GRPORun, empty: int) -> None:
    if empty < MAX_EMPTY_STEPS:
        return
    means = [float(np.nanmean(group.scores())) for group, _ in run.recent[-64:]]
    raise RunFailed(
        f"{empty} steps in a row found no group whose samples differ in reward (mean reward of "
        f"the last groups: {np.mean(means) if means else float('nan'):.2f}); nothing can be "
        "learned from them. Look at the sample tables: a reward of 0 everywhere means a task too "
        "hard, answers cut off or a broken verifier; 1 everywhere a task already solved"
    )


async def _take_requests(run: GRPORun, step: int, version: int) -> None:
    """Between two steps: what `h1r scale` and `h1r restart` ask for begins here."""

    async def restart_learner() -> None:
        await run.weights.sent()
        await run.learner.restart(version)
        run.weights.new_epoch()
        run.weights.unchanged()

    if run.scaling is not None:
        await run.scaling.at_boundary(step, restart_learner)


async def _service_metrics(run: GRPORun) -> dict[str, float]:
    """What was rolled out since the last step, and the services' state."""
    finished, run.recent = run.recent, []
    assert run.config.grpo is not None
    metrics = finished_metrics(finished, run.config.grpo.algorithm)
    metrics |= {f"buffer/{k}": v for k, v in run.buffer.metrics().items()}
    metrics |= run.weights.metrics | run.rewards.stats()
    metrics |= run.meter.read(await run.rollouts.engine_stats())
    metrics |= {f"engine/{k}": v for k, v in run.rollouts.counts().items()}
    return metrics | {f"faults/{name}": float(n) for name, n in run.counts.items()}
