"""Verifiers by name: the built-in ones, and a user's own by import path.

A verifier is a plain function `verify(prompt, text, options) -> Verdict`, `options` being the
run's `RewardConfig`. Beside it its module may have

    check_ground_truth(ground_truth) -> str | None   why nothing could be right; asked at data load;
                                                     with an argument `options` where it has one
    warm()                                           called once a process, before any deadline

Invariant: whatever user code, sympy or a hostile answer may hang runs in a killable process
(`place="child"`); only bounded string work, and verifiers that keep processes and deadlines of
their own, run in the worker itself (`place="worker"`).
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np

from h1r_rl.config.schema import RewardConfig
from h1r_rl.errors import DataError
from h1r_rl.records import Prompt, Verdict

MAX_REASON_CHARS = 200

VerifyFunction = Callable[[Prompt, str, RewardConfig], Verdict]


@dataclass(frozen=True, slots=True)
class Verifier:
    """Where a verifier is found and where it may run. `quick` may answer before the child does."""

    module: str
    function: str = "verify"
    place: Literal["child", "worker"] = "child"
    quick: str | None = None
    built_in: bool = True


BUILT_IN = {
    "math": Verifier("rewards.math_verifier", quick="quick"),
    "choice": Verifier("rewards.choice_verifier", place="worker"),
    "code": Verifier("rewards.code_verifier", place="worker"),
    "judge": Verifier("rewards.judge_verifier", place="worker"),
}


def find(name: str) -> Verifier:
    """The verifier called `name`; DataError where there is none by that form of name."""
    if name in BUILT_IN:
        return BUILT_IN[name]
    module, separator, function = name.partition(":")
    if not (separator and module and function.isidentifier()):
        raise DataError(
            f"expected a verifier ({', '.join(BUILT_IN)}, or your own as 'package.module:function')"
            f", found '{name}'; correct the verifier column or data.default_verifier"
        )
    return Verifier(module, function, built_in=False)


def item_deadline_s(name: str, config: RewardConfig) -> float:
    """The longest that one verdict may take."""
    if name == "code":
        return config.code.total_s + config.code.wall_s
    if name == "judge" and config.judge is not None:
        return config.judge.deadline_s
    return config.timeout_s


def resolve(verifier: Verifier, function: str) -> Any:
    return getattr(importlib.import_module(verifier.module), function)


def take_kills() -> Counter[str]:
    """What verifiers in the worker itself lost and replaced since the last call, by reason."""
    kills: Counter[str] = Counter()
    for verifier in BUILT_IN.values():
        take = getattr(sys.modules.get(verifier.module), "take_kills", None)
        if verifier.place == "worker" and take is not None:
            kills.update(take())
    return kills


def run_in_child(name: str, prompt: dict[str, Any], text: str, options: str) -> dict[str, Any]:
    """What the killable process calls: JSON in, JSON out."""
    verifier = find(name)
    record = Prompt(**prompt | {"token_ids": np.array(prompt["token_ids"], dtype=np.int32)})
    verdict = resolve(verifier, verifier.function)(record, text, _options(options))
    return asdict(checked(verdict))


def import_in_child(name: str) -> None:
    """Raises where a user's function does not exist."""
    verifier = find(name)
    if not callable(resolve(verifier, verifier.function)):
        raise TypeError(f"{name} is not a function")


def check_in_child(name: str, ground_truth: str, options: str) -> str | None:
    """As above, for the check of a ground truth; modules without one accept everything."""
    module = importlib.import_module(find(name).module)
    check = getattr(module, "check_ground_truth", None)
    if check is None:
        return None
    if "options" in inspect.signature(check).parameters:
        return check(ground_truth, options=_options(options))
    return check(ground_truth)


def prompt_fields(prompt: Prompt) -> dict[str, Any]:
    """A prompt as JSON can carry it; the inverse is in `run_in_child`."""
    fields = {name: getattr(prompt, name) for name in Prompt.__slots__}
    return fields | {"token_ids": np.asarray(prompt.token_ids).tolist()}


def checked(verdict: Any) -> Verdict:
    """A user's function may return anything; a Verdict of plain numbers goes on."""
    if not isinstance(verdict, Verdict):
        raise TypeError(f"expected a Verdict from the verifier, found {type(verdict).__name__}")
    score = None if verdict.score is None else float(verdict.score)
    if score is not None and not np.isfinite(score):
        raise ValueError(f"expected a finite score or None from the verifier, found {score}")
    parts = {str(name): float(value) for name, value in verdict.parts.items()}
    return Verdict(score, parts, str(verdict.reason)[:MAX_REASON_CHARS])


@lru_cache(maxsize=4)
def _options(text: str) -> RewardConfig:
    return RewardConfig.model_validate_json(text)
