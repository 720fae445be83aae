"""Seeded choices that are the same on every platform and Python version."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def pick(rng: random.Random, choices: Sequence[T]) -> T:
    """Uniform up to 2^-50, from `random()` alone: the one stream Python promises to keep."""
    return choices[int(rng.random() * len(choices))]
