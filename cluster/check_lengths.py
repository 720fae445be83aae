"""Whether the problems fit the context, before a stage is started for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from h1r_rl.config.schema import RunConfig
from h1r_rl.data.chat import make_prompt
from h1r_rl.data.sources import Problem, Problems
from h1r_rl.errors import DataError
from h1r_rl.records import Prompt


def check_lengths(config: RunConfig, loaded: dict[str, Problems], tokenizer: Any) -> None:
    """Every held-out prompt leaves room for its answer; some RL and SFT prompt does.

    The others of those are left out and counted when they are met: rows are many, and one that fits
    is mostly the first.
    """
    rollout = config.rollout
    max_tokens = config.evaluation.max_response_tokens or rollout.max_response_tokens
    for split in ("evaluation", "evaluation_code"):
        if split in loaded:
            rows = loaded[split].rows[: config.evaluation.limit]
            prompts = [_prompt(config, tokenizer, row) for row in rows]
            refuse_too_long(prompts, rollout.max_model_len - max_tokens, split)
    rooms = {"rl": (rollout.max_model_len - rollout.max_response_tokens, "rollout.max_model_len")}
    if config.sft:
        rooms["sft"] = (config.sft.max_length - 1, "sft.max_length")
    for split, (room, setting) in rooms.items():
        if split in loaded:
            _refuse_none_fits(config, tokenizer, loaded[split].rows, split, room, setting)


def refuse_too_long(prompts: list[Prompt], room: int, split: str) -> None:
    """A held-out problem that cannot be asked would silently change what is measured."""
    long = [prompt for prompt in prompts if len(prompt.token_ids) > room]
    if long:
        raise DataError(
            f"data.{split}: expected prompts of at most {room} tokens, found {len(long)} longer "
            f"ones (first {long[0].prompt_id}, {len(long[0].token_ids)} tokens); raise "
            "rollout.max_model_len, lower evaluation.max_response_tokens, or remove them"
        )


def _refuse_none_fits(
    config: RunConfig, tokenizer: Any, rows: Sequence[Problem], split: str, room: int, setting: str
) -> None:
    shortest = None
    for row in rows:
        length = len(_prompt(config, tokenizer, row).token_ids)
        if length <= room:
            return
        shortest = min(shortest or length, length)
    raise DataError(
        f"data.{split}: expected prompts of at most {room} tokens, found none among {len(rows)} "
        f"(shortest {shortest}); raise {setting}"
    )


def _prompt(config: RunConfig, tokenizer: Any, problem: Problem) -> Prompt:
    return make_prompt(tokenizer, problem, system_prompt=config.model.system_prompt)
