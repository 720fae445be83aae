"""A forward pass with the values that a bfloat16 engine holds; its parameters stay float32."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from h1r_rl.config.schema import TinyModelConfig
from h1r_rl.hybrid import boundaries
from h1r_rl.hybrid.computed_values import computed_values, disagreements, tensors_read
from h1r_rl.hybrid.engine_values import compute_as_engine, rounded
from h1r_rl.hybrid.load import load_policy, output_head
from h1r_rl.hybrid.packed_forward import hidden_states
from h1r_rl.hybrid.tiny import build_tiny_model

IDS = torch.arange(5, 45)
STARTS = torch.tensor([0, 17, 40])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, shake_model):
    path = tmp_path_factory.mktemp("values") / "tiny"
    small = TinyModelConfig(
        hidden_size=32, num_heads=2, num_kv_heads=1, head_dim=16, intermediate_size=64,
        mamba_heads=4, mamba_head_dim=16, mamba_d_state=16, mamba_rms_norm=True,
    )  # fmt: skip
    build_tiny_model(small, path, seed=0)
    shake_model(path, path, seed=1)
    return path


def run(model: Any) -> torch.Tensor:
    return hidden_states(model, IDS, STARTS)


def gradients(model: Any) -> dict[str, torch.Tensor]:
    model.zero_grad()
    output = run(model)
    (output * torch.linspace(-1, 1, output.numel()).view_as(output)).sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_what_is_computed_with_is_what_the_engine_holds(folder):
    plain, model = load_policy(folder), load_policy(folder)
    compute_as_engine(model, "bfloat16", autocast=False)
    before = computed_values(plain, lambda: run(plain))
    found = computed_values(model, lambda: run(model))
    assert before.keys() == found.keys() and len(found) == 2 * 7 + 2 * 2 + 1
    for name, values in before.items():
        expected = values if name.endswith(".A") else values.bfloat16().float()
        assert torch.equal(found[name], expected), name
    for (name, ours), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs), name  # the parameters themselves are untouched
    assert not any(set(m.__dict__) & set(m._parameters) for m in model.modules())


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("autocast", [False, True])
def test_all_is_read_and_the_state_computed_in_float32(folder, monkeypatch, dtype, autocast):
    """Also where values are rounded and products made in bfloat16."""
    model, inside = load_policy(folder), []
    compute_as_engine(model, dtype, autocast=autocast)
    scan = boundaries.chunked_scan

    def noted(*arguments):
        inside.extend(a.dtype for a in arguments if isinstance(a, torch.Tensor))
        return scan(*arguments)

    monkeypatch.setattr(boundaries, "chunked_scan", noted)

    def dtypes() -> dict[str, torch.dtype]:
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return {name: t.dtype for name, t in tensors_read(model, lambda: run(model)).items()}

    assert set(dtypes().values()) == {torch.float32} == set(inside) and len(inside) == 2 * 6
    mixer = model.model.layers[1].mamba
    mixer.A_log.data = mixer.A_log.data.bfloat16()  # as `bf16.enabled` of DeepSpeed would have it
    found = dtypes()
    assert [n for n, d in found.items() if d != torch.float32] == ["mixer.1.A_log"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_equals_a_model_whose_weights_were_rounded(folder, checkpointing):
    """Output and gradients: the rounding passes gradients on as they are."""
    model, reference = load_policy(folder).train(), load_policy(folder).train()
    compute_as_engine(model, "bfloat16", autocast=False)
    with torch.no_grad():
        for name, parameter in reference.named_parameters():
            if not name.endswith("A_log"):
                parameter.copy_(parameter.bfloat16())
        for name, buffer in reference.named_buffers():
            if "mup" in name:
                buffer.copy_(buffer.bfloat16())
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})  # pyright: ignore
    assert torch.equal(run(model), run(reference))
    assert not torch.equal(run(model), run(load_policy(folder)))
    expected = gradients(reference)
    found = gradients(model)
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], msg=lambda m, n=name: f"{n}: {m}")
    assert not any(set(m.__dict__) & set(m._parameters) for m in model.modules())


def test_autocast_leaves_the_products_to_autocast(folder):
    model, alone = load_policy(folder), load_policy(folder)
    compute_as_engine(model, "bfloat16", autocast=True)
    compute_as_engine(alone, "bfloat16", autocast=False)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(model), run(alone), rtol=0, atol=0)
    linears = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert linears and not any(m._forward_pre_hooks for m in linears)


def test_a_float32_engine_changes_nothing(folder):
    model = load_policy(folder)
    compute_as_engine(model, "float32", autocast=False)
    assert torch.equal(run(model), run(load_policy(folder)))
    weight = output_head(model)[0]
    assert rounded(weight, torch.float32) is weight


def test_disagreements_are_named(folder):
    model = load_policy(folder)
    values = computed_values(model, lambda: run(model))
    held = {name: ("float32", tensor.tolist()) for name, tensor in values.items()}
    assert set(disagreements(values, held).values()) == {0.0}
    held["mixer.0.dt_bias"] = ("bfloat16", values["mixer.0.dt_bias"].bfloat16().float().tolist())
    held["mixer.1.D"] = ("float32", [1.0])
    found = {n: d for n, d in disagreements(values, held).items() if d}
    assert found.keys() == {"mixer.0.dt_bias", "mixer.1.D"}
    assert 0 < found["mixer.0.dt_bias"] < 0.05 and found["mixer.1.D"] == float("inf")
