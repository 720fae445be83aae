"""What the reward pool counts: verdicts by reason, latencies, time-outs, kills and losses.

Invariant: counts only grow; memory does not depend on how many verdicts there were, nor on what a
user's verifier gives as reasons: MAX_REASONS of them are told apart, further ones are "other". All
values are plain floats under names fit for a tracker.
"""

from __future__ import annotations

import bisect
import re
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate

from h1r_rl.records import Verdict

# Upper edges of the latency histogram, seconds; the last bucket is open.
EDGES_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)

MAX_REASONS = 64
MAX_NAME_CHARS = 200
OTHER = "other"
_UNFIT = re.compile(r"[^\w\- :]")  # for the last part of a metric's name


class RewardStats:
    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.timeouts: Counter[str] = Counter()  # by verifier
        self.kills: Counter[str] = Counter()  # by reason
        self.workers_lost: Counter[str] = Counter()  # by reason
        self.seconds = 0.0
        self._buckets = [0] * (len(EDGES_S) + 1)

    def add(self, verifier: str, verdict: Verdict, seconds: float) -> None:
        self._count_reason(verdict.reason)
        if verdict.reason == "timeout":
            self.timeouts[verifier] += 1
        self.seconds += seconds
        self._buckets[bisect.bisect_left(EDGES_S, seconds)] += 1

    def add_kills(self, kills: Mapping[str, int]) -> None:
        self.kills.update(kills)

    def _count_reason(self, reason: str) -> None:
        name = _UNFIT.sub("_", reason[:MAX_NAME_CHARS]).strip() or "none"
        known = name in self.reasons or len(self.reasons) < MAX_REASONS
        self.reasons[name if known else OTHER] += 1

    def snapshot(self) -> dict[str, float]:
        """Flat metrics; the histogram is cumulative (`latency_le_0.1s`: so many verdicts)."""
        metrics = {
            "reward/verdicts": float(self.reasons.total()),
            "reward/seconds": self.seconds,
            "reward/timeouts": float(self.timeouts.total()),
            "reward/kills": float(self.kills.total()),
            "reward/workers_lost": float(self.workers_lost.total()),
        }
        for name, counts in (
            ("reason", self.reasons),
            ("timeouts", self.timeouts),
            ("kills", self.kills),
            ("workers_lost", self.workers_lost),
        ):
            metrics |= {f"reward/{name}/{key}": float(n) for key, n in counts.items()}
        cumulative = list(accumulate(self._buckets))
        metrics |= {
            f"reward/latency_le_{edge:g}s": float(n)
            for edge, n in zip(EDGES_S, cumulative, strict=False)
        }
        for share in (0.5, 0.95, 0.99):
            metrics[f"reward/latency_p{100 * share:g}_s"] = self._quantile(cumulative, share)
        return metrics

    def _quantile(self, cumulative: list[int], share: float) -> float:
        """Upper edge of the bucket that the quantile falls into; the last edge beyond it."""
        bucket = bisect.bisect_left(cumulative, share * cumulative[-1]) if cumulative[-1] else 0
        return EDGES_S[min(bucket, len(EDGES_S) - 1)] if cumulative[-1] else 0.0
