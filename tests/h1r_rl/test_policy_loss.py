"""Every objective against its formula written out token by token, in float64."""

import math

import numpy as np
import pytest
import torch

from h1r_rl.config.schema import AlgorithmConfig
from h1r_rl.grpo.build_batch import TrainPlan
from h1r_rl.grpo.policy_loss import (
    LossInputs,
    policy_loss,
    reduce_metrics,
    reference_kl,
    sft_loss,
)
from h1r_rl.grpo.presets import PRESETS

LENGTHS = (3, 1, 5, 4)
MAX_TOKENS = 50


def make_inputs(lengths=LENGTHS, seed=0):
    rng = np.random.default_rng(seed)
    n = sum(lengths)
    theta = -rng.exponential(1, n)

    def tensor(values):
        return torch.tensor(values, dtype=torch.float64)

    return LossInputs(
        logprobs=tensor(theta).requires_grad_(),
        behaviour=tensor(theta + rng.normal(0, 0.5, n)),
        proximal=tensor(theta + rng.normal(0, 0.3, n)),
        reference=tensor(theta + rng.normal(0, 0.4, n)),
        advantages=tensor(np.repeat(rng.normal(0, 1, len(lengths)), lengths)),
        document=torch.tensor(np.repeat(np.arange(len(lengths)), lengths)),
        num_documents=len(lengths),
        versions=torch.tensor(rng.integers(2, 5, n), dtype=torch.int32),
        positive=torch.tensor(np.repeat(np.arange(len(lengths)) % 2 == 0, lengths)),
        entropy=tensor(rng.exponential(1, n)),
        fresh=torch.tensor(rng.random(n) < 0.5),
    )


def make_plan(inputs):
    return TrainPlan(
        "grpo", 4, 2, (), (), len(inputs.behaviour), inputs.num_documents,
        int(inputs.positive.sum()),
    )  # fmt: skip


def brute_force(theta, inputs, a):
    """The objective of recipe section 2, one token at a time. `theta`: list of floats."""
    mu, prox, ref = (t.tolist() for t in (inputs.behaviour, inputs.proximal, inputs.reference))
    adv, doc = inputs.advantages.tolist(), inputs.document.tolist()
    size = [doc.count(d) for d in range(inputs.num_documents)]
    recompute = a.proximal == "recompute"
    anchor = prox if recompute else mu
    now = inputs.logprobs.tolist()  # what a stop-gradient sees
    total = 0.0
    for t in range(len(theta)):
        mates = [i for i in range(len(theta)) if doc[i] == doc[t]]
        rho = math.exp(theta[t] - anchor[t])
        if a.policy_loss == "gspo":
            rho = math.exp(sum(theta[i] - anchor[i] for i in mates) / len(mates))
        bounded = min(max(rho, 1 - a.clip_low), 1 + a.clip_high)
        if a.policy_loss == "cispo":
            frozen = min(max(math.exp(now[t] - anchor[t]), 1 - a.clip_low), 1 + a.clip_high)
            loss = -frozen * adv[t] * theta[t]
        else:
            gain = min(rho * adv[t], bounded * adv[t])
            if a.policy_loss == "dual_clip" and adv[t] < 0:
                gain = max(gain, a.dual_clip * adv[t])
            loss = -gain
        if recompute and a.correction.kind != "none":
            w = math.exp(prox[t] - mu[t])
            if a.correction.level == "sequence":
                w = math.exp(sum(prox[i] - mu[i] for i in mates) / len(mates))
            if a.correction.kind == "tis":
                loss *= min(w, a.correction.cap)
            elif not a.correction.low <= w <= a.correction.high:
                loss = 0.0
            else:
                loss *= w
        if a.kl.coefficient:
            r = math.exp(ref[t] - theta[t])
            k = {"k1": -math.log(r), "k2": math.log(r) ** 2 / 2, "k3": r - 1 - math.log(r)}
            loss += a.kl.coefficient * k[a.kl.estimator]
        weight = {
            "token_mean": 1 / len(theta),
            "sequence_mean": 1 / (size[doc[t]] * inputs.num_documents),
            "constant": 1 / (inputs.num_documents * MAX_TOKENS),
        }[a.aggregation]
        total += loss * weight
        if a.positive_ce and inputs.positive[t]:
            total += a.positive_ce * -theta[t] / int(inputs.positive.sum())
    return total


