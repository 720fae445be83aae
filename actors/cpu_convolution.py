"""A bfloat16 mixer's convolution follows its weight through an update on CPUs with AVX-512 BF16.

There vLLM's CPU build packs a convolution's weight into a tensor of its own when it loads one. A
Mamba-2 mixer computes with a view that it took of the weight before; a reload packs the new weight
elsewhere and leaves that view as it was, so the engine would go on with the old convolution.
"""

from __future__ import annotations

import torch
from torch import nn


@torch.no_grad()
def refresh_convolutions(model: nn.Module) -> None:
    """Every mixer's view gets the values that were packed last."""
    for module in model.modules():
        unpacked = getattr(getattr(module, "conv1d", None), "_cpu_unpacked_conv_weight", None)
        if unpacked is not None and hasattr(module, "conv_weights"):
            module.conv_weights.copy_(unpacked)
