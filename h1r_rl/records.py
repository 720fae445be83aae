"""What travels between the services: frozen records of numpy arrays.

Invariant: token ids are the engine's own, from sampling to the loss; no record is ever rebuilt
from text. Bulk arrays travel between services by object reference; the driver sees `GroupPart`s,
which hold scalars only.

Flow: `Prompt` -> `Completion` (actors) + `Verdict` (rewards) -> `Sample` -> `Group` ->
`MicroBatch`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int32]
Logprobs = NDArray[np.float32]

FinishReason = Literal["stop", "length", "pruned"]
"""stop: the model sampled an end token (which is part of the sample). length: the limit came first.
pruned: ended by a confidence rule, with a forced end token. An engine abort is none of these: it
never becomes a Completion."""


@dataclass(frozen=True, slots=True)
class Prompt:
    """One admission of one problem.

    Example: Prompt("rl-000017", 0, ids, "7+8*3=?", "math", "5") is problem rl-000017 on the
    first pass over the data.
    """

    prompt_id: str
    pass_index: (
        int  # 0 for the first pass over the data; (prompt_id, pass_index) names an admission
    )
    token_ids: TokenIds  # [prompt tokens], the chat template applied, generation prompt included
    question: str  # what the user's turn says, for reports and verifiers
    verifier: str  # a name in `rewards.registry`, or an import path "package.module:function"
    ground_truth: str  # what the verifier checks against; JSON for code tests

    @property
    def key(self) -> str:
        return f"{self.prompt_id}/{self.pass_index}"


@dataclass(frozen=True, slots=True)
class VersionSpan:
    """Output tokens [start, end) were sampled by the weights labelled `version` ("0", "1", ...)."""

    version: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer, exactly as the engine produced it.

    Example: Completion(3, ids[29], logprobs[29], (VersionSpan("4", 0, 20), VersionSpan("5", 20,
    29)), "stop", "<think>...", "rollout-0").
    """

    sample_index: int  # 0 .. group size - 1
    token_ids: TokenIds  # [response tokens], the sampled end token included
    logprobs: Logprobs  # [response tokens], of the distribution sampled from (after temperature)
    version_spans: tuple[VersionSpan, ...]  # contiguous, covering [0, response tokens)
    finish_reason: FinishReason
    text: str  # detokenised, special tokens dropped: for verifiers and reports only
    engine: str  # which rollout actor

    def token_versions(self) -> NDArray[np.int32]:
        """[response tokens] int32: the weight version that sampled each token."""
        versions = np.empty(len(self.token_ids), dtype=np.int32)
        for span in self.version_spans:
            versions[span.start : span.end] = int(span.version)
        return versions


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a verifier says of one completion.

    `score` None means that no verdict could be had (worker lost twice, broken ground truth): the
    sample stays out of mean, std and loss. A wrong answer is 0.0, never None.

    Example: Verdict(0.9, {"math": 1.0, "format": -0.1}, "correct").
    """

    score: float | None
    parts: dict[str, float] = field(default_factory=dict)  # each part before its weight
    reason: str = ""  # a short code: "correct", "wrong", "no_answer", "timeout", "worker_lost", ...


@dataclass(frozen=True, slots=True)
class GroupPart:
    """The driver's view of one or more finished samples of a group: scalars, no tokens.

    The arrays stay in the object store behind `completions_ref` (a list[Completion] in the order
    of `sample_indices`); the driver passes the reference on and never reads it.
    """

    sample_indices: tuple[int, ...]
    lengths: tuple[int, ...]  # response tokens
    finish_reasons: tuple[FinishReason, ...]
    version_spans: tuple[tuple[VersionSpan, ...], ...]  # of each sample
    surprise: tuple[float, ...]  # mean -logprob of each sample's tokens
    engine: str
    seconds: float  # from request to last token
    completions_ref: Any = None


@dataclass(frozen=True, slots=True)
class Sample:
    """One row of a group with its verdict, still by reference: what a training plan is made of."""

    sample_index: int
    length: int
    finish_reason: FinishReason
    version_spans: tuple[VersionSpan, ...]  # counts of trainable tokens follow from these
    verdict: Verdict
    completions_ref: Any  # list[Completion] in the object store
    position: int  # where in that list
    engine: str = ""  # which rollout actor sampled it

    @property
    def min_version(self) -> int:
        """Oldest weight version that sampled a token."""
        return min(int(span.version) for span in self.version_spans)

    @property
    def max_version(self) -> int:
        return max(int(span.version) for span in self.version_spans)


@dataclass(frozen=True, slots=True)
class Group:
    """All samples of one admission, ready to train. `admitted_version` fixes its deadline."""

    prompt: Prompt
    samples: tuple[Sample, ...]  # by sample_index
    admitted_version: int

    @property
    def key(self) -> str:
        return self.prompt.key

    def scores(self) -> NDArray[np.float64]:
        """[group size] float64; NaN where there is no verdict."""
        return np.array(
            [np.nan if s.verdict.score is None else s.verdict.score for s in self.samples],
            dtype=np.float64,
        )


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Documents laid end to end: what one forward pass sees. T tokens, D documents.

    Everything is aligned to the *predicted* token: entry t of `loss_mask`, `behaviour_logprobs`,
    `advantages` speaks of `input_ids[t]`, predicted from position t - 1 of the same document. The
    first token of a document is never a target.

    Example: two documents of 3 and 2 tokens: document_starts = [0, 3, 5].
    """

    input_ids: TokenIds  # [T]
    document_starts: NDArray[np.int32]  # [D + 1], first 0, last T
    loss_mask: NDArray[np.bool_]  # [T]
    behaviour_logprobs: Logprobs  # [T], 0 where not masked in
    advantages: NDArray[np.float32]  # [T], 0 where not masked in; all 0 for SFT
    versions: NDArray[np.int32]  # [T], weight version that sampled the token; -1 for prompt tokens
    positive: NDArray[np.bool_]  # [T], target token of a sample judged correct (cross-entropy term)
    prompts: tuple[str, ...] = ()  # [D] admission keys, in canonical order (prompt id, sample)

    @property
    def num_tokens(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class StepResult:
    """Outcome of one optimizer step."""

    version: int  # number of optimizer steps applied so far
    skipped: bool  # non-finite gradient: nothing changed, nothing to publish
    metrics: dict[str, float]
