"""What the reward pool counts: verdicts by reason, latencies, time-outs, kills and losses.

Invariant: counts only grow; memory does not depend on how many verdicts there were. All values are
plain floats, fit for a tracker.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Mapping
from itertools import accumulate

from h1r_rl.records import Verdict

# Upper edges of the latency histogram, seconds; the last bucket is open.
EDGES_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class RewardStats:
    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.timeouts: Counter[str] = Counter()  # by verifier
        self.kills: Counter[str] = Counter()  # by reason
        self.workers_lost: Counter[str] = Counter()  # by reason
        self.seconds = 0.0
        self._buckets = [0] * (len(EDGES_S) + 1)

    def add(self, verifier: str, verdict: Verdict, seconds: float) -> None:
        self.reasons[verdict.reason] += 1
        if verdict.reason == "timeout":
            self.timeouts[verifier] += 1
        self.seconds += seconds
        self._buckets[bisect.bisect_left(EDGES_S, seconds)] += 1

    def add_kills(self, kills: Mapping[str, int]) -> None:
        self.kills.update(kills)

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
