"""Tiny models of the three hybrid families, in every variant whose folder we load and export.

Read by `runpy.run_path`, as tests are no package. `MODELS[name](vocab_size)` is a fresh model;
`write_folder` makes an ordinary Hugging Face folder of it, weights far from their initial values.
"""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    FalconH1ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
)

from h1r_rl.config.schema import TinyModelConfig
from h1r_rl.hybrid.tiny import build_tokenizer, multipliers

# heads, kv heads, head dim, mamba heads, mamba head dim, state, groups, rms norm, tied: the ratios
# of the published sizes at tiny widths, some with one KV head and some with two
SHAPES = {
    "0.5B": (8, 2, 32, 6, 16, 16, 1, False, False),
    "1.5B": (4, 1, 32, 6, 16, 32, 1, False, True),
    "1.5B-Deep": (6, 2, 32, 6, 16, 32, 1, True, False),
    "3B": (5, 1, 32, 4, 32, 32, 1, False, False),
    "7B": (6, 1, 32, 4, 24, 32, 1, True, False),
    "34B": (10, 2, 32, 4, 32, 32, 2, True, False),
}


def falcon(vocab_size, shape):
    heads, kv, head_dim, m_heads, m_dim, state, groups, rms, tied = shape
    tiny = TinyModelConfig(
        hidden_size=64, num_heads=heads, num_kv_heads=kv, head_dim=head_dim, mamba_heads=m_heads,
        mamba_head_dim=m_dim, mamba_d_state=state, mamba_n_groups=groups, intermediate_size=96,
    )  # fmt: skip
    config = FalconH1Config(
        vocab_size=vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=heads,
        num_key_value_heads=kv, head_dim=head_dim, intermediate_size=96,
        mamba_d_ssm=m_heads * m_dim, mamba_n_heads=m_heads, mamba_d_head=m_dim,
        mamba_d_state=state, mamba_n_groups=groups, mamba_chunk_size=16, mamba_rms_norm=rms,
        mamba_norm_before_gate=False, tie_word_embeddings=tied, pad_token_id=0,
        max_position_embeddings=512, **multipliers(tiny),
    )  # fmt: skip
    return FalconH1ForCausalLM(config)


def granite(vocab_size, groups, tied):
    """The dense variant: a shared MLP and no experts."""
    config = GraniteMoeHybridConfig(
        vocab_size=vocab_size, hidden_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, intermediate_size=96, shared_intermediate_size=96,
        num_local_experts=0, num_experts_per_tok=0, layer_types=["mamba", "attention"],
        mamba_n_heads=8, mamba_n_groups=groups, mamba_d_state=16, mamba_d_head=16,
        mamba_chunk_size=16, embedding_multiplier=3.0, attention_multiplier=0.2,
        residual_multiplier=0.4, logits_scaling=4.0, position_embedding_type="rope",
        pad_token_id=0, tie_word_embeddings=tied, max_position_embeddings=512,
    )  # fmt: skip
    return GraniteMoeHybridForCausalLM(config)


def nemotron(vocab_size, groups):
    """Mamba, attention and MLP layers; the expert layers are left out."""
    config = NemotronHConfig(
        vocab_size=vocab_size, hidden_size=64, num_attention_heads=2, num_key_value_heads=1,
        head_dim=32, layers_block_type=["linear_attention", "full_attention", "mlp"],
        intermediate_size=96, mamba_num_heads=8, mamba_head_dim=16, n_groups=groups,
        ssm_state_size=16, chunk_size=16, pad_token_id=0, max_position_embeddings=512,
    )  # fmt: skip
    return NemotronHForCausalLM(config)


def _variant(shape, groups, rms, tied):
    return (*shape[:-3], groups, rms, tied)


MODELS = {
    **{name: partial(falcon, shape=shape) for name, shape in SHAPES.items()},
    **{
        f"falcon-{groups}-{'rms' if rms else 'plain'}-{'tied' if tied else 'untied'}": partial(
            falcon, shape=_variant(SHAPES["34B"], groups, rms, tied)
        )
        for groups, rms, tied in itertools.product((1, 2), (False, True), (False, True))
    },
    **{
        f"granite-{groups}-{'tied' if tied else 'untied'}": partial(
            granite, groups=groups, tied=tied
        )
        for groups, tied in itertools.product((1, 2), (False, True))
    },
    **{f"nemotron-{groups}": partial(nemotron, groups=groups) for groups in (1, 2)},
}


def randomise(model, seed: int = 1) -> None:
    """No gain, rate or bias at its initial 1 or 0, and logits far from uniform."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.add_(0.1 * noise.to(parameter.dtype))


def write_folder(name: str, folder: Path) -> None:
    """A float32 folder as one from outside: weights, tokenizer, card, licence and another file."""
    tokenizer = build_tokenizer(512)
    torch.manual_seed(0)
    model = MODELS[name](len(tokenizer))
    randomise(model)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# A base model\n")
    (folder / "LICENSE").write_text("Do what you like.\n")
    (folder / "notes.json").write_text("{}")


def transformers_model(folder):
    """transformers' own model, its floor under Nemotron-H's step sizes lifted: vLLM has none."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    for mixer in (m for m in model.modules() if hasattr(m, "time_step_limit")):
        mixer.time_step_limit = (0.0, float("inf"))
    return model
