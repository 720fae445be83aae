"""One score from a verifier's verdict and the penalties, every part kept beside it.

Invariant: parts hold values before their weights; a verdict that could not be had stays without
a score whatever the penalties say. What each ending of a completion means is decided here:

    stop     the verifier's verdict
    length   the same verdict on what is there, plus the soft overlong punishment where set
    pruned   0 or no score, by `reward.pruned`; the verifier is not asked
"""

from __future__ import annotations

from dataclasses import replace

from h1r_rl.config.schema import RewardConfig
from h1r_rl.records import Completion, Verdict
from rewards.format_verifier import well_formed
from rewards.language import language_kept
from rewards.overlong import soft_overlong


def combine(
    config: RewardConfig, verdict: Verdict, completion: Completion, max_response_tokens: int
) -> Verdict:
    """The verdict that the loop sees: weighted score, and the parts "accuracy", "format", and
    where they are set "language" and "overlong"."""
    parts = {"format": 1.0 if well_formed(completion.text) else 0.0}
    if config.language_scripts:
        parts["language"] = language_kept(
            completion.text, config.language_scripts, config.language_tolerance
        )
    if config.overlong_cache_tokens:
        parts["overlong"] = soft_overlong(
            len(completion.token_ids), max_response_tokens, config.overlong_cache_tokens
        )
    if verdict.score is None:
        return replace(verdict, parts=verdict.parts | parts)
    parts = {"accuracy": verdict.score} | verdict.parts | parts
    return Verdict(_score(config, verdict.score, parts), parts, verdict.reason)


def pruned(config: RewardConfig) -> Verdict:
    """The verifier's part for a completion that a confidence rule ended."""
    if config.pruned == "none":
        return Verdict(None, {}, "pruned")
    return Verdict(0.0, {"accuracy": 0.0}, "pruned")


def _score(config: RewardConfig, verified: float, parts: dict[str, float]) -> float:
    if config.control == "format_only":
        return parts["format"]
    if config.control == "constant":
        return 1.0
    penalty = config.format_weight * (1.0 - parts["format"])
    penalty += config.language_weight * (1.0 - parts.get("language", 1.0))
    return verified - penalty + config.overlong_weight * parts.get("overlong", 0.0)
