"""The tiny folder is what a real one is: plain Hugging Face, ChatML, non-trivial multipliers."""

import hashlib
import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from h1r_rl.config.schema import TinyModelConfig
from h1r_rl.errors import DataError
from h1r_rl.hybrid.tiny import build_tiny_model, multipliers


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "model"
    build_tiny_model(TinyModelConfig(), path, seed=3)
    return path


def weights_digest(path):
    return hashlib.sha256((path / "model.safetensors").read_bytes()).hexdigest()


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        (
            dict(hidden_size=1024, num_heads=8, num_kv_heads=2, head_dim=64, mamba_heads=24,
                 mamba_head_dim=64, mamba_d_state=128, intermediate_size=2048),
            dict(lm_head_multiplier=0.0390625, key_multiplier=0.390625,
                 attention_out_multiplier=0.9375, ssm_in_multiplier=1.25, ssm_out_multiplier=0.2357,
                 mlp_multipliers=[0.88388, 0.58594],
                 ssm_multipliers=[0.35355, 0.25, 0.35355, 0.5, 0.35355]),
        ),
        (
            dict(hidden_size=3072, num_heads=12, num_kv_heads=2, head_dim=128, mamba_heads=24,
                 mamba_head_dim=128, mamba_d_state=256, intermediate_size=12288),
            dict(lm_head_multiplier=0.0130208, key_multiplier=0.0306904,
                 attention_out_multiplier=0.1041667, ssm_in_multiplier=0.4166667,
                 ssm_out_multiplier=0.1178511, mlp_multipliers=[0.29463, 0.03255],
                 ssm_multipliers=[0.35355, 0.25, 0.17678, 0.5, 0.35355]),
        ),
    ],
    ids=["0.5B", "7B"],
)  # fmt: skip
def test_closed_form_reproduces_published_multipliers(size, expected):
    found = multipliers(TinyModelConfig(**size, multiplier_scale=1))
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, rel=1e-4), name


def test_no_multiplier_is_one_by_accident():
    found = multipliers(TinyModelConfig())
    values = [v for name, v in found.items() if name != "attention_in_multiplier"]
    flat = [x for v in values for x in (v if isinstance(v, list) else [v])]
    assert len(flat) == 13 and all(abs(x - 1) > 0.1 for x in flat)


def test_same_seed_same_weights_and_random_state_untouched(folder, tmp_path):
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    build_tiny_model(TinyModelConfig(), tmp_path / "same", seed=3)
    assert torch.equal(before, torch.random.get_rng_state())
    build_tiny_model(TinyModelConfig(), tmp_path / "other", seed=4)
    assert weights_digest(tmp_path / "same") == weights_digest(folder)
    assert weights_digest(tmp_path / "other") != weights_digest(folder)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["other", "same"]  # no drafts left


def test_existing_folder_is_not_overwritten(folder):
    before = weights_digest(folder)
    with pytest.raises(DataError, match="exists already"):
        build_tiny_model(TinyModelConfig(), folder, seed=9)
    assert weights_digest(folder) == before


def test_fresh_model_has_sane_scales(folder):
    """Pre-norm residual stream of order 1 to 10, logits near uniform: it can learn from there."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    ids = torch.randint(0, model.config.vocab_size, (4, 48), generator=torch.manual_seed(0))
    with torch.no_grad():
        out = model(ids, output_hidden_states=True, use_cache=False)
    first_block = out.hidden_states[1] - out.hidden_states[0]
    assert 0.2 < first_block.std().item() < 10
    assert 0.01 < out.logits.std().item() < 1.0


def test_state_lives_longer_than_the_convolution(folder):
    """A token 24 positions back still moves the mixer's output (the library's default forgets)."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    mixer = model.model.layers[0].mamba
    x = torch.randn(1, 32, model.config.hidden_size, generator=torch.manual_seed(0))
    changed = x.clone()
    changed[:, 4] += 3.0
    with torch.no_grad():
        gap = (mixer(x) - mixer(changed))[0].norm(dim=-1)
    # Over eight seeds 2e-4 to 5e-3; with the library's default it is 0.
    assert gap[:4].max() == 0 and gap[28] > 1e-4 * gap[4]


