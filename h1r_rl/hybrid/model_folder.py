"""What a model folder says of itself, before torch or a tensor is read.

Invariant: a folder that could not be loaded, or not trained exactly, is one DataError that names
the file at fault; reading costs a few kilobytes, whatever the model's size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from h1r_rl.errors import DataError

FAMILIES = ("falcon_h1", "granitemoehybrid", "nemotron_h")
INDEX = "model.safetensors.index.json"


def read_config(folder: Path) -> dict[str, Any]:
    """config.json as a mapping."""
    file = folder / "config.json"
    if not file.is_file():
        raise DataError(
            f"expected a model folder with config.json, found none in {folder}; give the folder "
            "of a Falcon-H1, GraniteMoeHybrid or Nemotron-H model"
        )
    return _mapping(file)


def refuse_no_model(folder: Path) -> None:
    """DataError where there is no model folder, or one without safetensors that can be read."""
    read_config(folder)
    _refuse_no_weights(folder)


def refuse_other_families(folder: Path) -> None:
    """DataError for a model of an architecture that is not carried."""
    found = read_config(folder).get("model_type")
    if found not in FAMILIES:
        raise DataError(
            f"{folder / 'config.json'}: expected model_type {', '.join(FAMILIES[:-1])} or "
            f"{FAMILIES[-1]}, found {found!r}; give the folder of such a model"
        )


def _refuse_no_weights(folder: Path) -> None:
    """Headers alone are read."""
    from safetensors import SafetensorError, safe_open

    files = sorted(folder.glob("*.safetensors"))
    if (folder / INDEX).is_file():
        shards = _mapping(folder / INDEX).get("weight_map")
        named = shards.values() if isinstance(shards, dict) else ()
        files = sorted({folder / str(shard) for shard in named})
    if not files:
        raise DataError(
            f"{folder}: expected *.safetensors, found none; convert the weights first (pickled "
            "checkpoints from outside are not loaded)"
        )
    for file in files:
        try:
            with safe_open(file, framework="np"):
                pass
        except (OSError, SafetensorError) as error:
            raise DataError(
                f"{file}: expected whole safetensors, found none that can be read ({error}); "
                "download the model again"
            ) from None


def _mapping(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise DataError(
            f"{file}: expected JSON, found none that can be read ({error}); download it again"
        ) from None
    if not isinstance(found, dict):
        raise DataError(
            f"{file}: expected a JSON object, found {type(found).__name__}; download it again"
        )
    return found
