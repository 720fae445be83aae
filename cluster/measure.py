"""Held-out accuracy of one model under one way of sampling.

Invariant: every (problem, sample) is answered once, or the measurement raises; an answer that no
verdict could be had for is NaN and counted, never wrong.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from h1r_rl.config.schema import EvaluationSetting
from h1r_rl.deadlines import within
from h1r_rl.errors import RolloutLost, RunFailed
from h1r_rl.evaluation.metrics import summarise
from h1r_rl.interfaces import Sampling
from h1r_rl.records import GroupPart, Prompt, Verdict

IN_FLIGHT = 512  # samples asked for at once
MAX_REISSUES = 3
ANSWERS_SHOWN = 16  # problems whose first answer is kept as text
FETCH_DEADLINE_S = 60.0
FIELDS = ("correct", "length", "formatted", "truncated", "surprise")


@dataclass(frozen=True)
class Measurement:
    """`outcomes`: FIELDS -> [problems, samples] float64, `correct` NaN without a verdict."""

    prompts: list[Prompt]
    outcomes: dict[str, NDArray[np.float64]]
    answers: list[dict[str, Any]]
    pass_at: int | None

    def summary(self) -> dict[str, float]:
        return summarise(*(self.outcomes[name] for name in FIELDS), pass_at=self.pass_at)


async def measure(
    setting: EvaluationSetting,
    prompts: list[Prompt],
    max_tokens: int,
    rollouts: Any,
    rewards: Any,
) -> Measurement:
    """One evaluation setting over all prompts."""
    sampling = Sampling(setting.temperature, max_tokens, setting.top_p)
    gate = asyncio.Semaphore(max(IN_FLIGHT // setting.samples, 1))
    outcomes = {name: np.full((len(prompts), setting.samples), np.nan) for name in FIELDS}
    answers: dict[int, dict[str, Any]] = {}

    async def one(row: int, prompt: Prompt) -> None:
        missing = set(range(setting.samples))
        async with gate:
            for _ in range(MAX_REISSUES):
                try:
                    async for part in rollouts.generate(prompt, sorted(missing), sampling):
                        verdicts = await rewards.score(prompt, part)
                        _note(outcomes, row, part, verdicts)
                        missing -= set(part.sample_indices)
                        if row < ANSWERS_SHOWN and row not in answers:
                            answers[row] = await _answer(prompt, part, verdicts[0])
                    return
                except RolloutLost:
                    continue  # the pool raises RunFailed once no engine is left
            raise RunFailed(f"evaluation of {prompt.key} lost its engine {MAX_REISSUES} times")

    async with asyncio.TaskGroup() as tasks:
        for row, prompt in enumerate(prompts):
            tasks.create_task(one(row, prompt))
    shown = [answers[row] for row in sorted(answers)]
    return Measurement(prompts, outcomes, shown, setting.pass_at)


def write_outcomes(measurements: dict[str, Measurement], file: Path) -> None:
    """All answers' outcomes, one row each: setting, prompt_id, sample and FIELDS."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    tables = []
    for name, measured in measurements.items():
        problems, samples = measured.outcomes["correct"].shape
        ids = np.repeat([prompt.prompt_id for prompt in measured.prompts], samples)
        columns: dict[str, Any] = {
            "setting": pa.array([name] * (problems * samples)),
            "prompt_id": pa.array(ids.tolist()),
            "sample": pa.array(np.tile(np.arange(samples), problems)),
        }
        columns |= {k: pa.array(v.ravel(), from_pandas=True) for k, v in measured.outcomes.items()}
        tables.append(pa.table(columns))
    file.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.concat_tables(tables), file)


def _note(
    outcomes: dict[str, NDArray[np.float64]], row: int, part: GroupPart, verdicts: list[Verdict]
) -> None:
    for k, index in enumerate(part.sample_indices):
        verdict = verdicts[k]
        if verdict.score is not None:
            outcomes["correct"][row, index] = verdict.parts.get("accuracy", 0.0) >= 1
            outcomes["formatted"][row, index] = verdict.parts.get("format", 0.0)
        outcomes["length"][row, index] = part.lengths[k]
        outcomes["truncated"][row, index] = part.finish_reasons[k] == "length"
        outcomes["surprise"][row, index] = part.surprise[k]


async def _answer(prompt: Prompt, part: GroupPart, verdict: Verdict) -> dict[str, Any]:
    completions = await within(part.completions_ref, FETCH_DEADLINE_S, f"answer {prompt.key}")
    return {
        "question": prompt.question,
        "answer": completions[0].text,
        "ground_truth": prompt.ground_truth,
        "score": verdict.score,
        "reason": verdict.reason,
        "length": part.lengths[0],
    }
