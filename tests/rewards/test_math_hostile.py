"""Answers made to hang, to eat memory or to crash: each ends in time, scores 0, and leaves the
judge ready for the next item."""

from __future__ import annotations

import time

import numpy as np
import pytest

from h1r_rl.config.schema import RewardConfig
from h1r_rl.records import Prompt
from rewards.judge import Judge

TIMEOUT_S = 1.0
MARGIN_S = 15.0  # killing, starting and importing sympy again, on a machine busy with other tests


def nested(opening: str, closing: str, depth: int) -> str:
    return f"\\boxed{{{opening * depth}1{closing * depth}}}"


HOSTILE = {
    "power tower": r"\boxed{9^{9^{9^9}}}",
    "large power": r"\boxed{7^{999999999}}",
    "factorial": r"\boxed{(10^9)!}",
    "binomial": r"\boxed{\binom{10^8}{10^7}}",
    "tower under a sine": r"\boxed{\sin(10^{10^{7}})}",
    "expansion": r"\boxed{(x+y+z+w)^{200}}",
    "sum": r"\boxed{\sum_{k=1}^{10^9} \frac{1}{k^2}}",
    "100 kB of digits": r"\boxed{" + "7" * 100_000 + "}",
    "100 kB of digits, no box": "The answer is " + "7" * 100_000,
    "digits within the limit": r"\boxed{" + "7" * 1_900 + "}",
    "nested parentheses": nested("(", ")", 900),
    "nested braces": nested("{", "}", 900),
    "nested fractions": nested(r"\frac{1}{", "}", 150),
    "nested roots": nested(r"\sqrt{", "}", 250),
    "nested sines": nested(r"\sin(\cos(", "))", 60),
    "chained powers": r"\boxed{" + "2^" * 400 + "2}",
    "long tuple": r"\boxed{(" + "x," * 400 + "1)}",
    "dots": r"\boxed{" + "." * 1_900 + "}",
    "millions of open boxes": r"\boxed{" * 2_000_000,
    "open boxes before 20 MB": r"\boxed{" * 64 + "a" * 20_000_000,
    "millions of answers": "answer is " * 5_000_000,
    "millions of think tags": "<think>" * 5_000_000,
    "50 MB": "a" * 50_000_000 + r" \boxed{\sqrt{7}}",
    "50 MB beyond ASCII": "\u4e2d" * 17_000_000 + r" \boxed{\sqrt{7}}",
    "lone surrogates": "\ud800" + r"\boxed{" + "\ud801" + r"\sqrt{7}}",
    "NUL bytes": "\0" + r"\boxed{" + "\0" + r"\sqrt{7}}",
}


@pytest.fixture(scope="module")
def judge():
    judge = Judge(RewardConfig(timeout_s=TIMEOUT_S), max_response_tokens=100)
    yield judge
    judge.close()


def prompt(truth: str) -> Prompt:
    return Prompt("p", 0, np.zeros(0, np.int32), "q", "math", truth)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_it_ends_in_time_and_the_next_item_is_served(judge, text):
    started = time.monotonic()
    verdict = judge.verify(prompt(r"\sqrt{2}"), text)
    assert time.monotonic() - started < TIMEOUT_S + MARGIN_S
    assert verdict.score == 0.0 and verdict.parts == {"accuracy": 0.0}
    assert judge.verify(prompt(r"\sqrt{2}"), r"\boxed{2^{1/2}}").reason == "correct"


def test_the_deadline_has_a_reason_of_its_own(judge):
    assert judge.verify(prompt("5"), HOSTILE["power tower"]).reason == "timeout"


def test_a_memory_bomb_is_told_from_a_wrong_answer():
    small = Judge(RewardConfig(timeout_s=60, memory_mib=400), max_response_tokens=100)
    try:
        assert small.verify(prompt(r"\sqrt{2}"), r"\boxed{2^{1/2}}").reason == "correct"
        bomb = small.verify(prompt(r"\sqrt{2}"), "a" * 200_000_000 + r"\boxed{\sqrt{3}}")
        assert (bomb.score, bomb.reason) in {(0.0, "memory"), (0.0, "crash")}
        assert small.verify(prompt(r"\sqrt{2}"), r"\boxed{2^{1/2}}").reason == "correct"
    finally:
        small.close()
