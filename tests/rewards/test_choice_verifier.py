"""The `choice` verifier: letters (GPQA form) and short answers."""

from __future__ import annotations

import time

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
        "The answer is B because it holds. Option C is wrong.",
        "The answer is B, not C.",
        "The answer is B, I think.",
        "The answer is B and I am sure of it.",
        "So the answer would be B.",
        "The correct option is B. Option A is a trap.",
        "Option C is incorrect, hence option B",
        "B is the correct answer",
        r"The answer is \text{(B)}.",
        "<think>A or C</think>B",
        "<think>A or C</think>\n(B)",
        "<think>A or C</think>\n\n**B**\n",
        "<think>x</think>It must be\n\n$B$.",
        r"<think>\boxed{C}? no</think>The answer is B.",
        r"\boxed{\text{(B)}}",
        r"\boxed{B) Both A and C}",
        r"\boxed{B. Vitamin A}",
        "The answer is \"B\".",
        "The answer is 'B'.",
        "The correct answer is therefore B.",
        "<answer>B</answer>",
        "B) 3.2 eV",
        "<think>A or C</think>\n**B.** Vitamin K",
        "The answer is C? No.\n\nB",
        "If the answer is C, x is negative. So the answer is B.",
        "I don't think the answer is C. It is clear.\n\nB",
        "Everything except C is wrong. B is right.",
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
        r"The answer is B: \boxed{A, B}",
        r"\boxed{A \text{ or } B}",
        r"\boxed{}",
        "<think>the answer is B",
        "The answer is not clear. Answers differ",
        "The answer is a matter of taste",
        "The answer is Beryllium or Argon",
        "The answer is A or B.",
        "The answer is A and B.",
        "The answer is A, B.",
        "Answer: B/A",
        "Answer: A & B",
        "The incorrect option is B.",
        "I don't think the answer is B.",
        "It is unlikely that the answer is B.",
        "Is the answer B?",
        "I doubt that the correct answer is B.",
        "Everything except B is right",
        "A) or B)",
        "A) not B",
        "The wrong answer is B.",
        "We can eliminate the option B.",
        "This is not the right answer: B",
        "The answer is not A",
        "Option A gives 3. Option B gives 4.",
        r"\boxed{(B) \text{ and } (A)}",
        r"\boxed{B) or A)}",
        r"\boxed{B: no, A}",
        r"\boxed{A: wait, B}",
        r"<think>\boxed{B}</think>I do not know.",
        "<think>B</think>A vowel",
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
        ("x>5", "x<5", False),
        ("x>5", "x > 5", True),
        ("p<0.05", "p>0.05", False),
        ("10^5", "10 5", False),
        ("10^5", "10^{5}", True),
        ("2*3", "2 3", False),
        ("x=5", "x 5", False),
        ("x=5", "x = 5", True),
        ("\u221e", "?", False),
        ("\u221e", "\u221e", True),
        ("x\u22645", "x\u22655", False),
        ("x\u22645", r"x \le 5", True),
        ("5!", "5", False),
        ("yes", "Yes!", True),
        ("Paris", "**Paris**", True),
        ("~5", "5", False),
        ("|x|", "x", False),
        ("H2O", "H_2O", True),
        ("H2O", "\\text{H}_2\\text{O}", True),
        ("H2O", "H\u2082O", True),
        ("E. coli", "E. coli", True),
        ("Newton's law", "newton\u2019s law", True),
        ('[ "H2O", "water" ]', "water", True),
        ('["one", 1]', "1", True),
        ('["one", 1]', "2", False),
    ],
)
def test_short_answers(truth, answer, right):
    assert judge(truth, f"\\boxed{{{answer}}}").score == float(right)


def test_an_empty_text_equals_nothing():
    assert judge(",", r"\\boxed{;}").score == 0.0
    assert judge(",", r"\\boxed{?}").score == 0.0


def test_fifty_megabytes_end_promptly():
    assert judge("B", "answer is " * 5_000_000 + "B").reason == "correct"
    assert judge("B", "(" * 50_000_000).reason == "no_answer"


@pytest.mark.parametrize(
    "filler", [" ", "*", "* ", "$", "\n", "(", " answer", "\\", "\\text{", "\\("]
)
def test_long_runs_after_the_word_answer_end_promptly(filler):
    started = time.monotonic()
    box = f"\\boxed{{{filler * 900}}}"
    for text in ("answer" + filler * 3_900, "answer is $" + filler * 1_900, box):
        assert judge("B", text).score == 0.0
        assert judge("five", text).score == 0.0
    assert time.monotonic() - started < 20
