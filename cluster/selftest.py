"""`h1r selftest`: may engine and learner be trusted with this model?

Invariant: one engine start; the learner's own lines run while the engine comes up; every line is
judged, whatever the ones before it said. The line that moves the weights comes last.
"""

from __future__ import annotations

import asyncio
import logging
import os
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from h1r_rl.config.schema import GRPOConfig, LearnerConfig, RolloutConfig
from h1r_rl.errors import ConfigError, RunFailed

MAX_CONTEXT = 16_384  # enough for two cached blocks of the largest Falcon-H1
ANSWER_TOKENS = 64
START_TIMEOUT_S = 600.0


@dataclass(frozen=True)
class Options:
    folder: Path
    dtype: str = "float32"
    ssm_dtype: str = "float32"
    autocast: str | None = None  # None: as the engine's dtype
    device: str = "auto"
    threads: int = 1
    gpu_memory: float = 0.4
    gap_limit: float | None = None
    seed: int = 0
    trust_remote_code: bool = False


def selftest(options: Options, say: Callable[[str], None]) -> bool:
    """Say a line for each check; True when none failed. DataError for a folder that is no model."""
    from h1r_rl.hybrid.model_folder import refuse_no_model, refuse_other_families

    started = time.monotonic()
    refuse_no_model(options.folder)
    refuse_other_families(options.folder)
    import ray
    import torch

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    device = _device(options.device)
    torch.set_num_threads(options.threads)
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        log_to_driver=False,
        logging_level="error",
    )
    try:
        failed = asyncio.run(_selftest(options, device, say))
    finally:
        ray.shutdown()
    seconds = f"{time.monotonic() - started:.0f} s in all"
    say(
        f"{failed} lines failed, {seconds}; docs/selftest.md"
        if failed
        else f"no line failed, {seconds}"
    )
    return not failed


async def _selftest(options: Options, device: str, say: Callable[[str], None]) -> int:
    """Says each line as it is known; how many failed."""
    from cluster.selftest_lines import Line

    failed = 0
    with tempfile.TemporaryDirectory(prefix="h1r-selftest-") as scratch:
        async for line in _lines(options, device, Path(scratch)):
            assert isinstance(line, Line)
            word = {True: "pass", False: "FAIL", None: "n/a "}[line.passed]
            say(f"{word}  {line.name}: {line.figures}")
            failed += line.passed is False
    return failed


async def _lines(options: Options, device: str, scratch: Path) -> AsyncIterator[Any]:
    """Each line as it is known."""
    import numpy as np

    from cluster import selftest_lines as lines
    from cluster.selftest_engine import PoolEngine
    from cluster.selftest_export import EXPORT, export_round_trip
    from cluster.selftest_learner import LocalLearner
    from h1r_rl.grpo.tripwires import gap_bounds

    autocast = options.autocast or ("bfloat16" if options.dtype == "bfloat16" else "none")
    rng = np.random.default_rng(options.seed)
    learner = await asyncio.to_thread(
        LocalLearner,
        options.folder,
        engine_dtype=options.dtype,
        autocast=autocast,
        device=device,
        trust_remote_code=options.trust_remote_code,
    )
    rollout = _rollout(options, device, learner.context)
    bounds = gap_bounds(
        GRPOConfig(steps=1), rollout, LearnerConfig.model_validate({"autocast": autocast})
    )
    limit = options.gap_limit or bounds[0]
    starting = asyncio.create_task(
        PoolEngine.start(
            rollout,
            folder=str(options.folder),
            seed=options.seed,
            start_timeout_s=START_TIMEOUT_S,
            trust_remote_code=options.trust_remote_code,
        )
    )
    try:
        own = asyncio.to_thread  # beside the engine's start
        yield await _judged(lines.LEAK, own(lines.packing_leak, learner, rng))
        exported = own(export_round_trip, learner, options.folder, scratch)
        yield await _judged(EXPORT, exported)
        engine = await starting
        tokens = min(ANSWER_TOKENS, rollout.max_model_len // 4)
        traces = await lines.sampled(engine, learner, rng, tokens)
        room = rollout.max_model_len
        for name, line in (
            (lines.FLOOR, lines.logprob_floor(engine, learner, traces, limit)),
            (lines.VALUES, lines.tensor_values(engine, learner)),
            (lines.MULTIPLIERS, own(lines.multipliers_alive, learner, traces)),
            (lines.RELOAD, lines.identical_reload(engine, learner, rng, tokens)),
            (lines.STALE, lines.stale_prefix(engine, learner, rng, limit, room)),
        ):
            yield await _judged(name, line)
    finally:
        starting.cancel()
        (started,) = await asyncio.gather(starting, return_exceptions=True)
        if isinstance(started, PoolEngine):
            await started.close()


async def _judged(name: str, line: Awaitable[Any]) -> Any:
    """The line; one that breaks off has failed, and the next ones are still judged."""
    from cluster.selftest_lines import Line

    try:
        return await line
    except Exception as error:
        return Line(name, False, f"broke off: {type(error).__name__}: {error}")


def _rollout(options: Options, device: str, context: int) -> RolloutConfig:
    """One engine with room for two cached blocks; eager, so that nothing is compiled first."""
    return RolloutConfig.model_validate(
        {
            "max_response_tokens": ANSWER_TOKENS,
            "max_model_len": min(context, MAX_CONTEXT),
            "max_num_seqs": 16,
            "dtype": options.dtype,
            "mamba_ssm_cache_dtype": options.ssm_dtype,
            "prefix_caching": True,
            "enforce_eager": True,
            "kv_cache_gib": 1.0,
            "threads": options.threads,
            "num_gpus": 0.0 if device == "cpu" else 1.0,
            "gpu_memory_utilization": options.gpu_memory,
        }
    )


def _device(asked: str) -> str:
    import torch

    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise ConfigError("--device cuda: torch finds no CUDA device; use --device cpu")
    return asked


def run(options: Options, say: Callable[[str], None]) -> None:
    """The command: RunFailed (exit code 1) when a line failed."""
    if not selftest(options, say):
        raise RunFailed(f"{options.folder} did not pass the self-test")
