"""The stages of a run, each a process of its own on the cluster (a Ray job).

Invariant: a stage starts its services, does its work and closes them on every path out; its
outputs appear whole; its MLflow run ends FINISHED, FAILED or KILLED.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

from cluster.check_lengths import refuse_too_long
from cluster.grpo_build import build_run
from cluster.grpo_loop import train_grpo
from cluster.learner_service import LearnerService
from cluster.measure import Measurement, measure, write_outcomes
from cluster.run_folder import RunFolder, write_json
from cluster.splits import load_split
from h1r_rl.config.schema import RunConfig
from h1r_rl.data.chat import load_tokenizer, make_prompt
from h1r_rl.data.prompt_stream import PromptStream
from h1r_rl.data.sft_stream import SFTStream
from h1r_rl.evaluation.report import plot_grpo, read_metrics
from h1r_rl.grpo.build_batch import TrainPlan, plan_sft_batch
from h1r_rl.records import Group, Prompt, Sample, Verdict
from h1r_rl.tracking import Tracker

LOGGED_MODEL_BYTES = 64 * 2**20


async def run_sft(config: RunConfig, folder: RunFolder, parent_run_id: str | None) -> None:
    """Supervised fine-tuning from the base model to `sft-model`."""
    from learners.learner_group import LearnerGroup

    sft = config.sft
    assert sft is not None
    source = base_folder(config, folder)
    problems = load_split(config, folder.data, "sft")
    stream = SFTStream(
        problems.rows,
        load_tokenizer(source, trust_remote_code=config.model.trust_remote_code),
        system_prompt=config.model.system_prompt,
        seed=config.seed,
        max_length=sft.max_length,
        batch_size=sft.batch_size,
    )
    async with tracked(config, folder, "sft", parent_run_id) as tracker:
        async with services(
            LearnerGroup.start(
                config.learner,
                sft.optimizer,
                total_steps=sft.steps,
                model_folder=str(source),
                algorithm=None,
                temperature=1.0,
                max_response_tokens=sft.max_length,
                weights=config.weights,
                seed=config.seed,
                start_timeout_s=config.cluster.start_timeout_s,
                trust_remote_code=config.model.trust_remote_code,
                lora=config.model.lora,
            )
        ) as (learner,):
            following = _sft_plan(config, stream, 0)
            for step in range(sft.steps):
                computing = asyncio.ensure_future(learner.forward_backward(following))
                trimmed = stream.num_trimmed
                await asyncio.sleep(0)  # the step is on its way before the next one is made ready
                if step + 1 < sft.steps:
                    following = _sft_plan(config, stream, step + 1)
                metrics = await computing
                result = await learner.optimizer_step()
                tracker.log_step(
                    step,
                    {f"learner/{k}": v for k, v in (metrics | result.metrics).items()}
                    | {"data/trimmed": float(trimmed)},
                )
            await learner.export(str(folder.sft_model))


def _sft_plan(config: RunConfig, stream: SFTStream, step: int) -> TrainPlan:
    """The next traces, in the object store, as a plan."""
    import ray

    traces = stream.next()
    completions = ray.put([completion for _, completion in traces])
    return plan_sft_batch(
        [_as_group(p, c, i, completions) for i, (p, c) in enumerate(traces)],
        ranks=config.learner.ranks,
        micro_batch_tokens=config.learner.micro_batch_tokens,
        learner_version=step,
    )


async def run_grpo(config: RunConfig, folder: RunFolder, parent_run_id: str | None) -> None:
    """GRPO from the SFT model (or the base, where there is no SFT stage) to `model`."""
    from learners.learner_group import LearnerGroup
    from rewards.pool import RewardPool

    grpo = config.grpo
    assert grpo is not None
    source = folder.sft_model if config.sft else base_folder(config, folder)
    async with underway(start_rollouts(config, source, "0")) as engines:
        problems = load_split(config, folder.data, "rl")
        prompts = PromptStream(
            problems.rows,
            load_tokenizer(source, trust_remote_code=config.model.trust_remote_code),
            system_prompt=config.model.system_prompt,
            seed=config.seed,
            max_prompt_tokens=config.rollout.max_model_len - config.rollout.max_response_tokens,
        )
        timeout_s = config.cluster.start_timeout_s
        start_learner = partial(
            LearnerGroup.start,
            config.learner,
            grpo.optimizer,
            total_steps=grpo.steps,
            model_folder=str(source),
            algorithm=grpo.algorithm,
            temperature=config.rollout.temperature,
            max_response_tokens=config.rollout.max_response_tokens,
            weights=config.weights,
            seed=config.seed,
            start_timeout_s=timeout_s,
            trust_remote_code=config.model.trust_remote_code,
            engine_dtype=config.rollout.dtype,
            lora=config.model.lora,
        )
        async with tracked(config, folder, "grpo", parent_run_id) as tracker:
            async with services(
                LearnerService.start(start_learner, folder.path / "checkpoints"),
                engines,
                RewardPool.start(
                    config.reward,
                    config.rollout.max_response_tokens,
                    timeout_s,
                    verifiers=prompts.verifiers,
                ),
            ) as (learner, rollouts, rewards):
                run = await build_run(config, folder, prompts, tracker, learner, rollouts, rewards)
                try:
                    await train_grpo(run)
                finally:
                    await run.scaling.close()
                await learner.export(str(folder.model))
            records = [r for r in read_metrics(folder.metrics) if r["stage"] == "grpo"]
            plot_grpo(records, folder.path / "grpo.png")
            tracker.log_artifact(folder.path / "grpo.png")
            log_model(tracker, folder.model)


async def run_evaluation(
    config: RunConfig, folder: RunFolder, parent_run_id: str | None, *, name: str
) -> None:
    """Held-out accuracy of the model called `name` ("base", "sft" or "grpo")."""
    from rewards.pool import RewardPool

    source = {"base": base_folder(config, folder), "sft": folder.sft_model, "grpo": folder.model}
    async with underway(start_rollouts(config, source[name], "0")) as engines:
        tokenizer = load_tokenizer(source[name], trust_remote_code=config.model.trust_remote_code)
        held_out = {"evaluation": _held_out(config, folder, "evaluation", tokenizer)}
        if config.data.evaluation_code:
            held_out["evaluation_code"] = _held_out(config, folder, "evaluation_code", tokenizer)
        max_tokens = config.evaluation.max_response_tokens or config.rollout.max_response_tokens
        for split, prompts in held_out.items():
            refuse_too_long(prompts, config.rollout.max_model_len - max_tokens, split)
        reward = config.reward.model_copy(update={"control": "none"})
        async with tracked(config, folder, f"evaluate-{name}", parent_run_id) as tracker:
            async with services(
                engines,
                RewardPool.start(
                    reward,
                    max_tokens,
                    config.cluster.start_timeout_s,
                    verifiers=frozenset(p.verifier for split in held_out.values() for p in split),
                ),
            ) as (rollouts, rewards):
                measured: dict[str, dict[str, Measurement]] = {split: {} for split in held_out}
                for setting in config.evaluation_settings(name):
                    metrics: dict[str, float] = {}
                    for split, prompts in held_out.items():
                        result = await measure(setting, prompts, max_tokens, rollouts, rewards)
                        measured[split][setting.name] = result
                        key = setting.name if split == "evaluation" else f"code/{setting.name}"
                        metrics |= {f"{key}/{k}": v for k, v in result.summary().items()}
                        tracker.log_table(f"answers-{key.replace('/', '-')}", result.answers)
                    tracker.log_step(0, metrics)
            for split, results in measured.items():
                write_outcomes(results, folder.outcomes(name, split))
                summaries = {k: v.summary() for k, v in results.items()}
                write_json(folder.evaluation(name, split), summaries)


def _held_out(config: RunConfig, folder: RunFolder, split: str, tokenizer: Any) -> list[Prompt]:
    problems = load_split(config, folder.data, split).rows[: config.evaluation.limit]
    system_prompt = config.model.system_prompt
    return [make_prompt(tokenizer, problem, system_prompt=system_prompt) for problem in problems]


def base_folder(config: RunConfig, folder: RunFolder) -> Path:
    return config.model.path if config.model.path is not None else folder.base_model


def start_rollouts(config: RunConfig, model: Path, version: str) -> Awaitable[Any]:
    from actors.rollout_pool import RolloutPool

    return RolloutPool.start(
        config.rollout,
        config.weights,
        model_folder=str(model),
        seed=config.seed,
        initial_version=version,
        run_name=config.name,
        start_timeout_s=config.cluster.start_timeout_s,
        trust_remote_code=config.model.trust_remote_code,
    )


@asynccontextmanager
async def underway(start: Awaitable[Any]) -> AsyncIterator[asyncio.Future[Any]]:
    """A service that comes up beside what blocks this process next: half a minute of an engine's
    start, and the imports and the data that the stage needs meanwhile. Closed on every way out."""
    task = asyncio.ensure_future(start)
    await asyncio.sleep(0)  # its processes are asked for
    try:
        yield task
    finally:
        task.cancel()
        (outcome,) = await asyncio.gather(task, return_exceptions=True)
        if not isinstance(outcome, BaseException):
            await outcome.close()  # once more where `services` has closed it


@asynccontextmanager
async def services(*starts: Awaitable[Any]) -> AsyncIterator[list[Any]]:
    """Services started side by side and closed on every path out, also when one does not start."""
    tasks = [asyncio.ensure_future(start) for start in starts]
    try:
        await asyncio.gather(*tasks)
        yield [task.result() for task in tasks]
    finally:
        for task in tasks:
            task.cancel()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        up = [service for service in outcomes if not isinstance(service, BaseException)]
        await asyncio.gather(*(service.close() for service in up))


@asynccontextmanager
async def tracked(
    config: RunConfig, folder: RunFolder, stage: str, parent_run_id: str | None
) -> AsyncIterator[Tracker]:
    """An MLflow run that ends with the stage's own outcome."""
    tracker = Tracker.start(
        config.tracking,
        run_name=f"{config.name}/{stage}",
        folder=folder.path,
        stage=stage,
        parent_run_id=parent_run_id,
    )
    tracker.log_params(config.model_dump(mode="json"))
    try:
        yield tracker
    except asyncio.CancelledError:
        tracker.end("KILLED")
        raise
    except BaseException:
        tracker.end("FAILED")
        raise
    tracker.end("FINISHED")


def log_model(tracker: Tracker, folder: Path) -> None:
    """The final model: by its place always, its files too where they are small."""
    tracker.set_tag("model", str(folder.resolve()))
    if sum(f.stat().st_size for f in folder.iterdir()) <= LOGGED_MODEL_BYTES:
        for file in sorted(folder.iterdir()):
            tracker.log_artifact(file, under="model")


def _as_group(prompt: Prompt, completion: Any, position: int, ref: Any) -> Group:
    """A trace as a group of one sample, so that SFT and GRPO share plan and step."""
    sample = Sample(
        sample_index=0,
        length=len(completion.token_ids),
        finish_reason=completion.finish_reason,
        version_spans=completion.version_spans,
        verdict=Verdict(None),
        completions_ref=ref,
        position=position,
    )
    return Group(prompt, (sample,), 0)
