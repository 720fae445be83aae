"""What can be said about data and model files before anything starts."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from cluster.splits import SPLITS, check_splits
from h1r_rl.config.schema import RunConfig
from h1r_rl.data.generate import generate_into
from h1r_rl.errors import ConfigError, DataError
from h1r_rl.hybrid.experts import refuse_experts


def check_files(config: RunConfig) -> None:
    """Columns of every data file, and of a real model its layers, context and chat template."""
    data = config.data
    for split in SPLITS:
        last = data.response_column if split == "sft" else data.ground_truth_column
        for path in getattr(data, split):
            found = _columns(path)
            for column in (data.id_column, data.prompt_column, last):
                if column not in found:
                    raise DataError(
                        f"data.{split}: expected a column '{column}' in {path}, found {found}; "
                        "rename it or set data.*_column"
                    )
    if config.model.path is not None:
        from h1r_rl.data.chat import load_tokenizer

        refuse_experts(config.model.path)
        _check_context(config, config.model.path)
        load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)


def check_rows(config: RunConfig) -> list[str]:
    """Every row and ground truth, in a folder of its own; what each split holds."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        data = generate_into(config.data, folder, seed=config.seed)
        loaded = check_splits(config.model_copy(update={"data": data}), folder)
        return [
            f"data.{split}: {len(problems.rows)} problems"
            + "".join(f", {n} left out: {why}" for why, n in problems.quarantined.items())
            for split, problems in loaded.items()
        ]


def _check_context(config: RunConfig, folder: Path) -> None:
    context = json.loads((folder / "config.json").read_text()).get("max_position_embeddings")
    asked = {"rollout.max_model_len": config.rollout.max_model_len}
    if config.sft:
        asked["sft.max_length"] = config.sft.max_length
    for name, length in asked.items():
        if context is not None and length > context:
            raise ConfigError(
                f"{name} ({length}) is beyond the model's context of {context} tokens "
                f"({folder / 'config.json'}); lower it"
            )


def _columns(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_schema(path).names
    with path.open() as lines:
        first = lines.readline()
    return list(json.loads(first)) if first.strip() else []