def test_tokenizer_round_trip_and_words(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "<think>7+8=5,5*3=5</think>\\boxed{5} é\n"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    boxed = tokenizer("\\boxed{5}", add_special_tokens=False)["input_ids"]
    assert len(boxed) == 3
    assert len(tokenizer) == AutoModelForCausalLM.from_pretrained(folder).config.vocab_size


SYSTEM = (
    "<|im_start|>system\nYou are H1R, an assistant that reasons. First reason inside <think> "
    "</think>, then give the answer.<|im_end|>\n"
)
BRIEF = {"role": "system", "content": "Be brief."}
USER = {"role": "user", "content": "1+1"}


def test_chat_template_is_chatml_with_a_default_system_turn(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rendered = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert rendered == SYSTEM + "<|im_start|>user\n1+1<|im_end|>\n<|im_start|>assistant\n"
    ids = tokenizer.apply_chat_template([USER], return_dict=False)
    assert len(ids) == 7 + 8  # the default costs every prompt seven tokens, not a hundred
    turns = [
        BRIEF,
        USER,
        {"role": "assistant", "content": "<think>\nhm\n</think>\n\n2"},
        {"role": "user", "content": "2+2"},
        {"role": "assistant", "content": "<think>\nso\n</think>\n\n4"},
    ]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n1+1<|im_end|>\n"
        "<|im_start|>assistant\n2<|im_end|>\n<|im_start|>user\n2+2<|im_end|>\n"
        "<|im_start|>assistant\n<think>\nso\n</think>\n\n4<|im_end|>\n"
    )


def test_chat_template_takes_tools_in_hermes_form(folder):
    """Signatures that can be read back from the system turn, calls and answers in their tags."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tools = [
        {"type": "function", "function": {"name": name, "parameters": {"type": "object"}}}
        for name in ("add", "look_up")
    ]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": "é<"}}}
    turns = [
        BRIEF,
        USER,
        {"role": "assistant", "content": "<think>\nadd\n</think>\n\n", "tool_calls": [call, call]},
        {"role": "tool", "content": "2"},
        {"role": "tool", "content": "3"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": "4"},
        {"role": "assistant", "content": "done"},
    ]
    text = tokenizer.apply_chat_template(turns, tools=tools, tokenize=False)
    system, rest = text.split("<|im_end|>\n", 1)
    assert system.startswith("<|im_start|>system\nBe brief.\n\n# Tools\n")
    listed = system.split("<tools>\n")[1].split("</tools>")[0].splitlines()
    assert [json.loads(line) for line in listed] == tools
    called = '<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": "é<"}}\n</tool_call>'
    assert rest == (
        "<|im_start|>user\n1+1<|im_end|>\n"
        f"<|im_start|>assistant\n{called}\n{called}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n2\n</tool_response>"
        "\n<tool_response>\n3\n</tool_response><|im_end|>\n"
        f"<|im_start|>assistant\n{called}<|im_end|>\n"
        "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\ndone<|im_end|>\n"
    )


def test_special_ids_come_from_the_folder(folder):
    from transformers import GenerationConfig

    tokenizer = AutoTokenizer.from_pretrained(folder)
    settings = GenerationConfig.from_pretrained(folder)
    names = tokenizer.convert_ids_to_tokens(settings.eos_token_id)
    assert names == ["<|im_end|>", "<|end_of_text|>"]
    assert tokenizer.decode(settings.eos_token_id, skip_special_tokens=True) == ""


def test_variants_build(tmp_path):
    config = TinyModelConfig(mamba_rms_norm=True, tie_embeddings=True, mamba_n_groups=2)
    build_tiny_model(config, tmp_path / "v", seed=0)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "v")
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()
