"""Problems as token ids, by the model folder's own chat template.

Invariant: a trace's prompt ids are exactly the ids that generation starts from, and its response
ids end with the end token that the engine stops at.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from h1r_rl.data.sources import Problem
from h1r_rl.errors import DataError
from h1r_rl.records import Prompt, TokenIds

PROBE = "h1r-probe"  # stands for an answer when the template is asked how turns end


def load_tokenizer(folder: Path, *, trust_remote_code: bool = False) -> Any:
    """The folder's tokenizer; one without a chat template is refused, not given ours."""
    from transformers import AutoTokenizer

    if not Path(folder).is_dir():
        raise DataError(f"expected a model folder with a tokenizer, but {folder} does not exist")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:  # whatever a torn file makes of the readers
        raise DataError(
            f"{folder}: expected a tokenizer, found none that loads "
            f"({_first_line(error)}); put the model's tokenizer files there"
        ) from error
    if not tokenizer.chat_template:
        raise DataError(
            f"{folder}: expected a tokenizer with a chat template, found none; add "
            "chat_template.jinja to the folder (a base model's instruct sibling has one)"
        )
    _check_template(tokenizer, folder)
    return tokenizer


def _check_template(tokenizer: Any, folder: Path) -> None:
    """A template that can be applied, and that writes what the user says."""
    turns = [{"role": "user", "content": PROBE}]
    text = _apply(tokenizer, turns, add_generation_prompt=True, tokenize=False)
    if PROBE not in text:
        raise DataError(
            f"{folder}: expected a chat template that writes the user's text, found one that "
            f"writes {text[:100]!r}; correct chat_template.jinja"
        )
    end_token_id(tokenizer)


def _apply(tokenizer: Any, turns: Sequence[dict[str, str]], **options: Any) -> Any:
    """The folder's template on `turns`; what it cannot take is a mistake in the data or in it."""
    from jinja2 import TemplateError

    try:
        return tokenizer.apply_chat_template(turns, **options)
    except (TemplateError, TypeError) as error:
        roles = ", ".join(turn["role"] for turn in turns)
        raise DataError(
            f"{tokenizer.name_or_path}: expected a chat template that takes turns of {roles}, "
            f"found: {_first_line(error)}; correct chat_template.jinja, or the turns of "
            f"{turns[-1]['content'][:100]!r}"
        ) from error


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0][:200]


def make_prompt(
    tokenizer: Any, problem: Problem, *, system_prompt: str | None, pass_index: int = 0
) -> Prompt:
    """Template applied, generation prompt included."""
    return Prompt(
        prompt_id=problem.prompt_id,
        pass_index=pass_index,
        token_ids=_prompt_ids(tokenizer, problem.messages, system_prompt),
        question=problem.question,
        verifier=problem.verifier,
        ground_truth=problem.ground_truth,
    )


def response_ids(tokenizer: Any, response: str) -> TokenIds:
    """An SFT answer as the engine would have sampled it, end token included."""
    ids = tokenizer.encode(response, add_special_tokens=False)
    return np.array([*ids, end_token_id(tokenizer)], dtype=np.int32)


@lru_cache(maxsize=8)
def end_token_id(tokenizer: Any) -> int:
    """The end token that the template writes after an assistant turn, else the folder's first.

    Real folders differ: the tokenizer's own end of sequence may end documents, not turns, and a
    turn's end need not be one that the engine stops at.
    """
    ends = end_token_ids(tokenizer)
    turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": PROBE}]
    text = _apply(tokenizer, turns, tokenize=False)
    after = tokenizer.encode(text.rpartition(PROBE)[2], add_special_tokens=False)
    return next((token for token in after if token in ends), ends[0])


def end_token_ids(tokenizer: Any) -> tuple[int, ...]:
    """What the engine stops at: the folder's generation settings, then the tokenizer's own."""
    from transformers import GenerationConfig

    folder = Path(tokenizer.name_or_path)
    found: list[int] = []
    if (folder / "generation_config.json").is_file():
        try:
            ids = GenerationConfig.from_pretrained(folder).eos_token_id
        except (OSError, ValueError) as error:
            raise DataError(
                f"{folder}: expected a generation_config.json that can be read, found: "
                f"{_first_line(error)}; correct or remove it"
            ) from error
        found += ids if isinstance(ids, list) else [] if ids is None else [ids]
    if tokenizer.eos_token_id is not None:
        found.append(tokenizer.eos_token_id)
    if not found:
        raise DataError(
            f"{folder}: expected an end-of-sequence token, found none in generation_config.json "
            "or the tokenizer; set eos_token_id there"
        )
    return tuple(dict.fromkeys(found))


def _prompt_ids(
    tokenizer: Any, messages: Sequence[dict[str, str]], system_prompt: str | None
) -> TokenIds:
    turns = list(messages)
    if system_prompt is not None and turns[0]["role"] != "system":
        turns.insert(0, {"role": "system", "content": system_prompt})
    ids = _apply(tokenizer, turns, add_generation_prompt=True, tokenize=True, return_dict=False)
    return np.array(ids, dtype=np.int32)
