"""DAPO's soft overlong punishment (arXiv 2503.14476, equation 13)."""

from __future__ import annotations


def soft_overlong(length: int, max_tokens: int, cache_tokens: int) -> float:
    """0 up to max - cache tokens, then linear down to -1 at the limit and beyond.

    `length` counts response tokens. A `cache_tokens` of 0 switches it off.
    """
    if cache_tokens == 0:
        return 0.0
    return max(-1.0, min(0.0, (max_tokens - cache_tokens - length) / cache_tokens))
