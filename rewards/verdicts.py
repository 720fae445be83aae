"""The two verdicts of a verifier that knows right from wrong."""

from __future__ import annotations

from h1r_rl.records import Verdict

CORRECT = Verdict(1.0, {"accuracy": 1.0}, "correct")


def wrong(reason: str) -> Verdict:
    return Verdict(0.0, {"accuracy": 0.0}, reason)
