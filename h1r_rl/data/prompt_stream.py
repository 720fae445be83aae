"""Endless, seeded passes over the RL problems.

Invariant: the order is a function of (seed, pass) alone, so a saved position is a few integers; a
problem too long for the engine is quarantined once and counted, never sent; no (prompt id, pass)
is issued twice.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

from h1r_rl.data.chat import make_prompt
from h1r_rl.data.order import ShuffledRows
from h1r_rl.data.sources import Problem
from h1r_rl.errors import DataError
from h1r_rl.records import Prompt


class PromptStream:
    def __init__(
        self,
        problems: Sequence[Problem],
        tokenizer: Any,
        *,
        system_prompt: str | None,
        seed: int,
        max_prompt_tokens: int,
    ) -> None:
        prompts = [make_prompt(tokenizer, p, system_prompt=system_prompt) for p in problems]
        self._prompts = [p for p in prompts if len(p.token_ids) <= max_prompt_tokens]
        self.num_too_long = len(prompts) - len(self._prompts)
        if not self._prompts:
            shortest = min((len(p.token_ids) for p in prompts), default=0)
            raise DataError(
                f"expected prompts of at most {max_prompt_tokens} tokens, found none among "
                f"{len(prompts)} (shortest {shortest}); raise rollout.max_model_len or lower "
                "rollout.max_response_tokens"
            )
        self.verifiers = frozenset(p.verifier for p in self._prompts)
        self._order = ShuffledRows(len(self._prompts), seed)

    def next(self) -> Prompt:
        pass_index, row = self._order.next()
        return dataclasses.replace(self._prompts[row], pass_index=pass_index)

    def first(self) -> Prompt:
        """A prompt to try things on; it takes no turn."""
        return self._prompts[0]

    def position(self) -> dict[str, int]:
        """For a checkpoint: `restore` of a stream over the same problems goes on from here."""
        return self._order.position()

    def restore(self, position: dict[str, int]) -> None:
        self._order.restore(position)
