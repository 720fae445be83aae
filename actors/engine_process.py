"""One engine's Ray actor as the pool sees it: how it is started, what it owes, how it is ended."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

from actors.engine_args import engine_env
from h1r_rl.config.schema import RolloutConfig, WeightsConfig
from h1r_rl.deadlines import within

CLOSE_DEADLINE_S = 15.0


@dataclass(frozen=True)
class EngineStart:
    """What every engine of a pool starts from."""

    model_folder: str
    seed: int
    initial_version: str
    run_name: str
    start_timeout_s: float
    trust_remote_code: bool


@dataclass
class Member:
    actor: Any
    version: str  # label of the weights it holds
    ready: bool = False  # it has loaded its model
    leaving: bool = False  # drains, takes no new group
    in_flight: int = 0  # samples asked for and not delivered


def start_actor(
    name: str, index: int, config: RolloutConfig, weights: WeightsConfig, start: EngineStart
) -> tuple[Any, Any]:
    """(actor, reference that resolves once its engine is ready). A name and a seed of its own."""
    from actors.rollout_actor import RolloutActor

    actor = RolloutActor.options(
        num_cpus=config.num_cpus,
        num_gpus=config.num_gpus,
        runtime_env={"env_vars": engine_env(config)},
        max_restarts=0,
    ).remote(name, config, weights, start.run_name)
    ready = actor.start.remote(
        start.model_folder,
        seed=start.seed + index,
        run_seed=start.seed,
        version=start.initial_version,
        trust_remote_code=start.trust_remote_code,
    )
    return actor, ready


async def close_actors(actors: list[Any]) -> None:
    """Let engines end in order under one deadline, then make sure."""
    closing = [within(a.close.remote(), CLOSE_DEADLINE_S, "closing") for a in actors]
    await asyncio.gather(*closing, return_exceptions=True)
    for actor in actors:
        kill_actor(actor)


def kill_actor(actor: Any) -> None:
    """Its engine's processes end with it, whatever state they are in (`owner_watch`)."""
    import ray

    ray.kill(actor)


def cause_of(error: BaseException) -> str:
    """One line: the error that an actor raised rather than its traceback."""
    return " ".join(str(getattr(error, "cause", None) or error or repr(error)).split())[:1500]
