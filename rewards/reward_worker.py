"""The Ray actor that makes verdicts: a `Judge` and nothing else.

Invariant: one call judges a list of completions and yields its verdicts in order, those at hand
every FLUSH_S, so a slow one holds back no other; the actor holds no state that a replacement would
miss.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import ray

from h1r_rl.config.schema import RewardConfig
from h1r_rl.records import Completion, Prompt, Verdict
from rewards.judge import Judge

FLUSH_S = 0.1


@dataclass(frozen=True, slots=True)
class Judged:
    """Consecutive verdicts, the seconds of each, and what had to be killed for them, by reason."""

    verdicts: list[Verdict]
    seconds: list[float]
    kills: dict[str, int]


class RewardWorker:
    def __init__(
        self, config: RewardConfig, max_response_tokens: int, verifiers: frozenset[str]
    ) -> None:
        """ConfigError where a verifier that will be asked for cannot work on this machine."""
        if "code" in verifiers:
            from rewards.code_verifier import ensure_sandbox

            ensure_sandbox(config)
        self._judge = Judge(config, max_response_tokens)

    def ready(self) -> int:
        """Process id, once the constructor is through."""
        return os.getpid()

    def score(
        self, prompts: Prompt | Sequence[Prompt], completions: Sequence[Completion], skip: int = 0
    ) -> Iterator[Judged]:
        """All verdicts but the first `skip`; `prompts` is one for all, or one for each."""
        verdicts: list[Verdict] = []
        seconds: list[float] = []
        flushed = time.monotonic()
        for index, completion in list(enumerate(completions))[skip:]:
            prompt = prompts if isinstance(prompts, Prompt) else prompts[index]
            started = time.monotonic()
            verdicts.append(self._judge.verdict(prompt, completion))
            ended = time.monotonic()
            seconds.append(ended - started)
            if ended - flushed > FLUSH_S:
                yield Judged(verdicts, seconds, self._judge.take_kills())
                verdicts, seconds, flushed = [], [], ended
        if verdicts:
            yield Judged(verdicts, seconds, self._judge.take_kills())

    def close(self) -> None:
        """End the process in order: `atexit` handlers run (the sandbox's), as under no kill."""
        self._judge.close()
        ray.actor.exit_actor()
