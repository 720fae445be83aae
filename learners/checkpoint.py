"""Weights, optimizer and progress of a learner on disk.

Invariant: a checkpoint appears whole or not at all, `latest` names a whole one, and nothing is
unpickled (DeepSpeed loads with `weights_only=False`) before every file's SHA-256 has matched the
manifest that was written with it. Only the run's own folder is ever read.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

from h1r_rl.errors import DataError

TAG = "state"
MANIFEST = "manifest.json"
LATEST = "latest"


def save(engine: Any, folder: Path, version: int, progress: dict[str, int]) -> Path:
    """Called on every rank; they share `folder`. Returns the checkpoint's own folder."""
    import torch.distributed as dist

    target = folder / f"version-{version:08d}"
    draft = folder / f".{target.name}.partial"
    first = dist.get_rank() == 0
    if first:
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir(parents=True)
    dist.barrier()
    engine.save_checkpoint(str(draft), tag=TAG, client_state=progress, save_latest=False)
    dist.barrier()
    if first:
        (draft / MANIFEST).write_text(json.dumps(_digests(draft), indent=1))
        shutil.rmtree(target, ignore_errors=True)  # the same version, saved again
        os.rename(draft, target)
        pointer = folder / f".{LATEST}.partial"
        pointer.write_text(target.name)
        os.replace(pointer, folder / LATEST)
    dist.barrier()
    return target


def load(engine: Any, folder: Path) -> dict[str, int]:
    """Called on every rank; returns the `progress` that was saved."""
    checkpoint = newest(folder)
    verify(checkpoint)
    path, progress = engine.load_checkpoint(str(checkpoint), tag=TAG)
    if path is None:
        raise DataError(f"{checkpoint}: DeepSpeed found no state to load; was it saved whole?")
    return progress


def newest(folder: Path) -> Path:
    pointer = folder / LATEST
    if not pointer.is_file():
        raise DataError(f"expected a checkpoint in {folder}, but it has no file `{LATEST}`")
    return folder / pointer.read_text().strip()


def verify(checkpoint: Path) -> None:
    """Refuse a checkpoint whose files are not those that were saved."""
    manifest = checkpoint / MANIFEST
    if not manifest.is_file():
        raise DataError(f"expected {manifest}, found none; choose another checkpoint")
    expected, found = json.loads(manifest.read_text()), _digests(checkpoint)
    wrong = sorted(
        name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)
    )
    if wrong:
        raise DataError(
            f"{checkpoint}: {', '.join(wrong)} differ from the manifest; the checkpoint is damaged "
            "or was edited: choose another one"
        )


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name != MANIFEST)
    digests = {}
    for file in files:
        with file.open("rb") as stream:
            digests[str(file.relative_to(folder))] = hashlib.file_digest(
                stream, "sha256"
            ).hexdigest()
    return digests
