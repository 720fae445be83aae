"""An adapter as a folder that peft loads onto the model it was trained from."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import save_file
from torch import nn

from h1r_rl.hybrid.lora import adapted_layers


def write_adapter(model: nn.Module, base: Path, folder: Path) -> None:
    """`base`: the folder of the frozen model."""
    layers = {name.removesuffix(".weight"): layer for name, layer in adapted_layers(model).items()}
    one = next(iter(layers.values()))
    rank = len(one.lora_A)
    folder.mkdir()
    save_file(
        {
            f"base_model.model.{name}.{part}.weight": getattr(layer, part).detach().cpu()
            for name, layer in layers.items()
            for part in ("lora_A", "lora_B")
        },
        folder / "adapter_model.safetensors",
    )
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(base.resolve()),
        "r": rank,
        "lora_alpha": one.scale * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in layers}),
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2))
