"""A head tied to the embedding follows it through a weight update on CPUs.

vLLM's CPU build multiplies by a packed copy of a weight. A reload packs anew what it loads; a tied
head is loaded under the embedding's name alone, so it would answer from the weights before.
"""

from __future__ import annotations

from torch import nn


def pack_tied_heads(model: nn.Module) -> None:
    """Pack every language-model head of `model` that shares another module's weight."""
    from vllm.model_executor.layers.vocab_parallel_embedding import (
        ParallelLMHead,
        VocabParallelEmbedding,
    )

    embeddings = [m for m in model.modules() if isinstance(m, VocabParallelEmbedding)]
    for head in embeddings:
        others = (other for other in embeddings if other is not head)
        if isinstance(head, ParallelLMHead) and any(o.weight is head.weight for o in others):
            head.quant_method.process_weights_after_loading(head)
