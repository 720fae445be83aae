"""The view that a mixer computes with after vLLM has packed a new weight elsewhere. On a CPU with
AVX-512 BF16 `test_guard_on_real_engine` asks a real engine."""

import torch
from torch import nn

from actors.cpu_convolution import refresh_convolutions


def mixer() -> nn.Module:
    module = nn.Module()
    module.conv1d = nn.Conv1d(6, 6, 4, groups=6, dtype=torch.bfloat16)
    view = module.conv1d.weight.detach().view(6, 4)
    module.register_buffer("conv_weights", view, persistent=False)
    return module


def test_the_view_follows_what_was_packed():
    model = nn.ModuleList([mixer(), mixer(), nn.Linear(2, 2)])
    packed, plain = model[0], model[1]
    new, old = torch.randn(6, 4).bfloat16(), plain.conv_weights.clone()
    packed.conv1d._cpu_unpacked_conv_weight = new
    packed.conv1d.weight.data = torch.zeros(24).bfloat16()  # another layout in other memory
    refresh_convolutions(model)
    assert torch.equal(packed.conv_weights, new)
    assert torch.equal(plain.conv_weights, old)
