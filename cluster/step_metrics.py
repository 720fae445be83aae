"""What a step says of itself: rollouts finished, groups trained, services, and one line of it all.

Invariant: rates are differences of the services' running totals over the wall time between two
steps, so nothing is counted twice and nothing between steps is missed.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from h1r_rl.config.schema import AlgorithmConfig
from h1r_rl.grpo.advantages import has_signal
from h1r_rl.grpo.build_batch import TrainPlan, advantages_by_group, trained_scores
from h1r_rl.records import Group, Sample

RATES = {"tokens": "tokens_per_s", "prefill_tokens": "prefill_tokens_per_s"}
DIFFERENCES = ("preemptions", "reprefilled", "cached_tokens", "pause_s")
GAUGES = ("running", "waiting", "kv_usage")


class EngineMeter:
    """Each engine's numbers since the last step."""

    def __init__(self) -> None:
        self._before: dict[str, dict[str, float]] = {}
        self._at = time.monotonic()

    def read(self, engines: dict[str, dict[str, float]]) -> dict[str, float]:
        """From each engine's totals and gauges: `engine/<name>/...`, and the sums `engine/...`."""
        now = time.monotonic()
        seconds, self._at = max(now - self._at, 1e-9), now
        metrics: dict[str, float] = {}
        bubbles = []
        for name, numbers in engines.items():
            before = self._before.get(name, {})
            grown = {key: value - before.get(key, 0.0) for key, value in numbers.items()}
            own = {rate: grown[key] / seconds for key, rate in RATES.items()}
            own |= {key: grown[key] for key in DIFFERENCES} | {key: numbers[key] for key in GAUGES}
            own["bubble"] = min(max(1 - grown["busy_s"] / seconds, 0.0), 1.0)
            bubbles.append(own["bubble"])
            metrics |= {f"engine/{name}/{key}": value for key, value in own.items()}
        for key in (*RATES.values(), *DIFFERENCES, *GAUGES):
            values = [metrics[f"engine/{name}/{key}"] for name in engines]
            metrics[f"engine/{key}"] = (
                max(values, default=0.0) if key == "kv_usage" else sum(values)
            )
        metrics["engine/bubble"] = float(np.mean(bubbles)) if bubbles else 1.0
        self._before = engines
        return metrics


def finished_metrics(
    finished: list[tuple[Group, float]], algorithm: AlgorithmConfig
) -> dict[str, float]:
    """Groups rolled out since the last step, each with its seconds, trained on or not."""
    samples = [sample for group, _ in finished for sample in group.samples]
    if not samples:
        return {}
    lengths = np.array([s.length for s in samples])
    metrics = {
        "rollout/length_mean": float(lengths.mean()),
        "rollout/length_max": float(lengths.max()),
        "rollout/truncated": float(np.mean([s.finish_reason == "length" for s in samples])),
        "rollout/group_s": float(np.mean([seconds for _, seconds in finished])),
        "reward/zero_signal_groups": float(
            np.mean([not has_signal(trained_scores(group, algorithm)) for group, _ in finished])
        ),
        "reward/without_verdict": float(np.mean([s.verdict.score is None for s in samples])),
    }
    scores = np.array([s.verdict.score for s in samples if s.verdict.score is not None])
    if len(scores):
        spread = np.mean([np.nanstd(group.scores()) for group, _ in finished])
        metrics |= {"reward/mean": float(scores.mean()), "reward/score_spread": float(spread)}
    for verifier in sorted({group.prompt.verifier for group, _ in finished}):
        judged = [g.scores() for g, _ in finished if g.prompt.verifier == verifier]
        known = [score for scores in judged for score in scores if not np.isnan(score)]
        if known:
            metrics[f"reward/source/{verifier}"] = float(np.mean(known))
    for part in sorted({name for s in samples for name in s.verdict.parts}):
        values = [s.verdict.parts[part] for s in samples if part in s.verdict.parts]
        metrics[f"reward/{part}"] = float(np.mean(values))
    return metrics


def trained_metrics(groups: list[Group], version: int, max_staleness: int) -> dict[str, float]:
    """The groups of the step that started from `version`; shares of tokens by age."""
    samples = [sample for group in groups for sample in group.samples]
    ages = [version - sample.min_version for sample in samples]
    tokens = np.zeros(max_staleness + 2)  # the last: older than the bound, masked in the loss
    for age, count in (pair for sample in samples for pair in _token_ages(sample, version)):
        tokens[min(age, max_staleness + 1)] += count
    metrics = {
        "rollout/staleness_mean": float(np.mean(ages)),
        "rollout/staleness_max": float(np.max(ages)),
        "rollout/groups_trained": float(len(groups)),
    }
    shares = tokens / max(tokens.sum(), 1)
    names = [*range(max_staleness + 1), "over"]
    return metrics | {
        f"rollout/tokens_age_{name}": float(share)
        for name, share in zip(names, shares, strict=True)
    }


def advantage_metrics(plan: TrainPlan, algorithm: AlgorithmConfig) -> dict[str, float]:
    """What the step's samples are weighed by: population std and largest magnitude over those in
    the loss. Divided by each group's own std the spread is near 1; it is the scores' own without
    (`dr_grpo`, `rloo`)."""
    advantages = np.concatenate(advantages_by_group(plan, algorithm))
    scores = np.concatenate([trained_scores(group, algorithm) for group in plan.groups])
    inside = advantages[~np.isnan(scores)]
    if not len(inside):
        return {}
    return {
        "learner/advantage_spread": float(inside.std()),
        "learner/advantage_max": float(np.abs(inside).max()),
    }


def _token_ages(sample: Sample, version: int) -> list[tuple[int, int]]:
    return [(version - int(s.version), s.end - s.start) for s in sample.version_spans]


def one_line(step: int, metrics: dict[str, Any]) -> str:
    """The step at a glance, for the log."""

    def of(name: str) -> float:
        return metrics.get(name, 0.0)

    names = [
        key.split("/")[1] for key in metrics if key.endswith("/bubble") and key.count("/") == 2
    ]
    engines = ", ".join(
        f"{n} {of(f'engine/{n}/tokens_per_s'):.0f} tok/s run {of(f'engine/{n}/running'):.0f} "
        f"wait {of(f'engine/{n}/waiting'):.0f} kv {of(f'engine/{n}/kv_usage'):.0%} "
        f"idle {of(f'engine/{n}/bubble'):.0%}"
        for n in names
    )
    ages = [key for key in metrics if key.startswith("rollout/tokens_age_")]
    stale = " ".join(f"{key.rsplit('_', 1)[1]}:{metrics[key]:.0%}" for key in ages)
    # Steps may train on what finished earlier: then none finished in this one.
    reward = f"{metrics['reward/mean']:.3f}" if "reward/mean" in metrics else "none yet"
    return (
        f"step {step}: {of('time/step_s'):.2f} s, reward {reward} | {engines} | "
        f"preempted {of('engine/preemptions'):.0f} refilled {of('engine/reprefilled'):.0f} | "
        f"idle learner {of('learner/bubble'):.0%} engines {of('engine/bubble'):.0%} | "
        f"weights {of('weights/transfer_s'):.3f} s {of('weights/bytes_per_s') / 1e6:.0f} MB/s "
        f"pause {of('weights/pause_s') * 1e3:.0f} ms | "
        f"slots {of('buffer/slots_used'):.0f}/{of('buffer/slots'):.0f} | ages {stale}"
    )
