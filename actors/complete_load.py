"""Whether a transfer reached every parameter of the model.

vLLM puts a layer's old weights back when a reload brought it none, and a fused projection that got
one of its parts keeps whatever memory the others were given; neither is an error there. Beside a
bfloat16 engine log-probabilities do not show one stale layer, so what was loaded is counted.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import nn

from h1r_rl.errors import RunFailed


def parameter_names(model: nn.Module) -> frozenset[str]:
    """What a transfer has to bring, taken before a reload begins: a head tied to the embedding is
    one parameter with it now and two while vLLM reloads."""
    return frozenset(name for name, _ in model.named_parameters())


def check_complete(model: nn.Module, expected: Collection[str]) -> None:
    """Between `load_weights` and vLLM's finalisation, which forgets the counts. Raises RunFailed
    with the first layer that got less than all of its parameters."""
    short = [
        (name, *counts)
        for name, module in model.named_modules()
        if (counts := _counts(name, module, expected)) is not None
    ]
    if short:
        name, found, wanted = short[0]
        more = f" (and {len(short) - 1} more layers)" if len(short) > 1 else ""
        raise RunFailed(
            f"the weights that arrived leave {name}{more} as it was: {found} of its {wanted} "
            "values were loaded. The learner's names and vLLM's class for this model disagree: "
            "docs/tripwires/logprob_gap.md"
        )


def _counts(name: str, module: nn.Module, expected: Collection[str]) -> tuple[int, int] | None:
    """(loaded, wanted) of the module's own parameters where the first falls short."""
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info
    from vllm.model_executor.model_loader.reload.utils import get_tensor_load_numel

    prefix = f"{name}." if name else ""
    own = [p for n, p in module._parameters.items() if p is not None and prefix + n in expected]
    info: Any = get_layerwise_info(module)
    if not own or not info.can_load():  # a layer that got everything has been closed
        return None
    wanted = sum(get_tensor_load_numel(parameter) for parameter in own)
    enough = 1 if _pads(module) else wanted
    return None if info.load_numel >= enough else (info.load_numel, wanted)


def _pads(module: nn.Module) -> bool:
    """Whether the layer may hold more values than any checkpoint has for it."""
    from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
    from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

    return isinstance(module, VocabParallelEmbedding | RoutedExperts)
