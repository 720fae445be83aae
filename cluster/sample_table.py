"""A few groups of a step with their texts, for people to read."""

from __future__ import annotations

from typing import Any

from h1r_rl.deadlines import within
from h1r_rl.records import Group

GROUPS_SHOWN = 4
FETCH_DEADLINE_S = 60.0


async def sample_rows(groups: list[Group]) -> list[dict[str, Any]]:
    """One row a sample of the first groups. Only here does the driver read completions."""
    rows = []
    for group in groups[:GROUPS_SHOWN]:
        for sample in group.samples:
            completions = await within(
                sample.completions_ref, FETCH_DEADLINE_S, f"samples of {group.key}"
            )
            rows.append(
                {
                    "prompt": group.key,
                    "question": group.prompt.question,
                    "answer": completions[sample.position].text,
                    "ground_truth": group.prompt.ground_truth,
                    "sample": sample.sample_index,
                    "score": sample.verdict.score,
                    "parts": str(sample.verdict.parts),
                    "reason": sample.verdict.reason,
                    "length": sample.length,
                    "finish": sample.finish_reason,
                    "engine": sample.engine,
                    "versions": f"{sample.min_version}-{sample.max_version}",
                }
            )
    return rows
