"""The learner's forward pass with the values that an engine of a coarser dtype holds.

Invariant: a tensor that vLLM keeps in its weights' dtype (D, dt_bias, convolution, norms, the
multiplier vector, embeddings and projections) enters the forward pass rounded to that dtype; A_log,
which vLLM alone keeps in float32 (as A), is left alone. Parameters stay float32: they are what the
optimizer updates, the wire carries and a checkpoint holds, and gradients pass the rounding as if it
were not there, as they pass autocast's.

Without this, dt_bias alone is off by up to 2^-9 of its value on one side, and the state's decay
carries that through the whole sequence. The other way round (a float32 D, convolution and norm in
the engine) is not open: vLLM's norm kernels read weights in the activations' dtype.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from h1r_rl.hybrid.lora import AdaptedLinear

KEPT_IN_FLOAT32 = ("A_log",)  # MambaMixer2: A = -exp(A_log) in float32, whatever the model's dtype
MULTIPLIER_VECTOR = "mup_vector"  # a constant that both sides build from the configuration


class _Rounded(torch.autograd.Function):
    """x.to(dtype).to(x.dtype) whose gradient is that of the identity."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, dtype: torch.dtype) -> Tensor:
        return values.to(dtype).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # pyright: ignore
        return gradient, None


def rounded(values: Tensor, dtype: torch.dtype) -> Tensor:
    """`values` as a tensor of `dtype` would hold them, in their own dtype."""
    if values.dtype == dtype:
        return values
    return _Rounded.apply(values, dtype)  # pyright: ignore[reportReturnType]


def compute_as_engine(model: nn.Module, dtype: str, *, autocast: bool) -> None:
    """From now on forward passes of `model` (float32) use what an engine of `dtype` holds.

    `autocast`: matrix products round their own weights, and only what they do not touch is rounded
    here. Under ZeRO-3 call it after `deepspeed.initialize`: hooks run in the order they were
    registered, and DeepSpeed's gather the parameters. The output head is read by our loss directly
    (`token_logprobs`), so its weight is rounded there.
    """
    coarse = getattr(torch, dtype)
    if coarse == torch.float32:
        return
    for name, buffer in model.named_buffers():
        if name.endswith(MULTIPLIER_VECTOR):
            buffer.copy_(buffer.to(coarse))
    for module in model.modules():
        if isinstance(module, nn.Embedding):  # rounding the rows read costs less than the table
            module.register_forward_hook(lambda _, __, out: rounded(out, coarse))  # pyright: ignore[reportArgumentType]
            continue
        if isinstance(module, AdaptedLinear) and not autocast:
            module.held_as = coarse  # rounded once merged, as the engine does it
        names = list(_rounded_in(module, autocast))
        if names:
            _shadow(module, names, coarse)


def _rounded_in(module: nn.Module, autocast: bool) -> Iterator[tuple[nn.Module, str]]:
    """(owner, attribute) of the parameters that `module`'s forward pass reads itself."""
    if autocast and isinstance(module, nn.Linear):
        return
    for name, parameter in module.named_parameters(recurse=False):
        if isinstance(module, AdaptedLinear) and name != "bias":
            continue
        if name not in KEPT_IN_FLOAT32 and (parameter.ndim == 1 or not autocast):
            yield module, name
    if hasattr(module, "A_log"):  # a mixer reads its convolution's and its norm's weights itself
        for child in (module.conv1d, getattr(module, "norm", None)):
            if isinstance(child, nn.Module):
                yield from ((child, name) for name, _ in child.named_parameters(recurse=False))


def _shadow(module: nn.Module, names: list[tuple[nn.Module, str]], dtype: torch.dtype) -> None:
    """While `module` runs, its parameters' attributes are the rounded values; the parameters
    themselves, their names and their hooks stay as they are."""

    def enter(*_: Any) -> None:
        for owner, name in names:
            owner.__dict__[name] = rounded(owner._parameters[name], dtype)  # pyright: ignore

    def leave(*_: Any) -> None:
        for owner, name in names:
            owner.__dict__.pop(name, None)

    module.register_forward_pre_hook(enter)
    # Also when the pass is left by an exception, as recomputation in backward is, once it has
    # what it needs.
    module.register_forward_hook(leave, always_call=True)
