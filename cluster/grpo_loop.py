"""The GRPO loop: prompts -> rollouts -> verdicts -> slots -> learner -> weights, on one screen.

Invariant: asynchrony is bounded by the buffer's slots alone; `max_staleness: 0` is the same loop.
The step loop is the only finite one: a producer that returns or raises ends the run.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from actors.sampling_guard import rl_sampling
from cluster.sample_table import sample_rows
from cluster.weight_sync import WeightSync
from h1r_rl.config.schema import RunConfig
from h1r_rl.data.prompt_stream import PromptStream
from h1r_rl.errors import RolloutLost, RunFailed
from h1r_rl.grpo.advantages import has_signal
from h1r_rl.grpo.build_batch import plan_train_batch
from h1r_rl.grpo.group_buffer import GroupBuffer
from h1r_rl.grpo.tripwires import Tripwires
from h1r_rl.records import Group, Prompt, Sample
from rewards.controls import shuffle_scores

MAX_EMPTY_STEPS = 10
MAX_ENGINES_KILLED = 2  # a prompt that takes this many engines down is quarantined


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
    counts: Counter[str] = field(default_factory=Counter)
    recent: list[tuple[Group, float]] = field(default_factory=list)  # finished since last step


async def train_grpo(run: GRPORun) -> None:
    """Run `grpo.steps` optimizer steps; returns with the engines holding the last version."""
    grpo, learner = run.config.grpo, run.config.learner
    assert grpo is not None
    version = empty = 0
    tripwires = Tripwires(grpo, run.config.rollout, learner)
    async with asyncio.TaskGroup() as tasks:
        producer = tasks.create_task(_produce(run, tasks))
        step = 0
        while step < grpo.steps:
            started = time.monotonic()
            groups = await run.buffer.take_step(version)
            waited_s = time.monotonic() - started
            if not groups:
                empty += 1
                _give_up_without_signal(run, empty)
                continue
            empty = 0
            trained = _controlled(groups, run.config, step)
            plan = plan_train_batch(
                trained,
                grpo.algorithm,
                ranks=learner.ranks,
                micro_batch_tokens=learner.micro_batch_tokens,
                learner_version=version,
                max_staleness=grpo.max_staleness,
            )
            metrics = await run.learner.forward_backward(plan)
            tripwires.before_update(step, metrics)
            await run.weights.sent()  # `version` has left the tensors
            result = await run.learner.optimizer_step()
            keys = [group.key for group in groups]
            if result.skipped:
                await run.buffer.drop(keys, "skipped_step")
            else:
                version = result.version
                run.weights.publish(version, then=lambda keys=keys: run.buffer.release(keys))
            learner_metrics = {f"learner/{k}": v for k, v in (metrics | result.metrics).items()}
            step_metrics = learner_metrics | await _step_metrics(run, groups, version)
            step_metrics |= {"time/step_s": time.monotonic() - started, "time/wait_s": waited_s}
            step_metrics |= tripwires.after_step(step, step_metrics)
            run.tracker.log_step(step, step_metrics)
            if step % grpo.log_samples_every == 0:
                run.tracker.log_table(f"samples-{step:05d}", await sample_rows(groups))
            step += 1
        await run.weights.sent()
        producer.cancel()


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
    engine still owed are issued again under the same slot."""
    grpo, rollout = run.config.grpo, run.config.rollout
    assert grpo is not None
    sampling = rl_sampling(rollout)
    started = time.monotonic()
    missing = set(range(grpo.samples_per_prompt))
    judging: list[asyncio.Task[list[Sample]]] = []
    engines_killed = 0
    async with asyncio.TaskGroup() as judges:
        while missing:
            try:
                async for part in run.rollouts.generate(prompt, sorted(missing), sampling):
                    missing -= set(part.sample_indices)
                    judging.append(judges.create_task(_judge(run, prompt, part)))
            except RolloutLost:
                run.counts["engines_lost"] += 1
                engines_killed += 1
                if engines_killed >= MAX_ENGINES_KILLED:
                    await run.buffer.drop([prompt.key], "quarantined")
                    return
    samples = sorted((s for task in judging for s in task.result()), key=lambda s: s.sample_index)
    group = Group(prompt, tuple(samples), run.buffer.admitted_version(prompt.key))
    run.recent.append((group, time.monotonic() - started))
    if has_signal(group.scores()):
        await run.buffer.add(group)
    else:
        await run.buffer.drop([group.key], "no_signal")


async def _judge(run: GRPORun, prompt: Prompt, part: Any) -> list[Sample]:
    verdicts = await run.rewards.score(prompt, part)
    return [
        Sample(
            sample_index=index,
            length=part.lengths[position],
            finish_reason=part.finish_reasons[position],
            version_spans=part.version_spans[position],
            verdict=verdicts[position],
            completions_ref=part.completions_ref,
            position=position,
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


async def _step_metrics(run: GRPORun, groups: list[Group], version: int) -> dict[str, float]:
    """What was rolled out since the last step, what is trained on now, and the services' state."""
    finished, run.recent = run.recent, []
    metrics: dict[str, float] = {}
    samples = [sample for group, _ in finished for sample in group.samples]
    if samples:
        lengths = np.array([s.length for s in samples])
        metrics |= {
            "rollout/length_mean": float(lengths.mean()),
            "rollout/length_max": float(lengths.max()),
            "rollout/truncated": float(np.mean([s.finish_reason == "length" for s in samples])),
            "rollout/group_s": float(np.mean([seconds for _, seconds in finished])),
            "reward/zero_signal_groups": float(
                np.mean([not has_signal(group.scores()) for group, _ in finished])
            ),
            "reward/without_verdict": float(np.mean([s.verdict.score is None for s in samples])),
        }
        scores = np.array([s.verdict.score for s in samples if s.verdict.score is not None])
        if len(scores):
            spread = np.mean([np.nanstd(group.scores()) for group, _ in finished])
            metrics |= {"reward/mean": float(scores.mean()), "reward/spread": float(spread)}
        for verifier in sorted({group.prompt.verifier for group, _ in finished}):
            judged = [g.scores() for g, _ in finished if g.prompt.verifier == verifier]
            known = [score for scores in judged for score in scores if not np.isnan(score)]
            if known:
                metrics[f"reward/source/{verifier}"] = float(np.mean(known))
        for part in sorted({name for s in samples for name in s.verdict.parts}):
            values = [s.verdict.parts[part] for s in samples if part in s.verdict.parts]
            metrics[f"reward/{part}"] = float(np.mean(values))
    ages = [version - 1 - sample.min_version for group in groups for sample in group.samples]
    metrics |= {
        "rollout/staleness_mean": float(np.mean(ages)),
        "rollout/staleness_max": float(np.max(ages)),
        "rollout/groups_trained": float(len(groups)),
    }
    metrics |= {f"buffer/{k}": v for k, v in run.buffer.metrics().items()}
    metrics |= run.weights.metrics | run.rewards.stats()
    metrics |= {f"engine/{k}": v for k, v in (await run.rollouts.stats()).items()}
    return metrics | {f"faults/{name}": float(n) for name, n in run.counts.items()}
