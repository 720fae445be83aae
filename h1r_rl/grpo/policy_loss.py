"""The policy-gradient objective on the target tokens of one micro-batch.

Invariant: each micro-batch's loss is already divided by *global* counts, so the plain sum over
micro-batches and ranks is the objective on the whole batch, whatever the split. Metrics are
additive sums for the same reason; `reduce_metrics` turns the global sums into means.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from h1r_rl.config.schema import AlgorithmConfig
from h1r_rl.grpo.build_batch import TrainPlan
from h1r_rl.grpo.corrections import correction_weight
from h1r_rl.grpo.surrogates import surrogate_loss
from h1r_rl.hybrid.logprob_gap import slip_terms, temperature_slip

SLIP_SUMS = ("slip/products", "slip/squares", "slip/squared_products")
MAX_LOG_RATIO = 20.0  # exp stays finite in float32; far outside any clip range


@dataclass(frozen=True, slots=True)
class LossInputs:
    """N target tokens of one micro-batch, flat. float32 unless said otherwise."""

    logprobs: Tensor  # [N] log pi_theta, with gradient
    behaviour: Tensor  # [N] log mu, as the engine sampled
    proximal: Tensor | None  # [N] log pi_prox for proximal: recompute
    reference: Tensor | None  # [N] log pi_ref where a KL term is on
    advantages: Tensor  # [N]
    document: Tensor  # [N] int64, which document of the micro-batch
    num_documents: int
    versions: Tensor  # [N] int32
    positive: Tensor  # [N] bool
    entropy: Tensor  # [N], detached
    fresh: Tensor  # [N] bool, token of an answer that the current weights alone sampled


def policy_loss(
    inputs: LossInputs, algorithm: AlgorithmConfig, plan: TrainPlan, *, max_response_tokens: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """(scalar share of the global objective, sums of metrics):

    sum_t weight_t (w_t surrogate_t + beta KL_t) + lambda x cross-entropy on positives.
    """
    anchor = inputs.behaviour if inputs.proximal is None else inputs.proximal
    log_ratio = (inputs.logprobs - anchor).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if algorithm.policy_loss == "gspo":
        log_ratio = gspo_log_ratio(log_ratio, inputs)
    surrogate, clipped = surrogate_loss(log_ratio, inputs.advantages, inputs.logprobs, algorithm)
    weight, truncated = _correction(inputs, algorithm)
    per_token = surrogate * weight
    kl = None
    if inputs.reference is not None and algorithm.kl.coefficient:
        kl = reference_kl(inputs.logprobs, inputs.reference, algorithm.kl.estimator)
        per_token = per_token + algorithm.kl.coefficient * kl
    loss = (per_token * token_weights(inputs, algorithm, plan, max_response_tokens)).sum()
    if algorithm.positive_ce and plan.num_positive_tokens:
        positives = positive_cross_entropy(inputs, plan.num_positive_tokens)
        loss = loss + algorithm.positive_ce * positives
    per_token_sums: dict[str, Tensor] = {"truncated_share": truncated}
    if inputs.proximal is None:
        per_token_sums["clip_fraction"] = clipped
    else:  # the ratio is 1 with one optimizer step a batch: a share of 0 would say "in bounds"
        per_token_sums["correction_weight"] = weight
    return loss, _metric_sums(inputs, log_ratio, per_token_sums, kl, loss, plan)


def gspo_log_ratio(log_ratio: Tensor, inputs: LossInputs) -> Tensor:
    """[N] log s of each token's answer, from [N] log ratios of its tokens.

    s_i = (pi_theta(y_i) / mu(y_i)) ** (1 / |y_i|) = exp(mean_t log ratio_t): one ratio an answer,
    clipped as one (GSPO, 2507.18071; bounds there 3e-4 and 4e-4). Off by default
    (`policy_loss: gspo`)."""
    return _sequence_mean(log_ratio, inputs)


def positive_cross_entropy(inputs: LossInputs, num_positive_tokens: int) -> Tensor:
    """Scalar share of the mean over all tokens of correct answers of -log pi_theta, the term that
    `positive_ce` scales: 0, off, by default (Seed1.5-Thinking, 2504.13914;
    0.1 in VAPO and in falcon-h1r)."""
    return -(inputs.logprobs * inputs.positive).sum() / num_positive_tokens


def sft_loss(logprobs: Tensor, num_target_tokens: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Cross-entropy: every target token of the step weighs the same on whatever rank it sits."""
    loss = -logprobs.sum() / max(num_target_tokens, 1)
    return loss, {"loss": loss.detach(), "tokens": _count(logprobs)}


