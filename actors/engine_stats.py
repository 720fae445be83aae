"""What an engine reports of itself, kept as the last gauges and running totals."""

from __future__ import annotations

import time
from typing import Any

GAUGES = ("running", "waiting", "kv_usage")  # the rest are totals since the start
TOTALS = ("tokens", "prefill_tokens", "cached_tokens", "reprefilled", "preemptions", "busy_s")


def stats_recorder() -> tuple[dict[str, float], Any]:
    """(numbers, factory): vLLM builds a logger with the factory, which keeps the numbers fresh.

    `kv_usage` is the share of blocks in use; a hybrid's KV blocks and Mamba states share them.
    `busy_s`: time with requests to work on, from one iteration's end to the next's (what vLLM times
    of an iteration depends on the executor).
    `reprefilled`: a decoding request is scheduled for one token an iteration; what it is scheduled
    for beyond that was computed before, and lost to a preemption or a recomputation.
    """
    from vllm.v1.metrics.loggers import StatLoggerBase

    numbers = dict.fromkeys(GAUGES + TOTALS, 0.0)

    class Recorder(StatLoggerBase):
        def __init__(self, vllm_config: Any, engine_index: int = 0) -> None:
            self._busy_since: float | None = None

        def record(
            self, scheduler_stats: Any, iteration_stats: Any, *args: Any, **kwargs: Any
        ) -> None:
            if scheduler_stats is not None:
                now = time.monotonic()
                if self._busy_since is not None:
                    numbers["busy_s"] += now - self._busy_since
                has_requests = scheduler_stats.num_running_reqs or scheduler_stats.num_waiting_reqs
                self._busy_since = now if has_requests else None
                numbers["running"] = float(scheduler_stats.num_running_reqs)
                numbers["waiting"] = float(scheduler_stats.num_waiting_reqs)
                numbers["kv_usage"] = float(scheduler_stats.kv_cache_usage)
                details = scheduler_stats.iteration_details
                if details is not None:
                    again = details.num_generation_tokens - details.num_generation_requests
                    numbers["reprefilled"] += max(again, 0)
            if iteration_stats is not None:
                numbers["tokens"] += iteration_stats.num_generation_tokens
                numbers["prefill_tokens"] += iteration_stats.prompt_token_stats.computed
                numbers["cached_tokens"] += iteration_stats.prompt_token_stats.cached_tokens
                numbers["preemptions"] += iteration_stats.num_preempted_reqs

        def log_engine_initialized(self) -> None:
            pass

    return numbers, Recorder
