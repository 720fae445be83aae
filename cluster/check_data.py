"""What can be said about data and model files before anything starts."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from cluster.check_lengths import check_lengths
from cluster.splits import SPLITS, check_splits
from h1r_rl.config.schema import RunConfig
from h1r_rl.data.files import columns_of
from h1r_rl.data.generate import generate_into
from h1r_rl.data.sources import Problems
from h1r_rl.errors import ConfigError, DataError
from h1r_rl.hybrid.experts import refuse_experts
from h1r_rl.hybrid.model_folder import read_config, refuse_no_model, refuse_other_families


def check_files(config: RunConfig) -> None:
    """Columns of every data file, and of a real model its kind, layers, weights and context."""
    data = config.data
    for split in SPLITS:
        last = data.response_column if split == "sft" else data.ground_truth_column
        for path in getattr(data, split):
            found = columns_of(path, split)
            for column in (data.id_column, data.prompt_column, last):
                if column not in found:
                    raise DataError(
                        f"data.{split}: expected a column '{column}' in {path}, found {found}; "
                        "rename it or set data.*_column"
                    )
    if config.model.path is not None:
        refuse_other_families(config.model.path)
        refuse_experts(config.model.path)
        _check_context(config, config.model.path)
        refuse_no_model(config.model.path)
        tokenizer_of(config)


def tokenizer_of(config: RunConfig) -> Any:
    """The one that the run's prompts are made with."""
    from h1r_rl.data.chat import load_tokenizer
    from h1r_rl.hybrid.tiny import build_tokenizer

    model = config.model
    if model.path is not None:
        return load_tokenizer(model.path, trust_remote_code=model.trust_remote_code)
    assert model.tiny is not None
    return build_tokenizer(model.tiny.max_position)


def check_rows(config: RunConfig) -> list[str]:
    """Every row, ground truth and length, in a folder of its own; what each split holds."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = generate_into(config.data, folder, seed=config.seed)
        loaded = check_problems(config.model_copy(update={"data": data}), folder)
        return [
            f"data.{split}: {len(problems.rows)} problems"
            + "".join(f", {n} left out: {why}" for why, n in problems.quarantined.items())
            + (f" ({problems.first_bad})" if problems.first_bad else "")
            for split, problems in loaded.items()
        ]


def check_problems(config: RunConfig, folder: Path) -> dict[str, Problems]:
    """All splits, usable, disjoint and short enough; `folder` takes the rows in memory maps."""
    loaded = check_splits(config, folder)
    check_lengths(config, loaded, tokenizer_of(config))
    return loaded


def _check_context(config: RunConfig, folder: Path) -> None:
    context = read_config(folder).get("max_position_embeddings")
    if context is not None and not isinstance(context, int):
        raise DataError(
            f"{folder / 'config.json'}: expected max_position_embeddings to be a number of tokens, "
            f"found {context!r}; correct it"
        )
    asked = {"rollout.max_model_len": config.rollout.max_model_len}
    if config.sft:
        asked["sft.max_length"] = config.sft.max_length
    for name, length in asked.items():
        if context is not None and length > context:
            raise ConfigError(
                f"{name} ({length}) is beyond the model's context of {context} tokens "
                f"({folder / 'config.json'}); lower it"
            )
