"""The policy loss against its definitions, written out in float64 token by token."""

import itertools
import math

import numpy as np
import pytest
import torch

from h1r_rl.config.schema import AlgorithmConfig
from h1r_rl.grpo.advantages import batch_std, group_advantages, has_signal
from h1r_rl.grpo.build_batch import TrainPlan
from h1r_rl.grpo.policy_loss import LossInputs, policy_loss, reference_kl, sft_loss

LENGTHS = (3, 1, 5)
MAX_TOKENS = 7


def plan(**changes) -> TrainPlan:
    values = {
        "objective": "grpo",
        "learner_version": 2,
        "oldest_version": 1,
        "groups": (),
        "ranks": (),
        "num_target_tokens": sum(LENGTHS),
        "num_sequences": len(LENGTHS),
        "num_positive_tokens": LENGTHS[0],
    }
    return TrainPlan(**(values | changes))


def inputs(seed=0, recompute=False) -> LossInputs:
    rng = torch.Generator().manual_seed(seed)

    def draw(scale=1.0):
        return torch.randn(sum(LENGTHS), generator=rng, dtype=torch.float64) * scale

    behaviour = -draw().abs()
    document = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    return LossInputs(
        logprobs=(behaviour + draw(0.6)).requires_grad_(),
        behaviour=behaviour,
        proximal=behaviour + draw(0.9) if recompute else None,
        reference=None,
        advantages=draw()[document],
        document=document,
        num_documents=len(LENGTHS),
        versions=torch.tensor([1, 2] * 4 + [2], dtype=torch.int32),
        positive=document == 0,
        entropy=draw().abs(),
        fresh=document == 1,
    )


def by_definition(x: LossInputs, a: AlgorithmConfig) -> float:
    """Plain Python over tokens; the formulas as the papers print them."""
    total = 0.0
    for d, length in enumerate(LENGTHS):
        at = [i for i in range(sum(LENGTHS)) if int(x.document[i]) == d]
        sequence = 0.0
        mean_log = sum(float(x.logprobs[i] - x.behaviour[i]) for i in at) / length
        for i in at:
            anchor = x.behaviour[i] if x.proximal is None else x.proximal[i]
            ratio = math.exp(float(x.logprobs[i] - anchor))
            if a.policy_loss == "gspo":
                ratio = math.exp(mean_log)
            adv = float(x.advantages[i])
            bounded = min(max(ratio, 1 - a.clip_low), 1 + a.clip_high)
            value = min(ratio * adv, bounded * adv)
            if a.policy_loss == "dual_clip" and adv < 0:
                value = max(value, a.dual_clip * adv)
            if a.policy_loss == "cispo":
                value = bounded * adv * float(x.logprobs[i])
            if x.proximal is not None and a.correction.kind != "none":
                w = math.exp(float(x.proximal[i] - x.behaviour[i]))
                if a.correction.kind == "tis":
                    value *= min(w, a.correction.cap)
                else:  # IcePop keeps the weight inside its range
                    value *= w if a.correction.low <= w <= a.correction.high else 0.0
            sequence += -value
        weight = {
            "token_mean": 1 / sum(LENGTHS),
            "sequence_mean": 1 / (length * len(LENGTHS)),
            "constant": 1 / (len(LENGTHS) * MAX_TOKENS),
        }[a.aggregation]
        total += sequence * weight
    positives = [float(x.logprobs[i]) for i in range(sum(LENGTHS)) if bool(x.positive[i])]
    return total - a.positive_ce * sum(positives) / len(positives)


@pytest.mark.parametrize(
    "surrogate, aggregation",
    itertools.product(
        ("clip", "dual_clip", "gspo", "cispo"), ("token_mean", "sequence_mean", "constant")
    ),
)
def test_loss_is_its_definition(surrogate, aggregation):
    algorithm = AlgorithmConfig(
        policy_loss=surrogate, aggregation=aggregation, positive_ce=0.1, dual_clip=1.5
    )
    for seed in range(5):
        x = inputs(seed)
        loss, _ = policy_loss(x, algorithm, plan(), max_response_tokens=MAX_TOKENS)
        assert float(loss.detach()) == pytest.approx(by_definition(x, algorithm), rel=1e-10)


@pytest.mark.parametrize("kind", ["none", "tis", "mask"])
def test_corrections_are_their_definition(kind):
    algorithm = AlgorithmConfig.model_validate(
        {"proximal": "recompute", "correction": {"kind": kind, "cap": 1.5, "low": 0.7, "high": 1.4}}
    )
    x = inputs(3, recompute=True)
    loss, sums = policy_loss(x, algorithm, plan(), max_response_tokens=MAX_TOKENS)
    assert float(loss.detach()) == pytest.approx(by_definition(x, algorithm), rel=1e-10)
    if kind != "none":
        assert 0 < float(sums["sum/truncated_share"]) < sum(LENGTHS)


@pytest.mark.parametrize("surrogate", ["clip", "dual_clip", "gspo"])
def test_gradient_is_that_of_the_definition(surrogate):
    algorithm = AlgorithmConfig(policy_loss=surrogate, positive_ce=0.1)
    x = inputs(1)
    loss, _ = policy_loss(x, algorithm, plan(), max_response_tokens=MAX_TOKENS)
    (gradient,) = torch.autograd.grad(loss, x.logprobs)
    for i in range(sum(LENGTHS)):
        sides = []
        for sign in (1, -1):
            y = inputs(1)
            with torch.no_grad():
                y.logprobs[i] += sign * 1e-6
            sides.append(by_definition(y, algorithm))
        assert float(gradient[i]) == pytest.approx((sides[0] - sides[1]) / 2e-6, abs=1e-7)


def test_reference_kl_estimators():
    pi, ref = torch.tensor([-1.0, -2.0]).double(), torch.tensor([-1.5, -1.0]).double()
    log_r = ref - pi
    assert torch.allclose(reference_kl(pi, ref, "k1"), -log_r)
    assert torch.allclose(reference_kl(pi, ref, "k2"), log_r**2 / 2)
    assert torch.allclose(reference_kl(pi, ref, "k3"), log_r.exp() - 1 - log_r)


def test_sft_loss_is_the_global_token_mean():
    logprobs = torch.tensor([-1.0, -3.0])
    loss, _ = sft_loss(logprobs, num_target_tokens=8)
    assert float(loss.detach()) == pytest.approx(0.5)


def test_advantages_are_their_definitions():
    scores = np.array([1.0, 0.0, np.nan, 0.0, 1.0])
    judged = scores[~np.isnan(scores)]
    mean, std = judged.mean(), judged.std()
    expected = (scores - mean) / (std + 1e-6)
    expected[2] = 0.0
    assert np.allclose(group_advantages(scores, "grpo"), expected)
    assert np.allclose(group_advantages(scores, "dr_grpo")[0], 1 - mean)
    others = judged[1:].mean()
    assert np.allclose(group_advantages(scores, "rloo")[0], 1 - others)
    assert np.allclose(group_advantages(scores, "grpo", std=2.0)[0], (1 - mean) / (2 + 1e-6))
    assert batch_std([scores, np.array([3.0, 3.0])]) == pytest.approx(
        np.concatenate([judged - mean, [0, 0]]).std()
    )


def test_signal_needs_two_different_verdicts():
    assert has_signal(np.array([0.0, 1.0]))
    assert not has_signal(np.array([1.0, 1.0, np.nan]))
    assert not has_signal(np.array([1.0, np.nan]))
