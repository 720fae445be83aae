"""Low-rank adapters (LoRA, 2106.09685) on a frozen policy.

Invariant: an adapted layer computes with W + alpha / rank x B A, added in float32, which is the
tensor that the wire carries and the export holds: learner and engine compute with one value also
where an engine rounds it. W itself never changes, so nothing drifts however often it is merged. For
the same reason there is no dropout: it would make another policy of the learner's than of the
engine's.

The sum costs rank / tokens of the layer's own product; the gradient never takes the shape of W.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from h1r_rl.config.lora_targets import target_modules
from h1r_rl.config.schema import LoraConfig


class AdaptedLinear(nn.Linear):
    """A linear layer with its own weight and bias, frozen, and an adapter: lora_A [rank, in],
    lora_B [out, rank], of which the second starts at 0."""

    def __init__(self, base: nn.Linear, lora: LoraConfig, generator: torch.Generator) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.weight, self.bias = base.weight, base.bias
        self.scale = lora.alpha / lora.rank
        bound = base.in_features**-0.5  # that of a new linear layer, as in the paper's code
        first = torch.rand(lora.rank, base.in_features, generator=generator) * 2 - 1
        self.lora_A = nn.Parameter((bound * first).to(base.weight))
        self.lora_B = nn.Parameter(base.weight.new_zeros(base.out_features, lora.rank))
        self.is_on = True
        self.held_as: torch.dtype | None = None  # what the engine rounds the merged weight to

    def merged(self) -> Tensor:
        """[out, in] in the weight's own dtype, a tensor of its own."""
        return _merged(self.weight.detach(), self.lora_A.detach(), self.lora_B.detach(), self.scale)

    def forward(self, input: Tensor) -> Tensor:
        adapter = (self.lora_A, self.lora_B) if self.is_on else (None, None)
        return _AdaptedProduct.apply(  # pyright: ignore[reportReturnType]
            input, self.weight, self.bias, *adapter, self.scale, self.held_as
        )


class _AdaptedProduct(torch.autograd.Function):
    """x (W + scale B A)^T + bias, saving x alone beside the parameters: the sum is made again in
    backward, and the gradients of A and B are products of rank columns."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor | None,
        b: Tensor | None,
        scale: float,
        held_as: torch.dtype | None,
    ) -> Tensor:
        device = x.device.type
        ctx.cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        ctx.scale, ctx.held_as, ctx.dtype = scale, held_as, x.dtype
        with torch.autocast(device, enabled=False):
            x = x.to(ctx.cast or x.dtype)
            ctx.save_for_backward(x, weight, a, b)
            bias = None if bias is None else bias.to(x.dtype)
            return functional.linear(x, _as_computed(ctx, weight, a, b), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, b = ctx.saved_tensors
        on_x, on_a, on_b = (ctx.needs_input_grad[i] for i in (0, 3, 4))
        with torch.autocast(x.device.type, enabled=False):
            grad_x = grad_a = grad_b = None
            if on_x:
                grad_x = (upstream @ _as_computed(ctx, weight, a, b)).to(ctx.dtype)
            rows, slopes = x.flatten(0, -2), upstream.flatten(0, -2)
            if on_a:
                grad_a = ctx.scale * ((slopes @ b.to(x.dtype)).T @ rows).to(a.dtype)
            if on_b:
                grad_b = ctx.scale * (slopes.T @ (rows @ a.to(x.dtype).T)).to(b.dtype)
        return grad_x, None, None, grad_a, grad_b, None, None


def _as_computed(ctx: Any, weight: Tensor, a: Tensor | None, b: Tensor | None) -> Tensor:
    """The weight that the product is made with: merged, as the engine holds it, as autocast has
    it."""
    whole = weight if a is None or b is None else _merged(weight, a, b, ctx.scale)
    if ctx.held_as is not None:
        whole = whole.to(ctx.held_as).to(weight.dtype)
    return whole.to(ctx.cast or whole.dtype)


def _merged(weight: Tensor, a: Tensor, b: Tensor, scale: float) -> Tensor:
    return torch.addmm(weight, b, a, alpha=scale)


def add_adapters(model: nn.Module, lora: LoraConfig, seed: int) -> None:
    """Freeze `model` and put an adapter on each target layer; the same ones for one seed, and as
    yet without effect."""
    names = target_modules(lora, model.config.model_type)  # pyright: ignore
    generator = torch.Generator().manual_seed(seed)
    model.requires_grad_(False)
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if name in names and isinstance(module, nn.Linear):
            setattr(model.get_submodule(parent), name, AdaptedLinear(module, lora, generator))


def adapted_layers(model: nn.Module) -> dict[str, AdaptedLinear]:
    """By the name of the weight in a checkpoint; empty without adapters."""
    return {
        f"{path}.weight": module
        for path, module in model.named_modules()
        if isinstance(module, AdaptedLinear)
    }


def checkpoint_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The model's own parameters, as without adapters, in order; adapted ones not merged."""
    layers = adapted_layers(model).values()
    adapters = {id(p) for layer in layers for p in (layer.lora_A, layer.lora_B)}
    return {name: p for name, p in model.named_parameters() if id(p) not in adapters}


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before `add_adapters`."""
    layers = list(adapted_layers(model).values())
    for layer in layers:
        layer.is_on = False
    try:
        yield
    finally:
        for layer in layers:
            layer.is_on = True
