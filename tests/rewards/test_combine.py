"""Format, soft overlong punishment, endings, weights and controls: from parts to one score."""

from __future__ import annotations

import numpy as np
import pytest

from h1r_rl.config.schema import RewardConfig
from h1r_rl.records import Completion, Prompt, Verdict, VersionSpan
from rewards.combine import combine
from rewards.controls import shuffle_scores
from rewards.format_verifier import well_formed
from rewards.judge import Judge
from rewards.overlong import soft_overlong

GOOD = r"<think>7+8=5</think>\boxed{5}"


def completion(text: str = GOOD, length: int = 50, finish: str = "stop") -> Completion:
    ids = np.zeros(length, np.int32)
    return Completion(
        0, ids, np.zeros(length, np.float32), (VersionSpan("0", 0, length),), finish, text, "e"
    )


@pytest.mark.parametrize(
    ("text", "ok"),
    [
        (GOOD, True),
        ("  <think>\na\n</think>\n\nb  ", True),
        ("<think>a</think>", False),
        ("<think>a</think>  \n", False),
        ("<think></think>b", False),
        ("<think> \n</think>b", False),
        ("<think>a", False),
        ("a</think>b", False),
        ("so <think>a</think>b", False),
        ("<think>a</think>b<think>c</think>d", False),
        ("<think>a<think>b</think>c", False),
        ("<think>a</think>b</think>c", False),
        ("</think>a<think>b", False),
        ("b", False),
        ("", False),
        ("<THINK>a</THINK>b", False),
        ("<think>" * 5_000_000, False),
    ],
)
def test_format(text, ok):
    assert well_formed(text) is ok


def test_soft_overlong_is_the_papers():
    """L_max 20,480 and L_c 4,096: free up to 16,384, -0.5 half way, -1 at and beyond the limit."""
    lengths = [0, 16_384, 16_385, 18_432, 20_480, 30_000]
    values = [soft_overlong(n, 20_480, 4_096) for n in lengths]
    assert values == [0.0, 0.0, pytest.approx(-1 / 4096), -0.5, -1.0, -1.0]
    assert soft_overlong(30_000, 20_480, 0) == 0.0


def test_weights_and_parts():
    config = RewardConfig(format_weight=0.1, overlong_cache_tokens=40, overlong_weight=0.5)
    verdict = combine(config, Verdict(1.0, {"accuracy": 1.0}, "correct"), completion("x", 80), 100)
    assert verdict.parts == {"accuracy": 1.0, "format": 0.0, "overlong": -0.5}
    assert verdict.score == pytest.approx(1.0 - 0.1 - 0.25)
    assert verdict.reason == "correct"
    verdict = combine(config, Verdict(0.0, {"accuracy": 0.0}, "wrong"), completion(length=60), 100)
    assert (verdict.score, verdict.parts["overlong"]) == (0.0, 0.0)


def test_a_fraction_is_its_own_accuracy_part():
    assert combine(RewardConfig(), Verdict(0.25), completion(), 100).parts["accuracy"] == 0.25


@pytest.mark.parametrize("control", ["none", "format_only", "constant", "shuffled"])
def test_no_verdict_stays_without_a_score(control):
    config = RewardConfig(format_weight=0.1, overlong_cache_tokens=40, control=control)
    verdict = combine(config, Verdict(None, {}, "worker_lost"), completion(), 100)
    assert (verdict.score, verdict.reason) == (None, "worker_lost")
    assert "accuracy" not in verdict.parts


def judged(config: RewardConfig, ended: Completion) -> Verdict:
    judge = Judge(config, max_response_tokens=100)
    try:
        return judge.verdict(Prompt("p", 0, np.zeros(0, np.int32), "q", "math", "5"), ended)
    finally:
        judge.close()


def test_the_table_of_endings():
    config = RewardConfig(overlong_cache_tokens=50)
    assert judged(config, completion(finish="stop")).score == 1.0
    late = judged(config, completion(length=100, finish="length"))
    assert (late.score, late.parts["accuracy"], late.parts["overlong"]) == (0.0, 1.0, -1.0)
    cut = judged(config, completion("<think>7+8", length=100, finish="length"))
    assert (cut.score, cut.reason) == (-1.0, "no_answer")


def test_pruned_is_zero_or_nothing_by_setting():
    ended = completion(length=10, finish="pruned")
    zero = judged(RewardConfig(), ended)
    assert (zero.score, zero.reason, zero.parts["accuracy"]) == (0.0, "pruned", 0.0)
    nothing = judged(RewardConfig(pruned="none"), ended)
    assert (nothing.score, nothing.reason) == (None, "pruned")


def test_controls_keep_the_accuracy_in_the_parts():
    right, wrong = completion(), completion(r"\boxed{6}")
    only = [judged(RewardConfig(control="format_only"), c) for c in (right, wrong)]
    assert [(v.score, v.parts["accuracy"]) for v in only] == [(1.0, 1.0), (0.0, 0.0)]
    same = [judged(RewardConfig(control="constant"), c) for c in (right, wrong)]
    assert [(v.score, v.parts["accuracy"]) for v in same] == [(1.0, 1.0), (1.0, 0.0)]


def test_shuffled_scores():
    rng = np.random.default_rng(0)
    scores = [np.array([1.0, 0.0, np.nan]), np.array([1.0]), np.array([0.0, 0.0, 0.5, np.nan])]
    original = [group.copy() for group in scores]
    shuffled = [shuffle_scores(scores, rng) for _ in range(50)]
    for groups in shuffled:
        assert [len(group) for group in groups] == [3, 1, 4]
        for before, after in zip(scores, groups, strict=True):
            assert np.array_equal(np.isnan(before), np.isnan(after))
        flat = np.concatenate(groups)
        assert sorted(flat[~np.isnan(flat)]) == [0.0, 0.0, 0.0, 0.5, 1.0, 1.0]
    assert {groups[1][0] for groups in shuffled} == {0.0, 0.5, 1.0}  # scores cross groups
    for group, kept in zip(scores, original, strict=True):
        assert np.array_equal(group, kept, equal_nan=True)
