"""What a vLLM worker computes a hybrid's state-space layers with, read from its live model.

Names are those of `h1r_rl.hybrid.computed_values`, which reads the same from the learner: mixers
are counted in the model's order, norms keep the names that both sides share.
"""

from __future__ import annotations

from typing import Any

Held = dict[str, tuple[str, list[float]]]  # name -> (dtype, values in row-major order)


def held_tensors(model: Any) -> Held:
    """Values of A, D, dt_bias, convolution, norms and the multiplier vector, and the
    dtypes of the states (without values)."""
    found: dict[str, Any] = {}
    number = 0
    for name, module in model.named_modules():
        kind = type(module).__name__
        if kind == "MambaMixer2":
            prefix = f"mixer.{number}"
            number += 1
            for key in ("A", "D", "dt_bias"):
                found[f"{prefix}.{key}"] = getattr(module, key)
            # The alias that kernels are given, not the parameter it should be a view of.
            found[f"{prefix}.conv1d.weight"] = module.conv_weights
            found[f"{prefix}.conv1d.bias"] = module.conv1d.bias
            found[f"{prefix}.norm.weight"] = module.norm.weight
            for state, cache in zip(("conv_state", "ssm_state"), module.kv_cache, strict=False):
                found[f"{prefix}.{state}"] = cache[:0]
        elif kind == "RMSNorm" and getattr(module, "weight", None) is not None:
            found[f"{name}.weight"] = module.weight
        vector = getattr(module, "mup_vector", None)
        if vector is not None:  # Falcon-H1 keeps it beside the mixer that follows
            found[f"mixer.{number}.multipliers"] = vector
    return {
        name: (str(t.dtype).removeprefix("torch."), t.detach().float().flatten().tolist())
        for name, t in found.items()
        if t is not None
    }
