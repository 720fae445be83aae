"""What a step says of itself, against counts by hand."""

from types import SimpleNamespace

import numpy as np
import pytest

from cluster.step_metrics import (
    EngineMeter,
    advantage_metrics,
    finished_metrics,
    one_line,
    trained_metrics,
)
from h1r_rl.config.schema import AlgorithmConfig
from h1r_rl.grpo.build_batch import plan_train_batch
from h1r_rl.records import Group, Prompt, Sample, Verdict, VersionSpan

TOTALS = ("tokens", "prefill_tokens", "cached_tokens", "reprefilled", "preemptions", "busy_s")


def numbers(**given):
    zero = dict.fromkeys((*TOTALS, "pause_s", "running", "waiting", "kv_usage"), 0.0)
    return zero | {name: float(value) for name, value in given.items()}


@pytest.fixture
def clock(monkeypatch):
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr("cluster.step_metrics.time.monotonic", lambda: now.s)
    return now


def test_rates_are_differences_over_the_time_between_two_steps(clock):
    meter = EngineMeter()
    clock.s += 4
    meter.read({"rollout-0": numbers(tokens=1000, busy_s=1.0)})
    clock.s += 2
    found = meter.read(
        {
            "rollout-0": numbers(
                tokens=1600, busy_s=2.5, running=7, waiting=2, kv_usage=0.25, preemptions=3,
                reprefilled=40, pause_s=0.5,
            ),
            "rollout-1": numbers(tokens=100, busy_s=0.5, running=1, kv_usage=0.5),  # a joiner
        }
    )  # fmt: skip
    own = {"tokens_per_s": 300, "running": 7, "waiting": 2, "kv_usage": 0.25, "preemptions": 3,
           "reprefilled": 40, "pause_s": 0.5, "bubble": 0.25}  # fmt: skip
    assert {key: found[f"engine/rollout-0/{key}"] for key in own} == own
    assert found["engine/tokens_per_s"] == 350 and found["engine/running"] == 8
    assert found["engine/kv_usage"] == 0.5  # the fullest
    assert found["engine/bubble"] == pytest.approx((0.25 + 0.75) / 2)
    clock.s += 1
    assert meter.read({})["engine/bubble"] == 1.0


def sample(spans):
    spans = tuple(VersionSpan(str(version), start, stop) for version, start, stop in spans)
    return Sample(0, spans[-1].end, "stop", spans, Verdict(1.0), None, 0, "rollout-0")


def test_shares_of_tokens_by_age():
    prompt = Prompt("p", 0, np.zeros(1, np.int32), "", "math", "1")
    samples = (sample([(5, 0, 6), (7, 6, 8)]), sample([(7, 0, 2)]))
    found = trained_metrics([Group(prompt, samples, 5)], version=7, max_staleness=2)
    assert found["rollout/staleness_mean"] == 1 and found["rollout/staleness_max"] == 2
    shares = [found[f"rollout/tokens_age_{age}"] for age in range(3)]
    assert shares == pytest.approx([0.4, 0.0, 0.6])


def test_tokens_beyond_the_bound_have_a_share_of_their_own():
    """After a fault; they are masked in the loss."""
    prompt = Prompt("p", 0, np.zeros(1, np.int32), "", "math", "1")
    groups = [Group(prompt, (sample([(2, 0, 3), (5, 3, 4), (6, 4, 6), (7, 6, 10)]),), 2)]
    found = trained_metrics(groups, version=7, max_staleness=1)
    shares = {key.removeprefix("rollout/tokens_age_"): value for key, value in found.items()}
    assert [shares[age] for age in ("0", "1", "over")] == pytest.approx([0.4, 0.2, 0.4])
    assert found["rollout/staleness_max"] == 5


def judged(name, *scores):
    spans = (VersionSpan("0", 0, 2),)
    samples = tuple(
        Sample(i, 2, "stop", spans, Verdict(score), None, i) for i, score in enumerate(scores)
    )
    return Group(Prompt(name, 0, np.zeros(1, np.int32), "", "math", "1"), samples, 0)


@pytest.mark.parametrize(
    ("settings", "spread", "most"),
    [
        ({}, 1.0, 2.0),  # (1 - 0.2) / 0.4 of one right in five; the even group gives 1
        ({"advantage": "dr_grpo"}, ((5 * 0.16 + 2 * 0.25) / 7) ** 0.5, 0.8),
    ],
    ids=["grpo", "dr_grpo"],
)
def test_the_spread_of_advantages_is_not_that_of_scores(settings, spread, most):
    """By hand; a sample without a verdict has no part in it."""
    algorithm = AlgorithmConfig(**settings)
    groups = [judged("a", 1.0, 0.0, 0.0, 0.0, 0.0), judged("b", 1.0, 0.0, None)]
    plan = plan_train_batch(
        groups, algorithm, ranks=1, micro_batch_tokens=64, learner_version=0, max_staleness=0
    )
    found = advantage_metrics(plan, algorithm)
    assert found["learner/advantage_spread"] == pytest.approx(spread, abs=1e-5)
    assert found["learner/advantage_max"] == pytest.approx(most, abs=1e-4)
    scores = finished_metrics([(group, 1.0) for group in groups], algorithm)
    assert scores["reward/score_spread"] == pytest.approx((0.4 + 0.5) / 2)


def test_a_line_a_step_has_it_all(clock):
    meter = EngineMeter()
    clock.s += 1
    metrics = meter.read(
        {"rollout-0": numbers(tokens=512, running=3, waiting=4, kv_usage=0.31, busy_s=0.8,
                              preemptions=5, reprefilled=66)}
    ) | {  # fmt: skip
        "time/step_s": 2.5, "reward/mean": 0.125, "learner/bubble": 0.44,
        "weights/transfer_s": 0.077, "weights/bytes_per_s": 99e6, "weights/pause_s": 0.033,
        "buffer/slots_used": 13, "buffer/slots": 16, "rollout/tokens_age_0": 0.7,
        "rollout/tokens_age_1": 0.3,
    }  # fmt: skip
    line = one_line(9, metrics)
    for words in (
        "step 9", "2.50 s", "reward 0.125", "rollout-0 512 tok/s", "run 3", "wait 4", "kv 31%",
        "idle 20%", "preempted 5", "refilled 66", "learner 44%", "engines 20%", "0.077 s",
        "99 MB/s", "pause 33 ms", "slots 13/16", "0:70% 1:30%",
    ):  # fmt: skip
        assert words in line, words
    assert "\n" not in line
