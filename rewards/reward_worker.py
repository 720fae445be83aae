"""The Ray actor that makes verdicts: a `Judge` and nothing else.

Invariant: one call judges one part of a group and returns all its verdicts; the actor holds no
state that a replacement would miss.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence

import ray

from h1r_rl.config.schema import RewardConfig
from h1r_rl.records import Completion, Prompt, Verdict
from rewards.judge import Judge


class RewardWorker:
    def __init__(self, config: RewardConfig, max_response_tokens: int) -> None:
        self._judge = Judge(config, max_response_tokens)

    def ready(self) -> int:
        """Process id, once the constructor is through."""
        return os.getpid()

    def score(
        self, prompt: Prompt, completions: Sequence[Completion]
    ) -> list[tuple[Verdict, float]]:
        """Verdict and seconds for each completion, in order."""
        judged = []
        for completion in completions:
            started = time.monotonic()
            verdict = self._judge.verdict(prompt, completion)
            judged.append((verdict, time.monotonic() - started))
        return judged

    def close(self) -> None:
        """End the process in order: `atexit` handlers run (the sandbox's), as under no kill."""
        self._judge.close()
        ray.actor.exit_actor()