def reference_kl(logprobs: Tensor, reference: Tensor, estimator: str) -> Tensor:
    """[N] estimates of KL(pi_theta || pi_ref) on sampled tokens, with r = pi_ref / pi_theta:
    k1 = -log r, k2 = (log r)^2 / 2, k3 = r - 1 - log r (Schulman, "Approximating KL divergence",
    2020). Default k3, as in GRPO (2402.03300), with coefficient 0 (there: 0.04).

    A warning on k1: on tokens that the policy itself sampled, the gradient of this term is that of
    log pi_theta, whose expectation is 0. It reports the divergence without bias and adds only noise
    to the gradient; to hold the policy near the reference choose k2 (whose gradient is that of the
    divergence) or k3."""
    log_r = (reference - logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if estimator == "k1":
        return -log_r
    if estimator == "k2":
        return log_r.square() / 2
    return log_r.exp() - 1 - log_r


def token_weights(
    inputs: LossInputs, algorithm: AlgorithmConfig, plan: TrainPlan, max_response_tokens: int
) -> Tensor:
    """[N] weights whose sum over the whole batch's tokens is the reduction.

    token_mean: 1 / all tokens (DAPO, 2503.14476; the default). sequence_mean: 1 / (answers x own
    length), GRPO's (2402.03300). constant: 1 / (answers x max_response_tokens), without a length
    bias (Dr. GRPO, 2503.20783).
    """
    ones = torch.ones_like(inputs.behaviour)
    if algorithm.aggregation == "token_mean":
        return ones / max(plan.num_target_tokens, 1)
    if algorithm.aggregation == "constant":
        return ones / max(plan.num_sequences * max_response_tokens, 1)
    lengths = _sequence_sum(ones, inputs)
    return 1 / (lengths[inputs.document].clamp(min=1) * max(plan.num_sequences, 1))


def reduce_metrics(sums: dict[str, float]) -> dict[str, float]:
    """Globally added sums to what is logged; a mean over nothing is left out."""
    tokens = sums.get("tokens", 0.0)
    metrics = {"loss": sums["loss"], "target_tokens": tokens}
    for name, value in sums.items():
        if name.startswith("sum/") and tokens:
            metrics[name.removeprefix("sum/")] = value / tokens
        elif name.startswith("gap/") and sums[f"tokens_{name[4:]}"]:
            metrics[name[4:]] = value / sums[f"tokens_{name[4:]}"]
        elif name.startswith("age/"):
            _, age, what = name.split("/")
            if what != "tokens" and sums[f"age/{age}/tokens"]:
                metrics[f"{what}_age_{age}"] = value / sums[f"age/{age}/tokens"]
    if sums.get("slip/squares"):
        slip, error = temperature_slip(*(sums[name] for name in SLIP_SUMS))
        metrics |= {"temperature_slip": slip, "temperature_slip_error": error}
    return metrics


def _correction(inputs: LossInputs, algorithm: AlgorithmConfig) -> tuple[Tensor, Tensor]:
    """The tokens' weights and where they were cut; behaviour as the anchor leaves nothing over."""
    if inputs.proximal is None:
        ones = torch.ones_like(inputs.behaviour)
        return ones, torch.zeros_like(ones, dtype=torch.bool)
    log_w = (inputs.proximal - inputs.behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).detach()
    if algorithm.correction.level == "sequence":
        log_w = _sequence_mean(log_w, inputs)
    return correction_weight(log_w.exp(), algorithm.correction)


def _sequence_sum(values: Tensor, inputs: LossInputs) -> Tensor:
    return torch.zeros(inputs.num_documents, dtype=values.dtype, device=values.device).index_add(
        0, inputs.document, values
    )


def _sequence_mean(values: Tensor, inputs: LossInputs) -> Tensor:
    """[N] each token holding its document's mean."""
    lengths = _sequence_sum(torch.ones_like(values), inputs).clamp(min=1)
    return (_sequence_sum(values, inputs) / lengths)[inputs.document]


def _count(values: Tensor) -> Tensor:
    return torch.tensor(float(values.numel()), device=values.device)


def _metric_sums(inputs, log_ratio, per_token, to_reference, loss, plan) -> dict[str, Tensor]:
    """`per_token`: [N] values whose means are logged, over all tokens and by age. `to_reference`
    [N] or None: its mean, over all target tokens alike, is logged as kl_reference."""
    with torch.no_grad():
        log_mu_ratio = (inputs.logprobs - inputs.behaviour).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        kl = log_mu_ratio.exp() - 1 - log_mu_ratio  # k3 of KL(mu || pi) on tokens from mu
        age = plan.learner_version - inputs.versions
        sums = {
            "loss": loss.detach(),
            "tokens": _count(inputs.behaviour),
            "sum/ratio_mean": log_ratio.exp().sum(),
            **{f"sum/{name}": values.sum() for name, values in per_token.items()},
            "sum/entropy": inputs.entropy.sum(),
            "sum/kl_behaviour": kl.sum(),
            "gap/logprob_gap": (log_mu_ratio.abs() * inputs.fresh).sum(),
            "tokens_logprob_gap": inputs.fresh.sum(),
            "gap/logprob_gap_stale": (log_mu_ratio.abs() * ~inputs.fresh).sum(),
            "tokens_logprob_gap_stale": (~inputs.fresh).sum(),
        }
        terms = slip_terms(log_mu_ratio, inputs.logprobs, inputs.entropy)
        for name, values in zip(SLIP_SUMS, terms, strict=True):
            sums[name] = torch.where(inputs.fresh, values, 0.0).sum()  # a stale NaN is not theirs
        if to_reference is not None:
            sums["sum/kl_reference"] = to_reference.sum()
        # A fixed set of ages, so that all ranks reduce the same keys.
        for a in range(plan.learner_version - plan.oldest_version + 1):
            sums[f"age/{a}/kl_behaviour"] = (kl * (age == a)).sum()
            for name, values in per_token.items():
                sums[f"age/{a}/{name}"] = (values * (age == a)).sum()
            sums[f"age/{a}/tokens"] = (age == a).sum()
    return {name: value.detach().to(torch.float64) for name, value in sums.items()}
