"""Alarms over a step's metrics: engine against learner, entropy, signal, truncation, gradients.

Invariant: pure bookkeeping over floats. The loop calls `before_update` with the learner's metrics
(a run whose engine and learner disagree stops before the next weights exist) and `after_step` with
the whole step's, which returns what to log. What an alarm means and what to change: docs/tripwires.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Mapping
from statistics import fmean, median

from h1r_rl.config.schema import GRPOConfig, LearnerConfig, RolloutConfig
from h1r_rl.errors import RunFailed

# Mean |log pi_learner - log mu| of a sound pair, by the coarser side's compute dtype and the
# engine's SSM state: the worst decode of tests/benchmarks/results/logprob_gap.json, rounded up.
GAP_FLOOR = {
    ("float32", "float32"): 2e-6,
    ("float32", "bfloat16"): 5e-3,
    ("bfloat16", "float32"): 3e-2,
    ("bfloat16", "bfloat16"): 3e-2,
}
WARN_FACTOR, STOP_FACTOR = 5.0, 15.0
# |1 - learner's temperature / engine's| of a sound pair at any dtypes: the largest decode of that
# file, rounded up. Rounding is no slope, so that one floor serves them all.
SLIP_FLOOR = 1e-3
SLIP_STOP = 20 * SLIP_FLOOR
SLIP_ERRORS = 5.0  # standard errors that it must be beyond the bound: few tokens may lie anywhere
# Largest |difference| of one prompt's log-probabilities when it is asked in another batch: kernels
# round by batch size (a float32 product of 1-3 rows by up to 3e-5). A corrupted tensor moves more.
REBATCH_LIMIT = {"float32": 1e-3, "bfloat16": 0.5}
ALARMS = ("logprob_gap", "entropy", "zero_signal", "truncation", "grad_norm")
FIRST_STEPS = 5  # the entropy that later steps are compared with
GRADIENT_HISTORY = 20

logger = logging.getLogger(__name__)


def gap_bounds(
    grpo: GRPOConfig, rollout: RolloutConfig, learner: LearnerConfig
) -> tuple[float, float]:
    """(warn, stop) for the mean gap on answers sampled by the current weights alone."""
    coarse = "bfloat16" in (rollout.dtype, learner.autocast)
    floor = GAP_FLOOR["bfloat16" if coarse else "float32", rollout.mamba_ssm_cache_dtype]
    stop = grpo.logprob_gap_stop or STOP_FACTOR * floor
    return grpo.logprob_gap_warn or min(WARN_FACTOR * floor, stop), stop


def reload_limit(rollout: RolloutConfig) -> float:
    """For the same weights pushed twice, between which other requests run."""
    return REBATCH_LIMIT[rollout.dtype]


class Tripwires:
    """One run's alarms. An alarm is logged once each time it goes off, and as a metric 0/1."""

    def __init__(self, grpo: GRPOConfig, rollout: RolloutConfig, learner: LearnerConfig) -> None:
        self._limits = grpo.tripwires
        self._gap_warn, self._gap_stop = gap_bounds(grpo, rollout, learner)
        self._ringing: set[str] = set()
        self._recent: dict[str, deque[float]] = {}
        self._first_entropies: list[float] = []
        self._norms: deque[float] = deque(maxlen=GRADIENT_HISTORY)

    def before_update(self, step: int, metrics: Mapping[str, float]) -> None:
        """`metrics` of the forward pass. Raises RunFailed when engine and learner disagree."""
        stale = metrics.get("logprob_gap_stale")
        limit = self._limits.logprob_gap_stale_stop
        # The first is absent where no answer is wholly of this version, as happens at staleness.
        same = {"tokens sampled by the current weights": metrics.get("logprob_gap"),
                "the probe's tokens": metrics.get("probe_gap")}  # fmt: skip
        found = {what: value for what, value in same.items() if value is not None}
        for what, value in found.items():
            if not value <= self._gap_stop:
                raise RunFailed(_disagreement(step, what, value, self._gap_stop))
        if stale is not None and not stale <= limit:
            what = "tokens sampled by earlier weights too"
            raise RunFailed(_disagreement(step, what, stale, limit))
        slip = metrics.get("temperature_slip", 0.0)
        error = metrics.get("temperature_slip_error", 0.0)
        if not abs(slip) - SLIP_ERRORS * error <= SLIP_STOP:
            raise RunFailed(_wrong_temperature(step, slip, error))
        if found:
            worst = max(found, key=lambda what: found[what])
            self._set(
                "logprob_gap",
                found[worst] > self._gap_warn,
                f"step {step}: engine and learner differ by {found[worst]:.2g} a token on {worst}, "
                f"expected at most {self._gap_warn:.2g} (the run stops at {self._gap_stop:.2g})",
            )

    def after_step(self, step: int, metrics: Mapping[str, float]) -> dict[str, float]:
        """`metrics` of the whole step, with the driver's prefixes."""
        self._entropy(step, metrics.get("learner/entropy"))
        limits = self._limits
        unequal, cut = metrics.get("reward/zero_signal_groups"), metrics.get("rollout/truncated")
        self._share(step, "zero_signal", unequal, limits.zero_signal_share)
        self._share(step, "truncation", cut, limits.truncation_share)
        self._gradient(step, metrics)
        return {f"tripwire/{name}": float(name in self._ringing) for name in ALARMS}

    def _entropy(self, step: int, value: float | None) -> None:
        if value is None:
            return
        if len(self._first_entropies) < FIRST_STEPS:
            self._first_entropies.append(value)
            return
        start, now = fmean(self._first_entropies), self._smooth("entropy", value)
        low, high = self._limits.entropy_fall * start, self._limits.entropy_rise * start
        self._set(
            "entropy",
            not low <= now <= high,
            f"step {step}: entropy {now:.3g} nats a token, {start:.3g} in the first steps; "
            f"expected between {low:.3g} and {high:.3g}",
        )

    def _share(self, step: int, name: str, value: float | None, limit: float) -> None:
        if value is not None:
            now = self._smooth(name, value)
            self._set(name, now > limit, f"step {step}: {name} share {now:.2f}, limit {limit:.2f}")

    def _gradient(self, step: int, metrics: Mapping[str, float]) -> None:
        norm = metrics.get("learner/grad_norm")
        if norm is None or metrics.get("learner/skipped"):
            return
        usual = median(self._norms) if len(self._norms) >= FIRST_STEPS else None
        self._norms.append(norm)
        if usual is None:
            return
        limit = self._limits.grad_norm_jump * usual
        self._set(
            "grad_norm",
            norm > limit,
            f"step {step}: gradient norm {norm:.3g}, median of the last steps {usual:.3g}, "
            f"limit {limit:.3g}",
        )

    def _smooth(self, name: str, value: float) -> float:
        window = self._recent.setdefault(name, deque(maxlen=self._limits.window))
        window.append(value)
        return fmean(window)

    def _set(self, name: str, ringing: bool, message: str) -> None:
        if ringing and name not in self._ringing:
            logger.warning("%s; see docs/tripwires/%s.md", message, name)
        (self._ringing.add if ringing else self._ringing.discard)(name)


def _disagreement(step: int, tokens: str, gap: float, limit: float) -> str:
    return (
        f"step {step}: engine and learner disagree: mean |difference of log-probabilities| on "
        f"{tokens} is {gap:.3g}, limit {limit:.3g}. The engine does not hold "
        "the learner's weights, or one side computes with a wrong multiplier, temperature or "
        "precision: docs/tripwires/logprob_gap.md says how to tell them apart and what to do"
    )


def _wrong_temperature(step: int, slip: float, error: float) -> str:
    return (
        f"step {step}: engine and learner disagree: their log-probabilities differ as with a "
        f"learner's temperature {1 - slip:.3f} times the engine's (a slope of {slip:.3g} +- "
        f"{error:.1g}, limit {SLIP_STOP:g}). One side samples or computes at another temperature, "
        "or scales its logits by another multiplier: docs/tripwires/logprob_gap.md says what to do"
    )
