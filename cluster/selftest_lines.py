"""The lines of `h1r selftest`: each is a way in which hybrids go wrong in the field without a word.

Invariant: a line compares two independent computations and says by how much they differ and how
much they may; it never repairs anything. An engine here is whatever answers `Engine`: the real one,
or in tests a plain model with a fault put in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cluster.selftest_learner import LocalLearner
from h1r_rl.hybrid.computed_values import computed_values, disagreements
from h1r_rl.hybrid.logprob_gap import Gap, gap
from h1r_rl.hybrid.multipliers import multiplier_values, without

Ids = NDArray[np.int32]
Logprobs = NDArray[np.float32]

LEAK, FLOOR = "packing leak", "scan/decode floor"
VALUES, MULTIPLIERS = "tensor values", "multipliers alive"
RELOAD, STALE = "identical-weights reload", "stale prefix after an update"

DOCUMENT_LENGTHS = (1, 63, 64, 65, 2, 130, 17)  # around the scan's chunk
LEAK_ON_CUDA = 1e-3  # rows of one shape: on CPUs the same bits, kernels there may add in any order
ALONE = 1e-4  # packed against one by one, of the largest hidden value
ALONE_COARSE = 0.05  # the same in bfloat16 or by CUDA kernels
TEMPERATURES = (1.0, 0.7)
UNCLEAR = 0.25  # standard error of the lacking share above which an engine's noise hides the answer


@dataclass(frozen=True)
class Line:
    """`passed` None: the model has nothing of the kind, or nothing could be told."""

    name: str
    passed: bool | None
    figures: str


@dataclass(frozen=True)
class Trace:
    """One sampled answer. ids: prompt and answer; logprobs: the answer's, at `temperature`."""

    ids: Ids
    logprobs: Logprobs
    temperature: float


class Engine(Protocol):
    async def score(self, ids: Ids) -> Logprobs:
        """[length - 1] of a document's own tokens at temperature 1, from one prefill."""
        ...

    async def sample(
        self, prompt: Ids, samples: int, temperature: float, tokens: int
    ) -> list[Trace]: ...

    async def push(self, model: Any) -> None:
        """Send the model's weights, as a run does after an optimizer step."""
        ...

    async def cached_tokens(self) -> float:
        """Prompt tokens that were served from the prefix cache so far."""
        ...

    async def block_tokens(self) -> int: ...

    async def held_tensors(self) -> dict[str, tuple[str, list[float]]]: ...


def packing_leak(learner: LocalLearner, rng: np.random.Generator) -> Line:
    """Change every document of a row but one: that one must not move."""
    documents = [_ids(learner, rng, n) for n in DOCUMENT_LENGTHS]
    kept = DOCUMENT_LENGTHS.index(130)
    before = learner.hidden(documents)
    alone = [learner.hidden([document])[0] for document in documents]
    others = [d if i == kept else _ids(learner, rng, len(d)) for i, d in enumerate(documents)]
    size = max(float(h.abs().max()) for h in alone)
    leak = float((learner.hidden(others)[kept] - before[kept]).abs().max()) / size
    apart = max(float((a - b).abs().max()) for a, b in zip(before, alone, strict=True)) / size
    limit = ALONE if learner.is_exact else ALONE_COARSE
    leak_limit = LEAK_ON_CUDA if learner.on_cuda else 0.0
    return Line(
        LEAK,
        leak <= leak_limit and apart <= limit,
        f"other documents changed: moved by {leak:.2g} (limit {leak_limit:g}); packed against one "
        f"by one: {apart:.2g} (limit {limit:g}), of the largest hidden value",
    )


async def sampled(
    engine: Engine, learner: LocalLearner, rng: np.random.Generator, tokens: int
) -> list[Trace]:
    """Traces at TEMPERATURES for the lines that compare engine and learner."""
    traces: list[Trace] = []
    for temperature in TEMPERATURES:
        prompt = _ids(learner, rng, 16)
        traces += await engine.sample(prompt, 4, temperature, tokens)
    return traces


async def logprob_floor(
    engine: Engine, learner: LocalLearner, traces: Sequence[Trace], limit: float
) -> Line:
    """Scan and decode against the learner, on the engine's own traces."""
    decode = decode_gap(learner, traces)
    longest = max(traces, key=lambda trace: len(trace.ids)).ids
    scan = gap(learner.logprobs([longest])[0], await engine.score(longest))
    return Line(
        FLOOR,
        decode.mean <= limit and scan.mean <= limit,
        f"engine against learner, mean |difference|: decode {_said(decode)}, scan {_said(scan)} "
        f"(limit {limit:.2g}); {sum(len(t.logprobs) for t in traces)} tokens",
    )


async def tensor_values(engine: Engine, learner: LocalLearner) -> Line:
    """A, D, dt_bias, convolution, norms and multiplier vectors: one value on both sides."""
    held = await engine.held_tensors()
    values = computed_values(
        learner.model, lambda: learner.logprobs([np.arange(8, dtype=np.int32)])
    )
    found = disagreements(values, held)
    wrong = sorted(name for name, difference in found.items() if difference > 0)
    figures = f"{len(found)} tensors read on both sides, {len(wrong)} differ (limit 0)"
    if wrong:
        figures += f": {wrong[0]} by {found[wrong[0]]:.2g}"
    states = sorted({held[n][0] for n in held if n.endswith("ssm_state")})
    return Line(VALUES, bool(found) and not wrong, f"{figures}; SSM state {states}")


