"""From finished groups to what each learner rank runs: references and arithmetic, no tokens.

Invariant: the plan is a pure function of (groups, algorithm, ranks, budget). Documents are put in
canonical order (prompt id, pass, sample index) before anything is summed, so one ledger replays to
bit-equal weights; every rank gets the same number of micro-batches (empty ones pad), because a
ZeRO-3 gather is a collective of all ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from h1r_rl.config.schema import AlgorithmConfig
from h1r_rl.grpo.advantages import batch_std, group_advantages
from h1r_rl.packing import pack_documents
from h1r_rl.records import Completion, Group, MicroBatch, Sample


@dataclass(frozen=True, slots=True)
class PlannedDocument:
    """Sample `sample` of `plan.groups[group]`, as one document of a micro-batch."""

    group: int
    sample: int


@dataclass(frozen=True, slots=True)
class TrainPlan:
    """One optimizer step's work. `ranks[r][m]` lists the documents of micro-batch m on rank r.

    The learner ranks fetch the completions behind the samples' references, compute advantages from
    the groups' scores with `advantages.py`, and normalise by the *global* counts held here.
    """

    objective: Literal["sft", "grpo"]
    learner_version: int
    oldest_version: int  # tokens sampled by older weights are masked
    groups: tuple[Group, ...]
    ranks: tuple[tuple[tuple[PlannedDocument, ...], ...], ...]
    num_target_tokens: int  # masked-in tokens over all ranks and micro-batches
    num_sequences: int  # documents with at least one masked-in token, likewise
    num_positive_tokens: int  # target tokens of samples judged correct (cross-entropy term)


def plan_train_batch(
    groups: Sequence[Group],
    algorithm: AlgorithmConfig,
    *,
    ranks: int,
    micro_batch_tokens: int,
    learner_version: int,
    max_staleness: int,
) -> TrainPlan:
    """Plan one GRPO step. Samples out of the loss (`in_loss`) are not sent to any rank."""
    return _plan(
        "grpo",
        groups,
        lambda sample: in_loss(sample, algorithm),
        ranks=ranks,
        micro_batch_tokens=micro_batch_tokens,
        learner_version=learner_version,
        oldest_version=learner_version - max_staleness,
    )


def plan_sft_batch(
    groups: Sequence[Group], *, ranks: int, micro_batch_tokens: int, learner_version: int
) -> TrainPlan:
    """Plan one SFT step: every trace is a group of one sample, every response token a target."""
    return _plan(
        "sft",
        groups,
        lambda sample: True,
        ranks=ranks,
        micro_batch_tokens=micro_batch_tokens,
        learner_version=learner_version,
        oldest_version=0,
    )


def in_loss(sample: Sample, algorithm: AlgorithmConfig) -> bool:
    """Whether a sample's tokens are trained on, by how it ended (recipe table of endings)."""
    if sample.verdict.score is None:
        return False
    return not (algorithm.overlong_filtering and sample.finish_reason == "length")


def trained_scores(group: Group, algorithm: AlgorithmConfig) -> np.ndarray:
    """[G] float64 scores that make mean, std and signal: NaN for samples out of the loss. A sample
    that overlong filtering takes out is none that the others are measured against."""
    inside = [in_loss(sample, algorithm) for sample in group.samples]
    return np.where(inside, group.scores(), np.nan)


def is_positive(sample: Sample) -> bool:
    """Judged correct: by accuracy where the verifier has that notion, else by the score."""
    accuracy = sample.verdict.parts.get("accuracy", sample.verdict.score)
    return accuracy is not None and accuracy >= 1.0


def advantages_by_group(plan: TrainPlan, algorithm: AlgorithmConfig) -> list[np.ndarray]:
    """[groups] of [G] float64, the same on every rank."""
    scores = [trained_scores(group, algorithm) for group in plan.groups]
    std = None
    if algorithm.advantage == "grpo" and algorithm.advantage_std == "batch":
        std = batch_std(scores)
    return [group_advantages(s, algorithm.advantage, std=std) for s in scores]


