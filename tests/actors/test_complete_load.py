"""A transfer that leaves a part of the model as it was is refused. vLLM itself says so of whole
layers in a warning, of parts not at all."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from actors.complete_load import check_complete, parameter_names
from h1r_rl.errors import RunFailed

SOUND = ("embedding.weight", "fused.a", "fused.b", "norm.weight")


def load_part(param, loaded, part=None):  # names that vLLM binds
    (param.data if part is None else param.data[part]).copy_(loaded)


class Model(nn.Module):
    """As an engine's: one projection made of two of the checkpoint's, a head tied to the embedding,
    a table that no checkpoint has."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(6, 4)
        self.fused = nn.Linear(4, 8, bias=False)
        self.norm = nn.LayerNorm(4, bias=False)
        self.norm.register_buffer("table", torch.ones(3))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embedding.weight
        for parameter in self.parameters():
            parameter.requires_grad_(False).weight_loader = load_part

    def load_weights(self, names) -> None:
        parts = {"fused.a": slice(0, 4), "fused.b": slice(4, 8)}
        for name in names:
            module, part = getattr(self, name.partition(".")[0]), parts.get(name)
            parameter = module.weight
            shape = parameter.shape if part is None else parameter[part].shape
            more = () if part is None else (part,)
            parameter.weight_loader(parameter, torch.full(shape, 7.0), *more)


def reload(names) -> Model:
    from vllm.model_executor.model_loader.reload import (
        finalize_layerwise_reload,
        initialize_layerwise_reload,
        record_metadata_for_reloading,
    )

    model = Model()
    record_metadata_for_reloading(model)
    expected = parameter_names(model)
    initialize_layerwise_reload(model)
    model.load_weights(names)
    check_complete(model, expected)
    finalize_layerwise_reload(model, None)
    return model


def test_a_whole_transfer_passes():
    model = reload(SOUND)
    assert (model.fused.weight == 7).all() and (model.norm.weight == 7).all()


@pytest.mark.parametrize(
    ("left_out", "message"),
    [
        ("norm.weight", "leave norm as it was: 0 of its 4"),
        ("fused.a", "leave fused as it was: 16 of its 32"),
        ("fused.b", "leave fused as it was: 16 of its 32"),
        ("embedding.weight", "leave embedding as it was: 0 of its 24"),
    ],
)
def test_what_is_left_out_is_named(left_out, message):
    with pytest.raises(RunFailed, match=message):
        reload([name for name in SOUND if name != left_out])


def test_all_layers_are_counted():
    with pytest.raises(RunFailed, match=r"embedding \(and 2 more layers\)"):
        reload([])
