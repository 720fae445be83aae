"""A Falcon-H1 small enough for a CPU, with everything that makes the real ones hard.

Invariant: the folder is an ordinary Hugging Face model folder (configuration, weights, tokenizer,
chat template, generation settings); nothing here is needed to use it, and nothing that uses it may
know that it is tiny. Its multipliers follow the closed form that the published sizes obey, so no
path is ever tested with multipliers of 1.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from h1r_rl.config.schema import TinyModelConfig
from h1r_rl.errors import DataError
from h1r_rl.hybrid.chat_template import CHAT_TEMPLATE, SYSTEM_SENTENCES

if TYPE_CHECKING:
    from transformers import FalconH1ForCausalLM, PreTrainedTokenizerFast

# In id order, after the 256 bytes. Control tokens are dropped from decoded text; the words are not,
# because verifiers read them there.
CONTROL_TOKENS = ("<|pad|>", "<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>")
WORD_TOKENS = ("<think>", "</think>", "\\boxed{", "system", "user", "assistant")


def build_tiny_model(config: TinyModelConfig, folder: Path, *, seed: int) -> None:
    """Write a freshly initialised model and its tokenizer to `folder`, which must not exist yet.

    The same config and seed give the same bytes of weights; the folder appears whole or not at all.
    """
    from transformers import GenerationConfig
    from transformers.utils import logging

    logging.disable_progress_bar()  # one tiny file is no progress to show
    if folder.exists():
        raise DataError(
            f"expected to create the model folder {folder}, but it exists already; "
            "remove it or choose another run name"
        )
    tokenizer = build_tokenizer(config.max_position)
    model = build_model(config, tokenizer, seed=seed)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=[
            tokenizer.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|end_of_text|>")
        ],
    )
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-"))
    try:
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        draft.chmod(0o755)  # mkdtemp makes it private; a model folder is shared like any output
        os.rename(draft, folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def build_model(
    config: TinyModelConfig, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> FalconH1ForCausalLM:
    """A float32 model under its own seed; the caller's random state is left alone."""
    import torch
    from transformers import FalconH1Config, FalconH1ForCausalLM

    hf_config = FalconH1Config(
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        hidden_size=config.hidden_size,
        num_hidden_layers=config.num_layers,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,  # pyright: ignore[reportCallIssue]
        intermediate_size=config.intermediate_size,
        mamba_d_ssm=config.mamba_heads * config.mamba_head_dim,
        mamba_n_heads=config.mamba_heads,
        mamba_d_head=config.mamba_head_dim,
        mamba_d_state=config.mamba_d_state,
        mamba_n_groups=config.mamba_n_groups,
        mamba_chunk_size=config.mamba_chunk_size,
        mamba_rms_norm=config.mamba_rms_norm,
        mamba_norm_before_gate=False,
        tie_word_embeddings=config.tie_embeddings,
        max_position_embeddings=config.max_position,
        rope_parameters={"rope_type": "default", "rope_theta": 1e11},
        # A fan-in this many times smaller needs weights this much larger for outputs as large.
        initializer_range=0.02 * math.sqrt(config.multiplier_scale),
        dtype="float32",
        **multipliers(config),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = FalconH1ForCausalLM(hf_config)
        _init_mixers(model)
    return model


def multipliers(config: TinyModelConfig) -> dict[str, Any]:
    """Forward multipliers by the closed form that reproduces the published sizes (0.5B to 34B),
    taken at `multiplier_scale` times this model's widths.

    They shrink as 1/width where the fan-in grows, so that one learning rate suits every matrix of
    models between 0.5B and 34B. Below that they part: keys and the blocks' outputs would learn
    many times as fast as the queries.
    """
    scale = config.multiplier_scale
    r = 1280 / (config.hidden_size * scale)
    attention_width = config.num_heads * config.head_dim * scale
    d_ssm = config.mamba_heads * config.mamba_head_dim * scale
    intermediate = config.intermediate_size * scale
    return {
        "embedding_multiplier": 4 * math.sqrt(2),
        "lm_head_multiplier": r / 32,
        "key_multiplier": 2**-2.5 * r**2 * math.sqrt(128 / config.head_dim),
        "attention_in_multiplier": 1.0,
        "attention_out_multiplier": 0.5 * r * 768 / attention_width,
        "ssm_in_multiplier": r,
        "ssm_out_multiplier": math.sqrt(2) / 6 * 1536 / d_ssm,
        "mlp_multipliers": [r / math.sqrt(2), 5 / 16 * r * 3072 / intermediate],
        "ssm_multipliers": [  # z, x, B, C, dt
            2**-1.5,
            0.25,
            2**-2.5 * 256 / config.mamba_d_state,
            0.5,
            2**-1.5,
        ],
    }


def _init_mixers(model: FalconH1ForCausalLM) -> None:
    """Mamba-2's initial state dynamics and convolution, in place of the library's placeholders.

    The library's dt_bias of 1 forgets within a token or two and its convolution starts near zero:
    a fresh model could hardly learn. Mamba-2 (2405.21060): dt log-uniform in [0.001, 0.1], A
    uniform in [1, 16]; convolution uniform in +-1/sqrt(width).
    """
    import torch

    with torch.no_grad():
        for layer in model.model.layers:
            mixer: Any = layer.mamba
            low, high = math.log(0.001), math.log(0.1)
            dt = torch.exp(torch.empty(mixer.num_heads).uniform_(low, high))
            mixer.dt_bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # softplus of this is dt
            mixer.A_log.copy_(torch.log(torch.empty(mixer.num_heads).uniform_(1, 16)))
            bound = 1 / math.sqrt(mixer.conv_kernel_size)
            mixer.conv1d.weight.uniform_(-bound, bound)


def build_tokenizer(max_position: int) -> PreTrainedTokenizerFast:
    """One token a byte, so any text can be written; one for each frequent word of the format."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({char: i for i, char in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True) for t in CONTROL_TOKENS])
    words = (*WORD_TOKENS, *SYSTEM_SENTENCES)
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in words])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|begin_of_text|>",
        eos_token="<|im_end|>",
        pad_token="<|pad|>",
        chat_template=CHAT_TEMPLATE,
        model_max_length=max_position,
        clean_up_tokenization_spaces=False,
    )
