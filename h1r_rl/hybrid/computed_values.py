"""What the learner's forward pass computes a hybrid's state-space layers with.

Invariant: values are taken inside a forward pass, at the moment when a module reads them, so what a
hook or a cast makes of a parameter is seen and the parameter itself is not. The names are those of
the engine's side (`actors.engine_tensors`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Values = dict[str, torch.Tensor]


def computed_values(model: nn.Module, run: Callable[[], Any]) -> Values:
    """float32 copies of A, D, dt_bias, convolution, norms and multiplier vectors, flat, as `run`
    (one forward pass of `model`) computes with them."""
    found: Values = {}
    for name, values in tensors_read(model, run).items():
        values = values.float().flatten().cpu()
        prefix, _, last = name.rpartition(".")
        if last == "A_log":
            name, values = f"{prefix}.A", -torch.exp(values)
        found[name] = values
    return found


def tensors_read(model: nn.Module, run: Callable[[], Any]) -> Values:
    """The same tensors (A_log for A) as modules read them, in their own dtypes and shapes."""
    found: Values = {}

    def note(name: str, values: Any) -> None:
        if isinstance(values, torch.Tensor):
            found[name] = values.detach().clone()

    def note_mixer(prefix: str, mixer: Any) -> None:
        for name in ("A_log", "D", "dt_bias"):
            note(f"{prefix}.{name}", getattr(mixer, name))
        note(f"{prefix}.conv1d.weight", mixer.conv1d.weight)
        note(f"{prefix}.conv1d.bias", mixer.conv1d.bias)
        note(f"{prefix}.multipliers", getattr(mixer, "mup_vector", None))
        note(f"{prefix}.norm.weight", getattr(getattr(mixer, "norm", None), "weight", None))

    handles, number, inside = [], 0, ()
    for name, module in model.named_modules():
        if hasattr(module, "A_log"):
            prefix, inside = f"mixer.{number}", (*inside, f"{name}.")
            number += 1
            handles.append(
                module.register_forward_pre_hook(lambda m, _, p=prefix: note_mixer(p, m))
            )
        elif type(module).__name__.endswith("RMSNorm") and not name.startswith(inside):
            handles.append(
                module.register_forward_pre_hook(lambda m, _, n=name: note(f"{n}.weight", m.weight))
            )
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return found


def disagreements(learner: Values, engine: dict[str, tuple[str, list[float]]]) -> dict[str, float]:
    """Largest difference of every tensor that both sides know, by name; 0 where they agree. A
    tensor of which the engine keeps another number of values (it pads or shards) is infinite."""
    return {
        name: (
            float((values - torch.tensor(engine[name][1])).abs().max())
            if len(values) == len(engine[name][1])
            else float("inf")
        )
        for name, values in learner.items()
        if name in engine
    }