def multipliers_alive(learner: LocalLearner, traces: Sequence[Trace]) -> Line:
    """Each multiplier moves the learner's log-probabilities, and the engine computes with it.

    The engine's distance from the learner is projected on what losing the multiplier would do: a
    share of 0 is an engine that has it, 1 one that has lost it. Where the distance is all noise the
    share says nothing; of a model of which no share says anything, the engine was not tested.
    """
    values = multiplier_values(learner.model.config)
    if not values:
        return Line(MULTIPLIERS, None, f"{learner.model.config.model_type} has none")
    base, engine = _answers(learner, traces), np.concatenate([t.logprobs for t in traces])
    shifts, shares, unclear = {}, {}, []
    for multiplier in values:
        with without(learner.model, multiplier):
            effect = (_answers(learner, traces) - base).astype(np.float64)
        shifts[multiplier] = float(np.abs(effect).mean())
        power = float((effect**2).sum())
        shares[multiplier] = float(((engine - base) * effect).sum() / power) if power else 0.0
        noise = float(np.std(engine - base))
        if power and noise / math.sqrt(power) > UNCLEAR:
            unclear.append(multiplier)
    dead = [m for m, shift in shifts.items() if not shift > 0]
    lost = [m for m, share in shares.items() if not abs(share) < 0.5 and m not in unclear]
    weakest = min(shifts, key=lambda m: shifts[m])
    figures = (
        f"{len(values)} taken out one by one: smallest effect {shifts[weakest]:.2g} ({weakest}, "
        "limit > 0)"
    )
    judged = [m for m in values if m not in unclear]
    if judged:
        most = max(judged, key=lambda m: abs(shares[m]))
        figures += f"; largest share that the engine lacks {shares[most]:.2g} ({most}, limit 0.5)"
    if dead or lost:
        figures += f"; without effect: {dead}; lost by the engine: {lost}"
    if unclear:
        figures += (
            f"; below this dtype's noise, so that the engine was not judged by {len(unclear)}: "
            f"{', '.join(unclear)} (ask --dtype float32)"
        )
    if dead or lost:
        return Line(MULTIPLIERS, False, figures)
    return Line(MULTIPLIERS, True if judged else None, figures)


async def identical_reload(
    engine: Engine, learner: LocalLearner, rng: np.random.Generator, tokens: int
) -> Line:
    """Pushing the weights that the engine holds must change nothing: prefill and greedy decode."""
    asked, prompt = _ids(learner, rng, tokens), _ids(learner, rng, 16)

    async def answers() -> tuple[Logprobs, Trace]:
        (greedy,) = await engine.sample(prompt, 1, 0.0, tokens)
        return await engine.score(asked), greedy

    first, second = await answers(), await answers()
    await engine.push(learner.model)
    third = await answers()
    noise, change = _apart(first, second), _apart(second, third)
    limit = max(2 * noise, 1e-6)
    return Line(
        RELOAD,
        change <= limit,
        f"largest |difference| after the push {change:.2g} (limit {limit:.2g}; asked twice before "
        f"it: {noise:.2g})",
    )


async def stale_prefix(
    engine: Engine, learner: LocalLearner, rng: np.random.Generator, limit: float, room: int
) -> Line:
    """A prompt that is cached is asked again after an update: old blocks must not answer.

    Every parameter is moved by the update, so one that did not arrive shows here too.
    """
    block = await engine.block_tokens()
    tokens = 48
    length = 2 * block + 9
    if length + tokens > room:
        return Line(
            STALE, None, f"a cached block has {block} tokens: two do not fit in {room} of context"
        )
    prompt = _ids(learner, rng, length)
    for _ in range(2):
        await engine.sample(prompt, 2, 1.0, 2)
    cached = await engine.cached_tokens()
    if not cached:
        return Line(STALE, None, "the engine reuses no prefix of this model")
    learner.shake(seed=1)
    await engine.push(learner.model)
    warm = await engine.sample(prompt, 2, 1.0, tokens)
    cold = decode_gap(learner, warm)
    scan = gap(learner.logprobs([warm[0].ids])[0], await engine.score(warm[0].ids))
    learner.shake_back()
    old = decode_gap(learner, warm)
    return Line(
        STALE,
        cold.mean <= limit and scan.mean <= limit,
        f"{cached:.0f} tokens came from the cache; after the update the same prompt is "
        f"{_said(cold)} from the new weights (limit {limit:.2g}), {old.mean:.2g} from the old; "
        f"uncached {_said(scan)}",
    )


def decode_gap(learner: LocalLearner, traces: Sequence[Trace]) -> Gap:
    return gap(_answers(learner, traces), np.concatenate([trace.logprobs for trace in traces]))


def _answers(learner: LocalLearner, traces: Sequence[Trace]) -> Logprobs:
    """The learner's log-probabilities of the traces' answers, in their order."""
    found: list[Logprobs] = []
    for trace in traces:
        (whole,) = learner.logprobs([trace.ids], trace.temperature)
        found.append(whole[-len(trace.logprobs) :])
    return np.concatenate(found)


def _apart(first: tuple[Logprobs, Trace], second: tuple[Logprobs, Trace]) -> float:
    if not np.array_equal(first[1].ids, second[1].ids):
        return math.inf  # greedy decoding took another turn
    pairs = ((first[0], second[0]), (first[1].logprobs, second[1].logprobs))
    return max(float(np.abs(a - b).max()) for a, b in pairs)


def _ids(learner: LocalLearner, rng: np.random.Generator, length: int) -> Ids:
    return rng.integers(0, learner.vocabulary, length).astype(np.int32)


def _said(found: Gap) -> str:
    return f"{found.mean:.2g} (max {found.max:.2g})"
