"""Each Falcon-H1 multiplier acts where its name says, and comes back as it was."""

import pytest
import torch

from h1r_rl.config.schema import TinyModelConfig
from h1r_rl.hybrid.load import load_policy, output_head
from h1r_rl.hybrid.multipliers import multiplier_values, sections, without
from h1r_rl.hybrid.packed_forward import hidden_states
from h1r_rl.hybrid.tiny import build_tiny_model

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


def test_other_families_have_none():
    from transformers import GraniteMoeHybridConfig

    assert multiplier_values(GraniteMoeHybridConfig()) == {}
