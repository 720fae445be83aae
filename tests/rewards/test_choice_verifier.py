"""The `choice` verifier: letters (GPQA form) and short answers."""

from __future__ import annotations

import numpy as np
import pytest

from h1r_rl.config.schema import RewardConfig
from h1r_rl.records import Prompt
from rewards.choice_verifier import verify


def judge(truth: str, text: str):
    return verify(Prompt("p", 0, np.zeros(0, np.int32), "q", "choice", truth), text, RewardConfig())


@pytest.mark.parametrize(
    "text",
    [
        r"\boxed{B}",
        r"\boxed{(B)}",
        r"\boxed{\text{B}}",
        r"\boxed{\text{(B)}}",
        r"\boxed{\textbf{B}}",
        r"\boxed{b}",
        r"\boxed{B.}",
        r"\boxed{B) 3.2 eV}",
        r"\boxed{B: the mitochondria}",
        r"\boxed{\text{Option B}}",
        r"It is \boxed{A}? No: \boxed{B}",
        "The answer is B.",
        "the correct answer is (B)",
        "Answer: B",
        "**Answer: B**",
        "**Answer:** B) 3.2 eV",
        "Answer: $B$",
        "The final answer is **B**",
        "I choose option B.",
        "<think>A? the answer is A</think>The answer is B",
    ],
)
def test_letters_found(text):
    assert judge("B", text).reason == "correct"
    assert judge("(B)", text).reason == "correct"
    assert judge("C", text).reason == "wrong"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "I cannot tell",
        "Because A is a vowel",
        r"\boxed{A, B}",
        r"\boxed{A} or \boxed{B}",
        r"\boxed{A \text{ or } B}",
        r"\boxed{}",
        "<think>the answer is B",
        "The answer is not clear. Answers differ",
        "The answer is a matter of taste",
        "The answer is Beryllium or Argon",
    ],
)
def test_no_commitment_is_no_answer(text):
    assert judge("B", text).reason == "no_answer"
    assert judge("A", text).reason == "no_answer"


@pytest.mark.parametrize(
    ("truth", "answer", "right"),
    [
        ("mitochondria", "Mitochondria", True),
        ("mitochondria", "the mitochondria", True),
        ("mitochondria", r"\text{Mitochondria}", True),
        ("New York", "new  york.", True),
        ("caf\u00e9", "cafe\u0301", True),
        ("3.5", "3.50", True),
        ("1,000", "1000", True),
        ("-2", "-2", True),
        ("-2", "2", False),
        ("3.5", "35", False),
        ("New York", "York", False),
        ("hydrogen", "hydrogen and helium", False),
        ('["H2O", "water"]', "Water", True),
        ('["H2O", "water"]', r"\text{H2O}", True),
        ('["H2O", "water"]', "ice", False),
        ("50%", "50 %", True),
        ("a+b", "a-b", False),
    ],
)
def test_short_answers(truth, answer, right):
    assert judge(truth, f"\\boxed{{{answer}}}").score == float(right)


def test_fifty_megabytes_end_promptly():
    assert judge("B", "answer is " * 5_000_000 + "B").reason == "correct"
    assert judge("B", "(" * 50_000_000).reason == "no_answer"
