"""The policy as a Hugging Face folder that transformers and vLLM load as they are.

Invariant: the folder appears whole or not at all; adapters are merged into their weights, and also
stand in the folder's `adapter` in peft's format; tokenizer, chat template, generation settings and
every other file are those of the folder that the policy came from, but for weights and the card.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from torch import Tensor, nn

from h1r_rl.errors import DataError
from h1r_rl.hybrid.lora import adapted_layers, checkpoint_parameters
from learners.adapter_folder import write_adapter
from learners.model_card import BASE_CARD, CARD, OURS, front_matter, model_card
from learners.weight_sender import whole

WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json")


def export_folder(model: nn.Module, source: Path, folder: Path, *, sharded: bool) -> None:
    """Called on every rank (`sharded`: ZeRO-3 gathers, one parameter at a time); rank 0 writes."""
    import torch.distributed as dist

    state: dict[str, Tensor] = {}
    adapted = adapted_layers(model)
    for name, parameter in checkpoint_parameters(model).items():
        with whole(parameter, sharded) as values:
            if dist.get_rank() == 0:
                state[name] = (adapted[name].merged() if name in adapted else values).cpu().clone()
    if dist.get_rank() == 0:
        _write(model, state, source, folder)


def _write(model: nn.Module, state: dict[str, Tensor], source: Path, folder: Path) -> None:
    if folder.exists():
        raise DataError(f"expected to create {folder}, but it exists; remove it or rename the run")
    draft = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(draft, ignore_errors=True)
    model.save_pretrained(draft, state_dict=state)
    for file in sorted(source.iterdir()):
        target = draft / file.name
        if file.is_file() and not target.exists() and not file.name.endswith(WEIGHTS):
            if file.name == CARD and OURS not in (front_matter(source).get("tags") or ()):
                target = draft / BASE_CARD
            shutil.copy2(file, target)
    (draft / CARD).write_text(model_card(source, model.config.model_type), encoding="utf-8")  # pyright: ignore[reportAttributeAccessIssue, reportArgumentType]
    if adapted_layers(model):
        write_adapter(model, source, draft / "adapter")
    for file in draft.rglob("*.safetensors"):
        file.chmod(0o644)  # the library makes it private; engines of other users load it too
    os.rename(draft, folder)
