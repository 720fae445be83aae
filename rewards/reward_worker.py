"""The Ray actor that makes verdicts: a `Judge` and nothing else.

Invariant: one call judges a list of completions and yields its verdicts in order; a verdict at hand
leaves within FLUSH_S, whatever the next one takes; the actor holds no state that a replacement
would miss.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, SimpleQueue

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
        self._config, self._verifiers = config, verifiers
        self._judge = Judge(config, max_response_tokens)
        # One thread for life, and the only one that judges: a `Judge` has one owner.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="judge")

    def ready(self) -> int:
        """Process id; ConfigError where a verifier that will be asked for cannot work here (raised
        by a call, as Ray tells no caller what a constructor raised)."""
        if "code" in self._verifiers:
            from rewards.code_verifier import ensure_sandbox

            ensure_sandbox(self._config)
        if "judge" in self._verifiers:
            from rewards.judge_verifier import ensure_judge

            ensure_judge(self._config)
        return os.getpid()

    def score(
        self, prompts: Prompt | Sequence[Prompt], completions: Sequence[Completion], skip: int = 0
    ) -> Iterator[Judged]:
        """All verdicts but the first `skip`; `prompts` is one for all, or one for each."""
        each = [prompts] * len(completions) if isinstance(prompts, Prompt) else prompts
        pairs = list(zip(each, completions, strict=True))[skip:]
        made: SimpleQueue[Judged | BaseException] = SimpleQueue()
        self._thread.submit(self._work, pairs, made)
        while pairs:
            batch = _at_hand(made, len(pairs))
            pairs = pairs[len(batch.verdicts) :]
            yield batch

    def close(self) -> None:
        """End the process in order: `atexit` handlers run (the sandbox's), as under no kill."""
        self._judge.close()
        ray.actor.exit_actor()

    def _work(
        self,
        pairs: list[tuple[Prompt, Completion]],
        made: SimpleQueue[Judged | BaseException],
    ) -> None:
        try:
            for prompt, completion in pairs:
                started = time.monotonic()
                verdict = self._judge.verdict(prompt, completion)
                seconds = time.monotonic() - started
                made.put(Judged([verdict], [seconds], self._judge.take_kills()))
        except BaseException as error:  # the caller's to raise: it waits for verdicts
            made.put(error)


def _at_hand(made: SimpleQueue[Judged | BaseException], left: int) -> Judged:
    """The next verdict and those that follow it within FLUSH_S, at most `left`."""
    verdicts: list[Verdict] = []
    seconds: list[float] = []
    kills: Counter[str] = Counter()
    end = float("inf")
    while len(verdicts) < left:
        try:
            one = made.get(timeout=max(end - time.monotonic(), 0)) if verdicts else made.get()
        except Empty:
            break
        if isinstance(one, BaseException):
            raise one
        if not verdicts:
            end = time.monotonic() + FLUSH_S
        verdicts += one.verdicts
        seconds += one.seconds
        kills.update(one.kills)
    return Judged(verdicts, seconds, dict(kills))
