"""Adapters against the sum they stand for: values, gradients, rounding, names."""

import copy
import runpy
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.func import functional_call

from h1r_rl.config.lora_targets import REFUSED, TARGETS, target_modules
from h1r_rl.config.schema import LoraConfig
from h1r_rl.errors import ConfigError
from h1r_rl.hybrid.boundaries import install_boundaries
from h1r_rl.hybrid.engine_values import compute_as_engine
from h1r_rl.hybrid.lora import (
    AdaptedLinear,
    adapted_layers,
    adapters_off,
    add_adapters,
    checkpoint_parameters,
)
from h1r_rl.hybrid.packed_forward import hidden_states

FORMATS = runpy.run_path(str(Path(__file__).parents[1] / "hybrid_formats.py"))
MODELS = ["1.5B", "34B", "granite-2-tied", "nemotron-2"]
LORA = LoraConfig(rank=3, alpha=6.0)
IDS = torch.randint(1, 50, (40,), generator=torch.Generator().manual_seed(0))
STARTS = torch.tensor([0, 1, 20, 40])


def pair(name, lora=LORA):
    """(a model with adapters that do something, the same model as it was)."""
    torch.manual_seed(0)
    base = FORMATS["MODELS"][name](50).train()
    FORMATS["randomise"](base)
    install_boundaries(base)
    model = copy.deepcopy(base)
    add_adapters(model, lora, seed=7)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.lora_B.copy_(0.1 * torch.randn(layer.lora_B.shape, generator=generator))
    return model, base


def merge(model, base):
    """`base` with the sums written out, by the formula alone."""
    merged, adapters = copy.deepcopy(base), dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in merged.named_parameters():
            path = name.removesuffix("weight")
            if f"{path}lora_A" in adapters:
                product = adapters[f"{path}lora_B"] @ adapters[f"{path}lora_A"]
                parameter.add_(LORA.alpha / LORA.rank * product)
    return merged


def forward(model):
    return hidden_states(model, IDS, STARTS)


@pytest.mark.parametrize("name", MODELS)
def test_computes_with_the_merged_weights(name):
    model, base = pair(name)
    merged = merge(model, base)
    found, expected = forward(model), forward(merged)
    assert (expected - forward(base)).abs().max() > 0.1
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)
    layers = adapted_layers(model)
    sent = {
        n: layers[n].merged() if n in layers else p for n, p in checkpoint_parameters(model).items()
    }
    shapes = {n: p.shape for n, p in base.named_parameters()}
    assert list(sent) == list(shapes) and {n: p.shape for n, p in sent.items()} == shapes
    for n, p in merged.named_parameters():
        torch.testing.assert_close(sent[n], p, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MODELS)
def test_without_effect_or_switched_off_it_is_the_base(name):
    model, base = pair(name)
    with adapters_off(model):
        assert torch.equal(forward(model), forward(base))
    for layer in adapted_layers(model).values():
        nn.init.zeros_(layer.lora_B)
    assert torch.equal(forward(model), forward(base))


@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_the_merged_formula(name, monkeypatch):
    """In float64 throughout, by autograd through W + alpha / rank x B A."""
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    monkeypatch.setattr(torch, "float32", torch.float64)
    model, base = (m.double() for m in pair(name))
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    assert all(n.endswith(("lora_A", "lora_B")) for n in trained)
    seed = torch.randn(40, 64, dtype=torch.float64)
    found = torch.autograd.grad((forward(model) * seed).sum(), list(trained.values()))
    sums = {}
    for n, weight in base.named_parameters():
        path = n.removesuffix("weight")
        if f"{path}lora_A" in trained:
            product = trained[f"{path}lora_B"] @ trained[f"{path}lora_A"]
            weight = weight.detach() + LORA.alpha / LORA.rank * product
        sums[f"inner.{n}"] = weight

    class Whole(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = base

        def forward(self):
            return forward(self.inner)

    expected = torch.autograd.grad(
        (functional_call(Whole(), sums, ()) * seed).sum(), list(trained.values())
    )
    for n, ours, theirs in zip(trained, found, expected, strict=True):
        assert theirs.abs().max() > 0, n
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", ["34B", "granite-2-tied"])
def test_beside_a_bfloat16_engine_the_sum_is_rounded_and_not_its_parts(name, autocast):
    model, base = pair(name)
    merged = merge(model, base)
    found = []
    for one in (model, merged):
        compute_as_engine(one, "bfloat16", autocast=autocast)
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, autocast):
            found.append(forward(one).float())
    coarse = (found[1] - forward(merge(*pair(name)))).abs().mean()
    assert (found[0] - found[1]).abs().mean() < 0.02 * coarse


def test_gradients_flow_under_autocast():
    model, _ = pair("34B")
    exact = torch.autograd.grad(
        forward(model).square().sum(), [p for p in model.parameters() if p.requires_grad]
    )
    with torch.autocast("cpu", torch.bfloat16):
        loss = forward(model).float().square().sum()
    coarse = torch.autograd.grad(loss, [p for p in model.parameters() if p.requires_grad])
    for ours, theirs in zip(coarse, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).norm() < 0.1 * theirs.norm()


def test_one_seed_makes_one_adapter():
    first, second = pair("34B")[0], pair("34B")[0]
    other = copy.deepcopy(pair("34B")[1])
    add_adapters(other, LORA, seed=8)
    for name, layer in adapted_layers(first).items():
        assert torch.equal(layer.lora_A, adapted_layers(second)[name].lora_A)
        assert not torch.equal(layer.lora_A, adapted_layers(other)[name].lora_A)


@pytest.mark.parametrize("name", MODELS)
def test_the_table_names_every_projection_but_those_that_are_read_directly(name):
    model = FORMATS["MODELS"][name](50)
    linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(TARGETS[model.config.model_type]) == linear - REFUSED.keys()
    adapted, _ = pair(name)
    left = {
        n.rpartition(".")[2]
        for n, m in adapted.named_modules()
        if isinstance(m, nn.Linear) and not isinstance(m, AdaptedLinear)
    }
    assert left == {"out_proj", "lm_head"}


def test_some_layers_alone():
    model, _ = pair("34B", LoraConfig(target_modules=("in_proj",)))
    assert {n.rpartition(".")[0].rpartition(".")[2] for n in adapted_layers(model)} == {"in_proj"}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_what_is_read_directly_is_refused_with_the_reason(name):
    with pytest.raises(ConfigError, match=f"{name} cannot.*reads its weight directly.*in_proj"):
        target_modules(LoraConfig(target_modules=("in_proj", name)), "falcon_h1")
    with pytest.raises(ConfigError, match="no projection 'q_prj'.*q_proj"):
        target_modules(LoraConfig(target_modules=("q_prj",)), "falcon_h1")
    with pytest.raises(ConfigError, match="found llama"):
        target_modules(LoraConfig(), "llama")
