"""A verifier for benchmarks: answers of any model differ in reward, and nothing can be learned."""

import zlib

from h1r_rl.config.schema import RewardConfig
from h1r_rl.records import Prompt, Verdict


def verify(prompt: Prompt, text: str, options: RewardConfig) -> Verdict:
    return Verdict(coin(text), {}, "coin")


def coin(text: str) -> float:
    """0 or 1 by a checksum of the answer."""
    return float(zlib.crc32(text.encode()) & 1)
