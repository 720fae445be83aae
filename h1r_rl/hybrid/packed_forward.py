"""Hidden states of documents laid end to end, without one document seeing another.

Invariant: the result for a document is what the model gives for that document alone. Documents
share a row only where everything that mixes tokens honours boundaries (`boundaries.py`, and the
CUDA kernels through `seq_idx`); any other model gets a right-padded row for each document, which a
causal model cannot tell from the document alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from h1r_rl.hybrid.boundaries import Documents, honours_boundaries


def hidden_states(model: Any, input_ids: Tensor, document_starts: Tensor) -> Tensor:
    """[T, hidden] final-norm outputs for `input_ids` [T] int64, `document_starts` [D + 1]."""
    lengths = tuple((document_starts[1:] - document_starts[:-1]).tolist())
    documents = Documents(lengths, document_starts)
    forward = _packed if honours_boundaries(model) else _padded
    return forward(model, input_ids, documents)


def _packed(model: Any, input_ids: Tensor, documents: Documents) -> Tensor:
    output = model.get_decoder()(
        input_ids=input_ids[None],
        # Built masks, so that none of [T, T] is: ours follow from `documents`.
        attention_mask={"full_attention": None, "linear_attention": None},
        position_ids=documents.positions[None],
        use_cache=False,
        documents=documents,
        seq_idx=documents.index[None].to(torch.int32),
    )
    return output.last_hidden_state[0]


def _padded(model: Any, input_ids: Tensor, documents: Documents) -> Tensor:
    rows, columns = documents.index, documents.positions
    width = max(*documents.lengths, 2)  # mixers may squeeze a row of one token
    padded = input_ids.new_zeros(len(documents.lengths), width)
    padded[rows, columns] = input_ids
    mask = torch.zeros_like(padded)
    mask[rows, columns] = 1
    output = model.get_decoder()(input_ids=padded, attention_mask=mask, use_cache=False)
    return output.last_hidden_state[rows, columns]
