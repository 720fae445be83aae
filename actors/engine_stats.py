"""What an engine reports of itself, kept as the last gauges and running totals."""

from __future__ import annotations

from typing import Any


def stats_recorder() -> tuple[dict[str, float], Any]:
    """(numbers, factory): vLLM builds a logger with the factory, which keeps the numbers fresh."""
    from vllm.v1.metrics.loggers import StatLoggerBase

    numbers = dict.fromkeys(
        ("running", "waiting", "kv_usage", "tokens", "prefill_tokens", "preemptions"), 0.0
    )

    class Recorder(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            pass

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any
        ) -> None:
            if scheduler_stats is not None:
                numbers["running"] = float(scheduler_stats.num_running_reqs)
                numbers["waiting"] = float(scheduler_stats.num_waiting_reqs)
                numbers["kv_usage"] = float(scheduler_stats.kv_cache_usage)
            if iteration_stats is not None:
                numbers["tokens"] += iteration_stats.num_generation_tokens
                numbers["prefill_tokens"] += iteration_stats.num_prompt_tokens
                numbers["preemptions"] += iteration_stats.num_preempted_reqs

        def log_engine_initialized(self) -> None:
            pass

    return numbers, Recorder
