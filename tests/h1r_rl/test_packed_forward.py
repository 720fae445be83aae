"""Packed rows against transformers' own model, one document at a time."""

import pytest
import torch
from transformers import FalconH1Config, FalconH1ForCausalLM

from h1r_rl.config.schema import TinyModelConfig
from h1r_rl.hybrid import boundaries
from h1r_rl.hybrid.boundaries import honours_boundaries, install_boundaries
from h1r_rl.hybrid.packed_forward import hidden_states
from h1r_rl.hybrid.tiny import multipliers

LENGTHS = (1, 15, 16, 17, 2, 40, 1, 63, 65, 9)

# heads, kv heads, head dim, mamba heads, mamba head dim, state, groups, rms norm, tied
SHAPES = {
    "0.5B": (4, 1, 16, 6, 16, 16, 1, False, False),
    "1.5B": (4, 1, 16, 6, 16, 32, 1, False, True),
    "1.5B-Deep": (3, 1, 16, 6, 16, 32, 1, True, False),
    "3B": (5, 1, 16, 4, 32, 32, 1, False, False),
    "7B": (6, 1, 16, 4, 24, 32, 1, True, False),
    "34B": (5, 1, 16, 4, 32, 32, 2, True, False),
}


def falcon(heads, kv, head_dim, m_heads, m_dim, state, groups, rms, tied):
    tiny = TinyModelConfig(
        hidden_size=64, num_heads=heads, num_kv_heads=kv, head_dim=head_dim, mamba_heads=m_heads,
        mamba_head_dim=m_dim, mamba_d_state=state, mamba_n_groups=groups, intermediate_size=96,
    )  # fmt: skip
    config = FalconH1Config(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=head_dim, intermediate_size=96,
        mamba_d_ssm=m_heads * m_dim, mamba_n_heads=m_heads, mamba_d_head=m_dim,
        mamba_d_state=state, mamba_n_groups=groups, mamba_chunk_size=16, mamba_rms_norm=rms,
        mamba_norm_before_gate=False, tie_word_embeddings=tied, pad_token_id=0,
        **multipliers(tiny),
    )  # fmt: skip
    torch.manual_seed(0)
    return FalconH1ForCausalLM(config)


def granite():
    from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

    config = GraniteMoeHybridConfig(
        vocab_size=50, hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=96, shared_intermediate_size=96,
        num_local_experts=0, num_experts_per_tok=0, layer_types=["mamba", "attention"],
        mamba_n_heads=8, mamba_n_groups=2, mamba_d_state=16, mamba_d_head=16, mamba_chunk_size=16,
        embedding_multiplier=3.0, attention_multiplier=0.2, residual_multiplier=0.4,
        logits_scaling=4.0, position_embedding_type="rope", pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return GraniteMoeHybridForCausalLM(config)


def nemotron():
    from transformers import NemotronHConfig, NemotronHForCausalLM

    config = NemotronHConfig(
        vocab_size=50, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        layers_block_type=["linear_attention", "full_attention", "mlp"], intermediate_size=96,
        mamba_num_heads=8, mamba_head_dim=16, n_groups=2, ssm_state_size=16, chunk_size=16,
        pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    return NemotronHForCausalLM(config)


MODELS = {name: (lambda shape=shape: falcon(*shape)) for name, shape in SHAPES.items()} | {
    "granite": granite,
    "nemotron": nemotron,
}


@pytest.fixture(params=MODELS)
def model(request, monkeypatch):
    """In float64, transformers' casts to float32 included (only its RMS norms keep theirs)."""
    model = MODELS[request.param]().train().double()
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    randomise(model)
    install_boundaries(model)
    return model


def randomise(model):
    """No gain, rate or bias at its initial 1 or 0, and logits far from uniform."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise.to(parameter.dtype))


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


def test_equals_one_by_one(model, monkeypatch):
    ids, starts = row()
    assert honours_boundaries(model)
    packed = hidden_states(model, ids, starts)
    seed = torch.randn_like(packed)
    ours = gradients(model, (packed * seed).sum())
    with_originals(model, monkeypatch)
    alone = torch.cat(
        [
            model.get_decoder()(input_ids=ids[None, s:e], use_cache=False)
            .last_hidden_state.reshape(int(e - s), -1)
            for s, e in zip(starts[:-1], starts[1:], strict=True)
        ]
    )  # fmt: skip
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)
    for name, expected in gradients(model, (alone * seed).sum()).items():
        scale = expected.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(
            ours[name] / scale,
            expected / scale,
            rtol=0,
            atol=1e-5,
            msg=lambda m, n=name: f"{n}: {m}",
        )


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
    model = falcon(*SHAPES["0.5B"])
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
