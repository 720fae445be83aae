"""The splits of a run, each row and ground truth checked before anything is trained on it."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from h1r_rl.config.schema import RunConfig
from h1r_rl.data.sources import Problems, check_disjoint, load_problems

logger = logging.getLogger(__name__)

SPLITS = ("sft", "rl", "evaluation", "evaluation_code")


def load_split(config: RunConfig, folder: Path, split: str) -> Problems:
    """One split, ground truths checked by the verifiers that will judge with them.

    `folder` takes the memory-mapped rows and the list of rows left out (`cache/`).
    """
    from rewards.ground_truth import check_ground_truths

    check = partial(check_ground_truths, config=config.reward)
    return load_problems(
        getattr(config.data, split),
        config.data,
        split=split,
        cache=folder / "cache",
        need_response=split == "sft",
        check_ground_truths=None if split == "sft" else check,
    )


def check_splits(config: RunConfig, folder: Path) -> dict[str, Problems]:
    """All splits that the run has, usable and disjoint; rows left out are said."""
    loaded = {
        split: load_split(config, folder, split) for split in SPLITS if getattr(config.data, split)
    }
    check_disjoint(list(loaded.values()))
    for split, problems in loaded.items():
        if problems.quarantined:
            reasons = ", ".join(f"{n} {reason}" for reason, n in problems.quarantined.items())
            logger.warning(
                "data.%s: %d rows used, left out: %s (see %s)",
                split,
                len(problems.rows),
                reasons,
                folder / "cache" / f"{split}-quarantine.jsonl",
            )
    return loaded
