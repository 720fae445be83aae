"""The splits of a run, each row and ground truth checked before anything is trained on it."""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path

from h1r_rl.config.schema import RunConfig
from h1r_rl.data.sources import Problems, check_disjoint, load_problems
from h1r_rl.errors import DataError

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
    """All splits that the run has, usable and disjoint."""
    loaded = {
        split: load_split(config, folder, split) for split in SPLITS if getattr(config.data, split)
    }
    for problems in loaded.values():
        _refuse_bad(problems, config.data.max_left_out)
    check_disjoint(list(loaded.values()))
    return loaded


def warn_of_left_out(loaded: dict[str, Problems], folder: Path) -> None:
    """Rows that are left out of a run that goes on."""
    for split, problems in loaded.items():
        if problems.quarantined:
            logger.warning(
                "data.%s: %d rows used, left out: %s (see %s)",
                split,
                len(problems.rows),
                _reasons(problems),
                folder / "cache" / f"{split}-quarantine.jsonl",
            )


def _reasons(problems: Problems) -> str:
    counts = ", ".join(f"{n} {reason}" for reason, n in problems.quarantined.items())
    return f"{counts}; {problems.first_bad}"


def _refuse_bad(problems: Problems, share: float) -> None:
    """Too many rows left out are a mistake in the file, not rows to do without."""
    bad = problems.quarantined.total()
    total = bad + len(problems.rows)
    if bad > share * total:
        raise DataError(
            f"data.{problems.split}: expected at most {share:.0%} of the rows to be unusable, "
            f"found {bad} of {total} ({_reasons(problems)}); mend them, or raise "
            "data.max_left_out to do without them"
        )
