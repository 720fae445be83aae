"""Each multiplier acts where its name says, and comes back as it was."""

import runpy
from pathlib import Path

import pytest
import torch

from h1r_rl.config.schema import TinyModelConfig
from h1r_rl.hybrid.boundaries import install_boundaries
from h1r_rl.hybrid.load import load_policy, output_head
from h1r_rl.hybrid.multipliers import multiplier_values, sections, without
from h1r_rl.hybrid.packed_forward import hidden_states
from h1r_rl.hybrid.tiny import build_tiny_model

FORMATS = runpy.run_path(str(Path(__file__).parents[1] / "hybrid_formats.py"))
NAMES = (
    "embedding lm_head key attention_in attention_out ssm_in ssm_out mlp_gate mlp_down "
    "ssm_z ssm_x ssm_B ssm_C ssm_dt"
).split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("multipliers") / "tiny"
    small = TinyModelConfig(hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16,
                            intermediate_size=64, mamba_heads=4, mamba_head_dim=16,
                            mamba_d_state=16)  # fmt: skip
    build_tiny_model(small, folder, seed=0)
    return load_policy(folder)


def logits(model) -> torch.Tensor:
    weight, multiplier = output_head(model)
    with torch.no_grad():
        return hidden_states(model, torch.arange(40), torch.tensor([0, 40])) @ weight.T * multiplier


def test_every_one_is_named(model):
    assert list(multiplier_values(model.config)) == NAMES
    places, width = sections(model.config), model.model.layers[0].mamba.mup_vector.numel()
    assert places["z"].start == 0 and places["dt"].stop == width


@pytest.mark.parametrize("name", NAMES)
def test_taken_out_it_moves_the_logits_and_comes_back(model, name):
    before, values = logits(model), multiplier_values(model.config)
    with pytest.raises(ZeroDivisionError), without(model, name):
        assert (logits(model) - before).abs().max() > 1e-6
        raise ZeroDivisionError
    assert torch.equal(logits(model), before)
    assert multiplier_values(model.config) == values


@pytest.mark.parametrize("name", ["embedding", "attention", "residual", "logits"])
def test_granites_own(name):
    torch.manual_seed(0)
    model = FORMATS["MODELS"]["granite-1-tied"](50)
    FORMATS["randomise"](model)
    install_boundaries(model)
    before, values = logits(model), multiplier_values(model.config)
    assert values == {"embedding": 3.0, "attention": 0.2, "residual": 0.4, "logits": 4.0}
    with without(model, name):
        assert (logits(model) - before).abs().max() > 1e-4
        with torch.no_grad():  # by transformers' own forward too
            plain = model(torch.arange(40)[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits(model), plain, rtol=1e-4, atol=1e-4)
    assert torch.equal(logits(model), before) and multiplier_values(model.config) == values


def test_nemotron_has_none():
    from transformers import NemotronHConfig

    assert multiplier_values(NemotronHConfig()) == {}
