"""Packed rows against transformers' own model, one document at a time."""

import runpy
from pathlib import Path

import pytest
import torch

from h1r_rl.hybrid import boundaries
from h1r_rl.hybrid.boundaries import honours_boundaries, install_boundaries
from h1r_rl.hybrid.load import output_head
from h1r_rl.hybrid.packed_forward import hidden_states

FORMATS = runpy.run_path(str(Path(__file__).parents[1] / "hybrid_formats.py"))
SHAPES, randomise = FORMATS["SHAPES"], FORMATS["randomise"]
LENGTHS = (1, 15, 16, 17, 2, 40, 1, 63, 65, 9)
MODELS = [*SHAPES, "granite-2-tied", "granite-1-untied", "nemotron-1", "nemotron-2"]


def build(name):
    torch.manual_seed(0)
    return FORMATS["MODELS"][name](50)


@pytest.fixture(params=MODELS)
def model(request, monkeypatch):
    """In float64, transformers' casts to float32 included (only its RMS norms keep theirs)."""
    model = build(request.param).train().double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    randomise(model)
    install_boundaries(model)
    return model


def with_originals(model, monkeypatch):
    module = boundaries._modeling_module(model)
    convolution, scan = module.h1r_originals
    monkeypatch.setattr(module, "causal_conv1d_fn", convolution)
    monkeypatch.setattr(module, "mamba2_chunk_scan", scan)
    model.set_attn_implementation("sdpa")


def row(seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (sum(LENGTHS),), generator=generator)
    return ids, torch.tensor((0, *LENGTHS)).cumsum(0)


def gradients(model, loss):
    parameters = dict(model.get_decoder().named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def loss_of(logits, ids, starts):
    """Weighted log-probabilities of every token that another one of its document precedes."""
    positions = torch.tensor([i for i in range(len(ids)) if i not in starts.tolist()])
    weights = torch.rand(len(positions), generator=torch.Generator().manual_seed(5))
    chosen = logits.log_softmax(-1)[positions - 1, ids[positions]]
    return -(chosen * weights.to(chosen.dtype)).sum()


def test_loss_logits_and_gradients_equal_one_by_one(model, monkeypatch):
    ids, starts = row()
    assert honours_boundaries(model)
    parameters = dict(model.named_parameters())
    weight, multiplier = output_head(model)
    packed = hidden_states(model, ids, starts) @ weight.T * multiplier
    loss = loss_of(packed, ids, starts)
    ours = torch.autograd.grad(loss, list(parameters.values()))
    with_originals(model, monkeypatch)
    alone = torch.cat(
        [
            model(input_ids=ids[None, s:e], use_cache=False).logits.reshape(int(e - s), -1)
            for s, e in zip(starts[:-1], starts[1:], strict=True)
        ]
    )
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    expected_loss = loss_of(alone, ids, starts)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6, atol=0)
    gradients_alone = torch.autograd.grad(expected_loss, list(parameters.values()))
    for name, found, expected in zip(parameters, ours, gradients_alone, strict=True):
        scale = expected.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(
            found / scale, expected / scale, rtol=0, atol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )  # fmt: skip


def test_a_document_never_moves_another(model):
    ids, starts = row()
    b = slice(int(starts[5]), int(starts[6]))
    before = hidden_states(model, ids, starts)[b]
    expected = gradients(model, before.square().sum())
    changed = row(seed=9)[0]
    changed[b] = ids[b]
    after = hidden_states(model, changed, starts)[b]
    assert torch.equal(before, after)
    embedding = model.get_input_embeddings().weight
    touched = gradients(model, after.square().sum())
    for name, gradient in touched.items():
        if gradient.shape != embedding.shape:
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5)
    name = next(n for n, p in model.get_decoder().named_parameters() if p is embedding)
    strangers = torch.ones(50, dtype=torch.bool)
    strangers[ids[b]] = False
    assert not touched[name][strangers].any()


def test_padded_rows_where_boundaries_are_not_honoured(model, monkeypatch):
    ids, starts = row()
    packed = hidden_states(model, ids, starts)
    with_originals(model, monkeypatch)
    assert not honours_boundaries(model)
    torch.testing.assert_close(hidden_states(model, ids, starts), packed, rtol=1e-5, atol=1e-5)


def test_transformers_fallback_would_have_leaked(monkeypatch):
    """The reason for all this: if it ever stops leaking, our path may go."""
    model = build("0.5B")
    randomise(model)
    install_boundaries(model)
    ids, starts = row()
    packed = hidden_states(model, ids, starts)
    with_originals(model, monkeypatch)
    boundary_blind = model.get_decoder()(
        input_ids=ids[None],
        seq_idx=torch.bucketize(torch.arange(len(ids)), starts[1:], right=True)[None].int(),
        use_cache=False,
    ).last_hidden_state[0]
    assert (boundary_blind - packed).abs().max() > 1e-2
