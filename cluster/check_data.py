"""What `h1r check` can say about files without reading their rows."""

from __future__ import annotations

import json
from pathlib import Path

from h1r_rl.config.schema import RunConfig
from h1r_rl.errors import DataError


def check_files(config: RunConfig) -> None:
    """Columns of every data file, and a chat template beside a real model's tokenizer."""
    data = config.data
    for split in ("sft", "rl", "evaluation"):
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

        load_tokenizer(config.model.path, trust_remote_code=config.model.trust_remote_code)


def _columns(path: Path) -> list[str]:
    if path.suffix == ".parquet":
        import pyarrow.parquet as pq

        return pq.read_schema(path).names
    with path.open() as lines:
        first = lines.readline()
    return list(json.loads(first)) if first.strip() else []