def build_micro_batch(
    plan: TrainPlan,
    documents: Sequence[PlannedDocument],
    completions: Mapping[tuple[int, int], Completion],
    advantages: Sequence[np.ndarray] | None,
) -> MicroBatch:
    """Lay the documents end to end. `completions` by (group, sample); `advantages` None for SFT.

    An empty `documents` gives a two-token batch with nothing masked in, so that a rank without
    work still runs the collectives of a forward pass.
    """
    if not documents:
        return _concatenate([_blank(2)], ("",))
    pieces, keys = [], []
    for document in documents:
        group = plan.groups[document.group]
        completion = completions[document.group, document.sample]
        prompt = group.prompt.token_ids
        piece = _blank(len(prompt) + len(completion.token_ids))
        response = slice(len(prompt), None)
        piece["input_ids"][: len(prompt)] = prompt
        piece["input_ids"][response] = completion.token_ids
        versions = completion.token_versions()
        piece["versions"][response] = versions
        mask = versions >= plan.oldest_version
        if completion.finish_reason == "pruned":
            mask[-1] = False  # the end token was forced, not sampled
        piece["loss_mask"][response] = mask
        piece["behaviour_logprobs"][response] = np.where(mask, completion.logprobs, 0)
        if advantages is not None:
            advantage = advantages[document.group][document.sample]
            piece["advantages"][response] = np.where(mask, advantage, 0)
            piece["positive"][response] = mask & is_positive(group.samples[document.sample])
        pieces.append(piece)
        keys.append(f"{group.key}/{document.sample}")
    return _concatenate(pieces, tuple(keys))


def _plan(objective, groups, keep, *, ranks, micro_batch_tokens, learner_version, oldest_version):
    groups = tuple(sorted(groups, key=lambda g: (g.prompt.prompt_id, g.prompt.pass_index)))
    documents = [
        PlannedDocument(g, s)
        for g, group in enumerate(groups)
        for s, sample in enumerate(group.samples)
        if keep(sample) and sample.max_version >= oldest_version
    ]
    samples = [groups[d.group].samples[d.sample] for d in documents]
    lengths = [
        len(groups[d.group].prompt.token_ids) + sample.length
        for d, sample in zip(documents, samples, strict=True)
    ]
    targets = [_num_targets(sample, oldest_version) for sample in samples]
    packed = pack_documents(lengths, ranks=ranks, budget=micro_batch_tokens)
    return TrainPlan(
        objective=objective,
        learner_version=learner_version,
        oldest_version=oldest_version,
        groups=groups,
        ranks=tuple(
            tuple(tuple(documents[i] for i in members) for members in rank) for rank in packed
        ),
        num_target_tokens=sum(targets),
        num_sequences=sum(1 for n in targets if n),
        num_positive_tokens=sum(
            n for n, sample in zip(targets, samples, strict=True) if is_positive(sample)
        ),
    )


def _num_targets(sample: Sample, oldest_version: int) -> int:
    fresh = sum(
        span.end - span.start
        for span in sample.version_spans
        if int(span.version) >= oldest_version
    )
    return fresh - (sample.finish_reason == "pruned")


def _blank(length: int) -> dict[str, np.ndarray]:
    return {
        "input_ids": np.zeros(length, np.int32),
        "loss_mask": np.zeros(length, np.bool_),
        "behaviour_logprobs": np.zeros(length, np.float32),
        "advantages": np.zeros(length, np.float32),
        "versions": np.full(length, -1, np.int32),
        "positive": np.zeros(length, np.bool_),
    }


def _concatenate(pieces: list[dict[str, np.ndarray]], keys: tuple[str, ...]) -> MicroBatch:
    lengths = [len(piece["input_ids"]) for piece in pieces]
    joined = {name: np.concatenate([piece[name] for piece in pieces]) for name in pieces[0]}
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    return MicroBatch(document_starts=starts, prompts=keys, **joined)