CASES = [
    *({"preset": name} for name in PRESETS),
    {"policy_loss": "dual_clip", "dual_clip": 1.05},
    {"policy_loss": "gspo", "aggregation": "sequence_mean", "clip_low": 0.1, "clip_high": 0.1},
    {"policy_loss": "cispo", "clip_low": 0.2, "clip_high": 0.2},
    {"aggregation": "constant", "kl": {"coefficient": 0.3, "estimator": "k1"}},
    {"kl": {"coefficient": 0.3, "estimator": "k2"}, "positive_ce": 0.5},
    {"proximal": "recompute", "correction": {"kind": "tis", "cap": 1.05}},
    {"proximal": "recompute", "correction": {"kind": "tis", "level": "sequence", "cap": 1.05}},
    {
        "proximal": "recompute",
        "correction": {"kind": "mask", "level": "sequence", "low": 0.95, "high": 1.05},
    },
    {"proximal": "recompute", "correction": {"kind": "mask", "low": 0.8, "high": 1.2}},
    {"proximal": "recompute", "correction": {"kind": "none"}},
]


def algorithm_of(case):
    case = dict(case)
    return AlgorithmConfig(**(PRESETS.get(case.pop("preset", ""), {}) | case))


def with_proximal(inputs, algorithm, **changes):
    fields = {name: getattr(inputs, name) for name in LossInputs.__slots__}
    if algorithm.proximal == "behaviour":
        fields["proximal"] = None
    return LossInputs(**(fields | changes))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_value_and_gradient_equal_the_formula(case):
    algorithm, inputs = algorithm_of(case), make_inputs()
    loss, _ = policy_loss(
        with_proximal(inputs, algorithm), algorithm, make_plan(inputs),
        max_response_tokens=MAX_TOKENS,
    )  # fmt: skip
    theta = inputs.logprobs.tolist()
    assert loss.item() == pytest.approx(brute_force(theta, inputs, algorithm), rel=1e-10)
    [gradient] = torch.autograd.grad(loss, inputs.logprobs)
    for t in range(len(theta)):
        step = [v + 1e-6 * (i == t) for i, v in enumerate(theta)]
        back = [v - 1e-6 * (i == t) for i, v in enumerate(theta)]
        slope = brute_force(step, inputs, algorithm) - brute_force(back, inputs, algorithm)
        assert gradient[t].item() == pytest.approx(slope / 2e-6, rel=1e-5, abs=1e-8)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_micro_batches_add_up_to_the_whole(case):
    algorithm, inputs = algorithm_of(case), make_inputs()
    plan, whole = make_plan(inputs), with_proximal(inputs, algorithm)
    loss, sums = policy_loss(whole, algorithm, plan, max_response_tokens=MAX_TOKENS)
    parts = []
    for keep in (inputs.document < 1, inputs.document > 0, inputs.document > 9):
        changes = {
            name: None if getattr(whole, name) is None else getattr(whole, name)[keep]
            for name in LossInputs.__slots__
            if name != "num_documents"
        }
        part = LossInputs(num_documents=inputs.num_documents, **changes)
        parts.append(policy_loss(part, algorithm, plan, max_response_tokens=MAX_TOKENS))
    assert sum(p[0].item() for p in parts) == pytest.approx(loss.item(), rel=1e-10)
    added = {name: sum(p[1][name].item() for p in parts) for name in sums}
    for name, value in sums.items():
        assert added[name] == pytest.approx(value.item(), rel=1e-6), name
    assert reduce_metrics(added)["target_tokens"] == sum(LENGTHS)


def test_far_ratios_stay_finite():
    inputs = make_inputs()
    far = with_proximal(inputs, AlgorithmConfig(), behaviour=inputs.behaviour - 500)
    loss, _ = policy_loss(far, AlgorithmConfig(), make_plan(inputs), max_response_tokens=9)
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(inputs.logprobs.grad).all()


