import json
import runpy
import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, GraniteMoeHybridConfig, NemotronHConfig

from h1r_rl.config.schema import TinyModelConfig
from h1r_rl.errors import ConfigError, DataError
from h1r_rl.hybrid.boundaries import honours_boundaries
from h1r_rl.hybrid.experts import GRANITE_EXPERTS, NEMOTRON_LAYERS, refuse_experts
from h1r_rl.hybrid.load import load_policy, output_head
from h1r_rl.hybrid.packed_forward import hidden_states
from h1r_rl.hybrid.tiny import build_tiny_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("load") / "tiny"
    build_tiny_model(TinyModelConfig(), folder, seed=0)
    return folder


def test_logits_are_those_of_the_folder(folder):
    model = load_policy(folder)
    assert honours_boundaries(model)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    ids = torch.randint(0, 200, (1, 30))
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")(ids).logits[0]
    weight, multiplier = output_head(model)
    hidden = hidden_states(model, ids[0], torch.tensor([0, 30]))
    torch.testing.assert_close(hidden @ weight.T * multiplier, expected, rtol=1e-4, atol=1e-5)


def test_multipliers_not_in_the_checkpoint_are_rebuilt(folder):
    config = load_policy(folder).config
    buffers = {n: b for n, b in load_policy(folder).named_buffers() if "mup" in n}
    assert len(buffers) == config.num_hidden_layers
    for buffer in buffers.values():
        assert buffer[0, 0, 0].item() == pytest.approx(config.ssm_multipliers[0])
        assert buffer[0, 0, -1].item() == pytest.approx(config.ssm_multipliers[4])


def test_generation_with_a_cache_is_untouched(folder):
    ids = torch.randint(5, 200, (2, 9))
    settings = dict(max_new_tokens=8, do_sample=False, eos_token_id=None)
    ours = load_policy(folder).eval().generate(ids, **settings)
    plain = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    assert torch.equal(ours, plain.generate(ids, **settings))


def test_bad_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="config.json"):
        load_policy(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(DataError, match="safetensors"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"model_type": "granitemoehybrid", "num_local_experts": 2}, "num_local_experts 2"),
        ({"model_type": "granitemoehybrid"}, "num_local_experts 8"),
        (
            {"model_type": "nemotron_h", "layers_block_type": ["linear_attention", "moe"]},
            "1 of 2 layers of type moe",
        ),
        ({"model_type": "nemotron_h", "hybrid_override_pattern": "MEM*E"}, "2 of 5 layers"),
        ({"model_type": "nemotron_h"}, "1 of 4 layers"),
    ],
)
def test_experts_are_refused_before_anything_is_read(tmp_path, settings, words):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ConfigError, match=f"{words}.* experts are not carried yet.* dense variant"):
        load_policy(tmp_path)


@pytest.mark.parametrize(
    "settings",
    [
        {"model_type": "granitemoehybrid", "num_local_experts": 0},
        {"model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-", "n_routed_experts": 8},
        {"model_type": "falcon_h1"},
    ],
)
def test_dense_variants_are_not_refused(tmp_path, settings):
    (tmp_path / "config.json").write_text(json.dumps(settings))
    refuse_experts(tmp_path)


def test_the_defaults_of_experts_are_transformers_own():
    assert GraniteMoeHybridConfig().num_local_experts == GRANITE_EXPERTS
    assert tuple(NemotronHConfig().layers_block_type) == NEMOTRON_LAYERS


def test_cuda_without_the_kernels_is_refused(folder):
    with pytest.raises(ConfigError, match="causal_conv1d_fn resolves to transformers"):
        load_policy(folder, device="cuda")


def test_step_sizes_are_bounded_no_more_than_in_the_engine(tmp_path, folder):
    formats = runpy.run_path(str(Path(__file__).parents[1] / "hybrid_formats.py"))
    formats["write_folder"]("nemotron-1", tmp_path)
    ids = torch.randint(5, 200, (1, 30))
    floored = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="float32").eval()
    free, policy = formats["transformers_model"](tmp_path), load_policy(tmp_path).eval()
    for model in (floored, free, policy):
        for name, parameter in model.named_parameters():
            if name.endswith("dt_bias"):
                parameter.data.fill_(-9.0)  # steps of 1e-4
    expected = free(ids, use_cache=False).logits
    assert (floored(ids, use_cache=False).logits - expected).abs().max() > 5e-4
    torch.testing.assert_close(policy(ids, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)


def test_bounds_that_no_engine_keeps_are_refused(tmp_path, folder):
    bounded = shutil.copytree(folder, tmp_path / "bounded")
    settings = json.loads((bounded / "config.json").read_text())
    (bounded / "config.json").write_text(json.dumps(settings | {"time_step_limit": [0.001, 0.1]}))
    with pytest.raises(ConfigError, match="time_step_limit"):
        load_policy(bounded)
