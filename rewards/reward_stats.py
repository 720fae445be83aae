"""What the reward pool counts: verdicts by reason, latencies, losses.

Invariant: counts only grow; memory does not depend on how many verdicts there were.
"""

from __future__ import annotations

import bisect
from collections import Counter
from itertools import accumulate

from h1r_rl.records import Verdict

# Upper edges of the latency histogram, seconds; the last bucket is open.
EDGES_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class RewardStats:
    def __init__(self) -> None:
        self.reasons: Counter[str] = Counter()
        self.seconds = 0.0
        self.workers_lost = 0
        self._buckets = [0] * (len(EDGES_S) + 1)

    def add(self, verdict: Verdict, seconds: float) -> None:
        self.reasons[verdict.reason] += 1
        self.seconds += seconds
        self._buckets[bisect.bisect_left(EDGES_S, seconds)] += 1

    def snapshot(self) -> dict[str, float]:
        """Flat metrics; the histogram is cumulative (`latency_le_0.1s`: so many verdicts)."""
        metrics = {
            "reward/verdicts": float(self.reasons.total()),
            "reward/seconds": self.seconds,
            "reward/workers_lost": float(self.workers_lost),
        }
        metrics |= {f"reward/reason/{name}": float(n) for name, n in self.reasons.items()}
        cumulative = accumulate(self._buckets)
        metrics |= {
            f"reward/latency_le_{edge:g}s": float(n)
            for edge, n in zip(EDGES_S, cumulative, strict=False)
        }
        return metrics