def test_metrics_mean_what_their_names_say():
    inputs = make_inputs()
    _, sums = policy_loss(
        with_proximal(inputs, AlgorithmConfig()), AlgorithmConfig(), make_plan(inputs),
        max_response_tokens=9,
    )  # fmt: skip
    metrics = reduce_metrics({k: v.item() for k, v in sums.items()})
    delta = (inputs.logprobs.detach() - inputs.behaviour).numpy()
    ages = 4 - inputs.versions.numpy()
    k3 = np.exp(delta) - 1 - delta
    fresh = inputs.fresh.numpy()
    assert metrics["logprob_gap"] == pytest.approx(np.abs(delta[fresh]).mean())
    assert metrics["logprob_gap_stale"] == pytest.approx(np.abs(delta[~fresh]).mean())
    score = (inputs.logprobs + inputs.entropy).detach().numpy()[fresh]
    assert metrics["temperature_slip"] == pytest.approx(
        (delta[fresh] * score).sum() / (score**2).sum()
    )
    assert metrics["temperature_slip_error"] == pytest.approx(
        np.sqrt((delta[fresh] ** 2 * score**2).sum()) / (score**2).sum()
    )
    assert metrics["kl_behaviour"] == pytest.approx(k3.mean())
    assert metrics["kl_behaviour_age_2"] == pytest.approx(k3[ages == 2].mean())
    assert metrics["entropy"] == pytest.approx(inputs.entropy.mean().item())
    adv = inputs.advantages.numpy()
    clipped = np.where(adv > 0, np.exp(delta) > 1.28, np.exp(delta) < 0.8)
    assert metrics["clip_fraction"] == pytest.approx(clipped.mean())
    for age in range(3):
        expected = clipped[ages == age].mean() if (ages == age).any() else 0.0
        assert metrics.get(f"clip_fraction_age_{age}", 0.0) == pytest.approx(expected)
    corrected = AlgorithmConfig(proximal="recompute", correction={"kind": "tis", "cap": 1.1})
    moved = with_proximal(inputs, corrected)
    _, sums = policy_loss(moved, corrected, make_plan(inputs), max_response_tokens=9)
    metrics = reduce_metrics({k: v.item() for k, v in sums.items()})
    cut = ((moved.proximal - moved.behaviour).exp() > 1.1).numpy()
    assert 0 < metrics["truncated_share"] < 1
    assert metrics["truncated_share_age_2"] == pytest.approx(cut[ages == 2].mean())
    weights = (moved.proximal - moved.behaviour).exp().clamp(max=1.1).numpy()
    assert metrics["correction_weight"] == pytest.approx(weights.mean())
    assert metrics["correction_weight_age_2"] == pytest.approx(weights[ages == 2].mean())
    assert not [name for name in metrics if "clip" in name]  # nothing could have been clipped


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_divergence_from_the_reference_is_logged(estimator):
    inputs = make_inputs()
    algorithm = AlgorithmConfig(kl={"coefficient": 0.3, "estimator": estimator})
    _, sums = policy_loss(
        with_proximal(inputs, algorithm), algorithm, make_plan(inputs), max_response_tokens=9
    )
    metrics = reduce_metrics({k: v.item() for k, v in sums.items()})
    expected = reference_kl(inputs.logprobs, inputs.reference, estimator).mean()
    assert metrics["kl_reference"] == pytest.approx(expected.item())


def test_k1_pulls_nowhere_on_average():
    """Summed over a policy's own distribution its gradient is 0; k2's is the divergence's."""
    logits = torch.randn(7, dtype=torch.float64, requires_grad=True)
    logprobs, reference = logits.log_softmax(0), torch.randn(7).double().log_softmax(0)
    chances = logprobs.exp().detach()

    def pull(values):
        return torch.autograd.grad(values, logits, retain_graph=True)[0]

    divergence = pull((logprobs.exp() * (logprobs - reference)).sum())
    k1, k2 = ((chances * reference_kl(logprobs, reference, k)).sum() for k in ("k1", "k2"))
    assert divergence.abs().max() > 0.01
    torch.testing.assert_close(pull(k1), torch.zeros(7).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(pull(k2), divergence)


def test_kl_estimators_agree_with_the_divergence_on_average():
    p, q = torch.tensor([[0.7, 0.2, 0.1], [0.5, 0.3, 0.2]], dtype=torch.float64)
    exact = (p * (p / q).log()).sum().item()
    for estimator in ("k1", "k3"):  # unbiased under samples of pi_theta
        mean = (p * reference_kl(p.log(), q.log(), estimator)).sum().item()
        assert mean == pytest.approx(exact, rel=1e-9)
    assert (p * reference_kl(p.log(), q.log(), "k2")).sum().item() == pytest.approx(exact, rel=0.2)


def test_sft_weighs_every_token_of_the_step_alike():
    logprobs = torch.tensor([-1.0, -3.0, -2.0])
    parts = [sft_loss(logprobs[:1], 3)[0], sft_loss(logprobs[1:], 3)[0]]
    assert sum(parts).item() == pytest.approx(2.0)
