"""The `math` verifier: agreement on pairs, where answers are found, what a ground truth may be."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from h1r_rl.config.schema import RewardConfig
from h1r_rl.errors import DataError
from h1r_rl.records import Prompt
from rewards.answer_text import final_answer
from rewards.exact_answer import compare_exactly
from rewards.ground_truth import check_ground_truth, check_ground_truths
from rewards.math_verifier import quick, verify

PAIRS = runpy.run_path(str(Path(__file__).with_name("answer_pairs.py")))


def judge(truth: str, text: str, function=verify):
    return function(
        Prompt("p", 0, np.zeros(0, np.int32), "q", "math", truth), text, RewardConfig()
    )


def test_agreement_table():
    """Not one judged wrongly; bare math-verify errs on a fifth of those written by hand."""
    table = PAIRS["pairs"]()
    assert len(table) >= 400
    assert 0.35 < sum(pair.equal for pair in table) / len(table) < 0.65
    assert PAIRS["errors"](PAIRS["ours"], table) == []
    handwritten = PAIRS["handwritten"]()
    assert len(PAIRS["errors"](PAIRS["bare_math_verify"], handwritten)) > len(handwritten) // 5


def test_exact_comparison_never_contradicts_the_table():
    decided = 0
    for pair in PAIRS["pairs"]():
        outcome = compare_exactly(pair.answer, pair.truth)
        decided += outcome is not None
        assert outcome in (None, pair.equal), pair
    assert decided > 100


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"\boxed{5}", "5"),
        (r"<think>\boxed{4}</think> so \boxed{5}.", "5"),
        (r"\boxed{4} and later \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{a}, \boxed{b}", "a, b"),
        (r"$\boxed{1}$ and $\boxed{2}$", "1, 2"),
        (r"either \boxed{1} or \boxed{2}", "1, 2"),
        (r"\boxed{1}. Check: so \boxed{2}", "2"),
        (r"\boxed{\boxed{7}}", "7"),
        (r"\boxed 7 ", "7"),
        (r"\fbox{7}", "7"),
        (r"\boxed{5} and then \boxed{unfinished", "5"),
        (r"\boxed{}", None),
        (r"The final answer is $\frac{3}{4}$.", r"\frac{3}{4}"),
        ("Answer: 12", "12"),
        ("**Answer:** 12", "12"),
        ("The answer is 1. No: the answer is **2**.", "2"),
        ("The answer is 3.5. It was easy to see.", "3.5"),
        ("The answer to the question is: x = 5", "x = 5"),
        ("Answer:\nnone", None),
        ("The answer is 5.\n" + "So it goes on. " * 300, None),
        ("so\n#### 1,234", "1,234"),
        ("<think>7+8=15</think>\n$15$", "15"),
        ("<think>x</think>\n42", "42"),
        ("<think>the answer is 5", None),
        (r"<think>perhaps \boxed{5}", "5"),
        ("I do not know", None),
        (r"<think>hm \boxed{5}? no</think>The answer is 6.", "6"),
        (r"<think>hm \boxed{5}</think>I do not know.", None),
        (r"<think>hm \boxed{5}</think>", "5"),
        (r"<think>hm \boxed{5}</think>" + "\n", "5"),
        (r"<think>\boxed{4}</think>\boxed{5}", "5"),
        (r"hm \boxed{5}</think>The answer is 6.", "6"),
        ("The answer is $3$ and $4$.", "3, 4"),
        ("The answer is $3$, $4$ and $5$.", "3, 4, 5"),
        ("The answer is $x=3$ or $x=4$.", "x=3, x=4"),
        ("The answer is $3$ or perhaps $4$.", "3, 4"),
        (r"The answer is \(3\) and \(4\).", "3, 4"),
        ("The answer is $5$ since $x=2$ and $y=3$.", "5"),
        ("The answer is $5$.", "5"),
        (r"\boxed{5} (or) \boxed{6}", "5, 6"),
        (r"\boxed{5}; \boxed{6}", "5, 6"),
        (r"\boxed{5} \\ \boxed{6}", "5, 6"),
        (r"\boxed{5} & \boxed{6}", "5, 6"),
        (r"\( \boxed{5} \) and \( \boxed{6} \)", "5, 6"),
        (r"**\boxed{5}** \text{ or } **\boxed{6}**", "5, 6"),
        ("\\boxed{5}\n\n\\boxed{5}", "5"),
        (r"\boxed{5}, \boxed{5}", "5, 5"),
        ("Final answer:\n\\[ 5 \\]", "5"),
        ("Final answer:\n\\[\n5\n\\]", "5"),
        ("The final answer is\n$$\\frac{1}{2}.$$", r"\frac{1}{2}"),
        ("**Final Answer**: $x = 5$", "x = 5"),
        ("**Final Answer:** $5$", "5"),
        ("The wrong answer is 5. The answer is 6", "6"),
        ("The wrong answer is 5.", None),
        ("I don't think the answer is 5.", None),
        ("The answer is 7. I don't think the answer is 5.", "7"),
        ("If the answer is 5, then x < 0.", None),
        ("If x is 3, the answer is 5.", "5"),
        ("The answer is 42, which is even.", "42"),
        ("The answer is 42 because 6 times 7 is.", "42"),
        ("The answer is 42, which is wrong.", "42, which is wrong"),
        ("The answer is 42 because x=2, or 6.", "42 because x=2, or 6"),
        ("The answer is therefore 42.", "42"),
        ("The answer is simply $42$.", "42"),
        ("**Final Answer:** The number of ways is $42$.", "42"),
        ("Answer: The sum is 42.", "42"),
        ("Answer: The number of ways is not 42.", "The number of ways is not 42"),
        ("**Final Answer**\n\n\\[\n42\n\\]", "42"),
        ("<think>x</think><answer> 42 </answer>", "42"),
        ("<answer>\nThe answer is 42.\n</answer>", "42"),
        ("The answer is E. coli.", "E. coli"),
        ("The answer is St. Petersburg. It is old.", "St. Petersburg"),
        ("", None),
    ],
)
def test_where_the_answer_is_found(text, answer):
    assert final_answer(text) == answer


def test_naming_two_values_is_not_naming_one():
    assert judge("5", r"\boxed{5} or \boxed{6}").score == 0.0
    assert judge("6", r"\boxed{5} or \boxed{6}").score == 0.0
    assert judge("5", r"\boxed{5 \text{ or } 6}").score == 0.0
    assert judge("5,6", r"\boxed{6} or \boxed{5}").score == 1.0
    assert judge("6", r"\boxed{5} (or) \boxed{6}").score == 0.0
    assert judge("3", "The answer is $x=3$ or $x=4$.").score == 0.0
    assert judge("3,4", "The answer is $x=3$ or $x=4$.").score == 1.0


def test_restating_the_problem_is_not_solving_it():
    assert judge("5050", r"\boxed{\sum_{k=1}^{100} k}").score == 0.0
    assert judge(r"\frac{1}{3}", r"\boxed{\int_0^1 x^2 dx}").score == 0.0


@pytest.mark.parametrize(
    ("question", "answer", "right"),
    [
        ("If $x=5$, what is the value of $2x-5$?", "2x-5=5", True),
        ("Solve $2x-5=5$.", "2x-5=5", False),
        ("Find the value of $x$ with $2x-5=5$.", "2x-5=5", False),
        ("Find $m+n$.", "m + n = 5", True),
        ("Find $100m+n$.", "m+n=5", False),
        ("Find $m+n+p$.", "m+n=5", False),
        ("Let $x+y=5$ and $x-y=5$. Find $x$.", "x+y=5", False),
        ("Let $x+y=5$. Find $x$ so that $3(x+y)=15$", "x+y=5", False),
        ("Compute $\\left|z\\right|$.", "|z|=5", True),
        ("Solve $|x|=5$ for positive $x$.", "|x|=5", False),
        ("What is $\\dfrac{a}{b}$?", r"\frac{a}{b}=5", True),
        ("The sum is 5. 2x-5. Find $x$.", "2x-5=5", False),
        ("", "m+n=5", False),
    ],
)
def test_what_the_question_asks_for_is_a_name(question, answer, right):
    prompt = Prompt("p", 0, np.zeros(0, np.int32), question, "math", "5")
    verdict = verify(prompt, f"\\boxed{{{answer}}}", RewardConfig())
    assert verdict.score == float(right)


def test_an_answer_longer_than_any_is_wrong_unread():
    for function in (quick, verify):
        verdict = judge("5", "The answer is " + "7" * 3_000, function)
        assert (verdict.score, verdict.reason) == (0.0, "answer_too_long")


def test_no_large_number_is_made_to_compare():
    """`quick` runs where nothing ends it: what would take long is left to the killable process."""
    for large in ("7" * 1_900, r"2\times 10^{999999999}", "2^{999999999}"):
        assert compare_exactly(large, r"\sqrt{2}") is None
        assert compare_exactly(large, "2") is None


def test_between_percentages_there_is_no_hundred():
    assert compare_exactly(r"50\%", r"50.0\%") is True
    for answer, truth in ((r"5000\%", r"50\%"), (r"50\%", r"5000\%"), ("5000", "50")):
        assert compare_exactly(answer, truth) is False


def test_several_correct_forms():
    truth = r'["\\frac{1}{2}", "50 \\text{ cents}"]'
    assert judge(truth, r"\boxed{0.5}").score == 1.0
    assert judge(truth, r"\boxed{50\text{ cents}}").score == 1.0
    assert judge(truth, r"\boxed{51}").score == 0.0


def test_reasons_and_parts():
    assert judge("5", r"\boxed{5}").reason == "correct"
    assert judge("5", r"\boxed{6}").reason == "wrong"
    assert judge("5", "hm").reason == "no_answer"
    assert judge("5", r"\boxed{6}").parts == {"accuracy": 0.0}


def test_plain_numbers_need_no_algebra():
    before = "sympy" in sys.modules
    for truth, text in [("5", "6"), ("1/2", "0.5"), ("1,000", "999"), ("-3", "-3"), ("2.5", "x")]:
        verdict = judge(truth, f"\\boxed{{{text}}}", quick)
        assert (verdict is None) == (text == "x")
    assert ("sympy" in sys.modules) == before


def test_ground_truths_checked_at_load():
    rows = [
        ("math", "5"),
        ("math", r"\frac{1}{2}"),
        ("math", r"x \in [0, 1)"),
        ("math", r"\frac{1\pm\sqrt5}{2}"),
        ("math", r"12\frac12\%"),
        ("math", '[ "1/2", 0.5 ]'),
        ("math", r"1.5\text{ million}"),
        ("math", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}"),
        ("math", r"\frac{\pi}{6}+2\pi k, k\in\mathbb{Z}"),
        ("math", ""),
        ("math", r"\frac{1}{"),
        ("math", "9" * 3000),
        ("math", r'["1/2", "\\frac{1}{"]'),
        ("choice", "B"),
        ("choice", "mitochondria"),
        ("choice", "  "),
    ]
    reasons = check_ground_truths(rows)
    assert reasons == [*[None] * 9, "empty", "unparsable", "too_long", "unparsable",
                       None, None, "empty"]


def test_a_hostile_ground_truth_costs_its_own_row():
    config = RewardConfig(timeout_s=1.0)
    rows = [("math", r"\sqrt{2}"), ("math", "(" * 900 + "1" + ")" * 900), ("math", r"\sqrt{3}")]
    assert check_ground_truths(rows, config) == [None, "ground_truth_timeout", None]


def test_an_unknown_verifier_is_an_error_of_the_data_set():
    with pytest.raises(DataError, match="mathematics"):
        check_ground_truth("mathematics", "5")
    with pytest.raises(DataError, match="no_such_package"):
        check_ground_truth("no_such_package:verify", "5")
