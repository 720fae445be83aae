"""Seeded batches of SFT traces.

Invariant: one pass visits every trace once; a trace longer than the limit is trimmed on the right
and counted, one whose prompt alone is longer is dropped and counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from h1r_rl.data.chat import make_prompt, response_ids
from h1r_rl.data.order import ShuffledRows
from h1r_rl.data.sources import Problem
from h1r_rl.errors import DataError
from h1r_rl.records import Completion, Prompt, VersionSpan


class SFTStream:
    def __init__(
        self,
        problems: Sequence[Problem],
        tokenizer: Any,
        *,
        system_prompt: str | None,
        seed: int,
        max_length: int,
        batch_size: int,
    ) -> None:
        self._problems = problems
        self._tokenizer = tokenizer
        self._system_prompt = system_prompt
        self._max_length = max_length
        self._batch_size = batch_size
        self._order = ShuffledRows(len(problems), seed)
        self.num_trimmed = 0
        self.num_dropped = 0

    def next(self) -> list[tuple[Prompt, Completion]]:
        """`batch_size` traces; a trace is a completion that nobody sampled: zero logprobs."""
        return [self._next_trace() for _ in range(self._batch_size)]

    def position(self) -> dict[str, int]:
        """For a checkpoint: `restore` of a stream over the same problems goes on from here."""
        return self._order.position()

    def restore(self, position: dict[str, int]) -> None:
        self._order.restore(position)

    def _next_trace(self) -> tuple[Prompt, Completion]:
        for _ in range(len(self._problems)):
            pass_index, row = self._order.next()
            trace = self._trace(self._problems[row], pass_index)
            if trace is not None:
                return trace
            self.num_dropped += 1
        raise DataError(
            f"expected SFT prompts shorter than sft.max_length ({self._max_length}), found none "
            f"among {len(self._problems)}; raise sft.max_length"
        )

    def _trace(self, problem: Problem, pass_index: int) -> tuple[Prompt, Completion] | None:
        prompt = make_prompt(
            self._tokenizer, problem, system_prompt=self._system_prompt, pass_index=pass_index
        )
        ids = response_ids(self._tokenizer, problem.response or "")
        room = self._max_length - len(prompt.token_ids)
        if room <= 0:
            return None
        trimmed = len(ids) > room
        self.num_trimmed += trimmed
        ids = ids[:room]
        completion = Completion(
            sample_index=0,
            token_ids=ids,
            logprobs=np.zeros(len(ids), np.float32),
            version_spans=(VersionSpan("0", 0, len(ids)),),
            finish_reason="length" if trimmed else "stop",
            text="",
            engine="data",
        )
        return prompt, completion
