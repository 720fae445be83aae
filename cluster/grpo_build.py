"""The GRPO loop's parts put together around services that are up."""

from __future__ import annotations

from typing import Any

from cluster.grpo_loop import GRPORun
from cluster.run_folder import RunFolder
from cluster.scale import ControlFolder, Scaling
from cluster.weight_sync import WeightSync
from h1r_rl.config.schema import RunConfig
from h1r_rl.data.prompt_stream import PromptStream
from h1r_rl.grpo.group_buffer import GroupBuffer
from h1r_rl.grpo.tripwires import reload_limit
from h1r_rl.tracking import Tracker


async def build_run(
    config: RunConfig,
    folder: RunFolder,
    prompts: PromptStream,
    tracker: Tracker,
    learner: Any,
    rollouts: Any,
    rewards: Any,
) -> GRPORun:
    import ray

    grpo = config.grpo
    assert grpo is not None
    for name, facts in (await rollouts.facts()).items():
        tracker.set_tag(f"engine.{name}", str(facts))
    buffer = GroupBuffer(
        prompts_per_step=grpo.prompts_per_step,
        max_staleness=grpo.max_staleness,
        max_backfill=grpo.max_backfill,
        generation_cache=grpo.generation_cache,
    )
    return GRPORun(
        config=config,
        learner=learner,
        rollouts=rollouts,
        rewards=rewards,
        prompts=prompts,
        buffer=buffer,
        weights=WeightSync(
            learner,
            rollouts,
            await learner.weight_manifest(),
            overlap=config.learner.zero_stage < 3,
            probe=prompts.first(),
            probe_limit=reload_limit(config.rollout),
        ),
        tracker=tracker,
        scaling=Scaling(
            config,
            ControlFolder(folder.path),
            rollouts=rollouts,
            rewards=rewards,
            tracker=tracker,
            free=ray.available_resources,
            wave=buffer.max_staleness + 1,
        ),
    )
