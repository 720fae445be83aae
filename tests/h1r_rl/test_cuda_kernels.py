"""The CUDA path without CUDA: mamba-ssm's and causal-conv1d's functions stand in as stubs that have
the recorded signatures, refuse what the real ones refuse, and compute from `seq_idx` alone."""

import importlib
import inspect
import json
import re
import runpy
import sys
import types
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from h1r_rl.errors import ConfigError
from h1r_rl.hybrid.boundaries import honours_boundaries, install_boundaries
from h1r_rl.hybrid.cuda_kernels import KERNELS, kernel_problems, modeling_module, require_kernels
from h1r_rl.hybrid.load import load_policy
from h1r_rl.hybrid.packed_forward import hidden_states
from h1r_rl.hybrid.scan import chunked_scan

FORMATS = runpy.run_path(str(Path(__file__).parents[1] / "hybrid_formats.py"))
TABLE = json.loads(Path(__file__).with_name("kernel_signatures.json").read_text())
RECORDED = {
    name.rpartition(".")[2]: (name.rpartition(".")[0], entry)
    for package in TABLE.values()
    for name, entry in package["functions"].items()
}
LENGTHS = (3, 1, 17, 8)
SHAPE = (4, 1, 16, 8, 16, 16)  # eight Mamba heads: the convolution wants strides in eights


def sizes(lengths) -> torch.Tensor:
    return torch.tensor((0, *lengths)).cumsum(0)


def documents_of(seq_idx) -> tuple[int, ...]:
    return tuple(torch.unique_consecutive(seq_idx[0], return_counts=True)[1].tolist())


def check_shapes(name: str, given: dict) -> None:
    """Every tensor has a shape that the kernel's docstring allows, one size a name throughout."""
    known: dict[str, int] = {}
    expressions = []
    for argument, line in RECORDED[name][1]["shapes"].items():
        tensor = given.get(argument)
        if tensor is None:
            continue
        allowed = re.findall(r"\(([^)]*)\)", line.partition(" where")[0])
        found = [[d.strip() for d in shape.split(",") if d.strip()] for shape in allowed]
        [dims] = [d for d in found if len(d) == tensor.ndim]
        for dim, size in zip(dims, tensor.shape, strict=True):
            if dim.isidentifier():
                assert known.setdefault(dim, size) == size, f"{name}: {argument} {tensor.shape}"
            else:
                expressions.append((argument, dim, size))
    known.setdefault("ngroups", given.get("ngroups"))
    for argument, dim, size in expressions:
        inner = given["headdim"] * known["nheads"]
        rest = {"dim": inner, "dstate": (given["conv1d_weight"].shape[0] - inner) // 2}
        rest["dstate"] //= known["ngroups"]
        assert eval(dim, {}, rest | known) == size, f"{name}: {argument} is {size}, not {dim}"


def check_layout(x, weight, seq_idx) -> None:
    """causal_conv1d_fwd's own conditions, as recorded."""
    recorded = " ".join(TABLE["causal-conv1d"]["checks"])
    for condition in ("dim % 8 == 0", "x.stride(2) % 8", "kInt32", "seq_idx.is_contiguous()",
                      "seq_idx is only supported for channel last layout"):  # fmt: skip
        assert condition in recorded
    assert x.stride(1) == 1 and x.stride(2) > 1, "seq_idx wants the channel-last layout"
    assert x.shape[1] % 8 == 0 and x.stride(2) % 8 == 0 and x.stride(0) % 8 == 0
    assert seq_idx.dtype == torch.int32 and seq_idx.is_contiguous()
    assert seq_idx.shape == (x.shape[0], x.shape[2]) and 2 <= weight.shape[1] <= 4


def convolution(x, weight, bias, seq_idx, activation):
    check_layout(x, weight, seq_idx)
    parts = []
    for part in x.split(documents_of(seq_idx), dim=2):
        padded = functional.pad(part, (weight.shape[1] - 1, 0))
        parts.append(functional.conv1d(padded, weight[:, None], bias, groups=x.shape[1]))
    assert activation in ("silu", "swish")
    return functional.silu(torch.cat(parts, 2))


def scan(x, dt, A, B, C, D, dt_bias, seq_idx, dt_limit):
    dt = functional.softplus(dt + dt_bias).clamp(*dt_limit)
    rows = (t[0].contiguous() for t in (x, dt))
    x, dt = rows
    return chunked_scan(x, dt, A, B[0], C[0], D, documents_of(seq_idx))[None]


def split_conv_scan(a):
    """Both kernels in one, with gate, norm and output projection."""
    inner = a["headdim"] * len(a["A"])
    mixed = a["conv1d_weight"].shape[0]
    z, xbc, dt = a["zxbcdt"].split([inner, mixed, len(a["A"])], -1)
    xbc = convolution(
        xbc.transpose(1, 2), a["conv1d_weight"], a["conv1d_bias"], a["seq_idx"], a["activation"]
    ).transpose(1, 2)
    state = (mixed - inner) // 2
    x, B, C = xbc.split([inner, state, state], -1)
    grouped = (t.unflatten(-1, (a["ngroups"], -1)) for t in (B, C))
    x = x.unflatten(-1, (-1, a["headdim"]))
    y = scan(x, dt, a["A"], *grouped, a["D"], a["dt_bias"], a["seq_idx"], a["dt_limit"]).flatten(2)
    y = y * functional.silu(z)
    if a["rmsnorm_weight"] is not None:
        assert not a["norm_before_gate"]
        y = y.unflatten(-1, (a["ngroups"], -1))
        y = y * (y.square().mean(-1, keepdim=True) + a["rmsnorm_eps"]).rsqrt()
        y = y.flatten(2) * a["rmsnorm_weight"]
    return functional.linear(y, a["outproj_weight"], a["outproj_bias"])


def compute(name: str, a: dict):
    if name == "causal_conv1d_fn":
        assert not a["return_final_states"] and a["initial_states"] is None
        return convolution(a["x"], a["weight"], a["bias"], a["seq_idx"], a["activation"])
    if name == "mamba_chunk_scan_combined":
        assert a["dt_softplus"] and a["z"] is None and not a["return_final_states"]
        keys = ("x", "dt", "A", "B", "C", "D", "dt_bias", "seq_idx", "dt_limit")
        return scan(*(a[key] for key in keys))
    return split_conv_scan(a)


def stub(name: str, calls: list):
    """A function of the recorded name, place and signature; anything else is a TypeError."""
    module, entry = RECORDED[name]
    space: dict = {"inf": float("inf")}
    exec(f"def {name}{entry['signature']}: return _run(dict(locals()))", space)  # noqa: S102

    def run(given: dict):
        check_shapes(name, given)
        calls.append((name, given["seq_idx"]))
        return compute(name, given)

    space["_run"] = run
    space[name].__module__ = module
    return space[name]


@pytest.fixture
def on_cuda(monkeypatch):
    """Both packages importable, transformers' modules imported anew, every tensor on a "GPU"."""
    calls: list = []

    def install(family: str, without: str = "") -> list:
        conv, mamba = types.ModuleType("causal_conv1d"), types.ModuleType("mamba_ssm")
        conv.causal_conv1d_fn = stub("causal_conv1d_fn", calls)
        combined = types.SimpleNamespace(
            **{n: stub(n, calls) for n in RECORDED if n.startswith("mamba")}
        )
        mamba.ops = types.SimpleNamespace(triton=types.SimpleNamespace(ssd_combined=combined))
        for package in (conv, mamba):
            present = None if package.__name__ == without else package
            monkeypatch.setitem(sys.modules, package.__name__, present)
        name = f"transformers.models.{family}.modeling_{family}"
        parent = importlib.import_module(name.rpartition(".")[0])
        monkeypatch.setattr(parent, f"modeling_{family}", importlib.import_module(name))
        monkeypatch.delitem(sys.modules, name)
        importlib.import_module(name)
        return calls

    return install


def build(family: str, groups: int = 2):
    torch.manual_seed(0)
    if family.startswith("falcon"):
        shape = (*SHAPE, groups, family.endswith("rms"), False)
        model = FORMATS["falcon"](50, shape)
    else:
        # Granite's kernels norm by groups, its plain path does not: only one group agrees.
        variant = {"granite": (1, False), "nemotron": (groups,)}[family]
        model = FORMATS[family](50, *variant)
    FORMATS["randomise"](model)
    return model


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("family", ["falcon", "falcon-rms", "granite", "nemotron"])
def test_kernels_get_seq_idx_and_make_the_packed_result(on_cuda, monkeypatch, family, training):
    plain = build(family).train(training)
    install_boundaries(plain)
    ids, starts = torch.randint(1, 50, (sum(LENGTHS),)), sizes(LENGTHS)
    expected = hidden_states(plain, ids, starts)

    calls = on_cuda(plain.config.model_type)
    fresh = getattr(modeling_module(plain.config.model_type), type(plain).__name__)
    model = fresh(plain.config).train(training)
    model.load_state_dict(plain.state_dict())
    install_boundaries(model)
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    assert not kernel_problems(model.config.model_type) and honours_boundaries(model)
    found = hidden_states(model, ids, starts)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)

    names = {name for name, _ in calls}
    fused = {"mamba_split_conv1d_scan_combined"}
    assert names == (fused if training else set(RECORDED) - fused)
    documents = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    assert all(torch.equal(seq_idx[0], documents.int()) for _, seq_idx in calls)


@pytest.mark.parametrize("missing", ["mamba_ssm", "causal_conv1d"])
def test_a_missing_or_broken_package_is_refused(on_cuda, missing):
    on_cuda("falcon_h1", without=missing)
    problems = kernel_problems("falcon_h1")
    assert len(problems) == sum(package == missing for package in KERNELS.values())
    with pytest.raises(ConfigError, match=f"expected {missing}.*ModuleNotFoundError"):
        require_kernels("falcon_h1")


def test_kernels_without_seq_idx_are_refused(on_cuda, monkeypatch):
    entry = RECORDED["causal_conv1d_fn"][1]
    old = entry["signature"].replace("seq_idx=None, ", "")
    monkeypatch.setitem(entry, "signature", old)
    on_cuda("falcon_h1")
    with pytest.raises(ConfigError, match="takes no seq_idx"):
        require_kernels("falcon_h1")


def test_all_that_a_training_pass_may_call_is_checked():
    """Every kernel that transformers' mixers reach for, but for those of cached decoding."""
    for family in ("falcon_h1", "granitemoehybrid", "nemotron_h"):
        source = inspect.getsource(modeling_module(family))
        wrapped = re.findall(
            r'use_kernel_func_from_hub_with_fallback\("(\w+)".*\)\ndef (\w+)', source
        )
        assert {function for _, function in wrapped} - set(KERNELS) == {
            "causal_conv1d_update",
            "mamba2_selective_state_update",
        }


def test_the_recorded_versions_are_the_locked_ones():
    lock = Path(__file__).parents[2] / "requirements" / "cuda-kernels.txt"
    assert {f"{name}=={entry['version']}" for name, entry in TABLE.items()} <= set(
        lock.read_text().splitlines()
    )


def test_a_norm_that_the_kernels_compute_otherwise_is_refused(on_cuda, tmp_path):
    on_cuda("granitemoehybrid")
    config = {
        "model_type": "granitemoehybrid", "mamba_n_groups": 2, "num_local_experts": 0
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ConfigError, match="only 1 can be trained"):
        load_policy(tmp_path, device="cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", ["falcon", "falcon-rms", "granite", "nemotron"])
def test_the_real_kernels_keep_documents_apart(family, dtype):
    """And in bfloat16 torch's varlen attention: a row of documents against one by one."""
    model = build(family).cuda().to(dtype).train()
    install_boundaries(model)
    assert honours_boundaries(model), kernel_problems(model.config.model_type)
    ids, starts = torch.randint(1, 50, (sum(LENGTHS),)).cuda(), sizes(LENGTHS).cuda()
    found = hidden_states(model, ids, starts)
    alone = [
        hidden_states(model, ids[s:e], torch.tensor([0, e - s]).cuda())
        for s, e in pairwise(starts.tolist())
    ]
    limit = 1e-4 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(found, torch.cat(alone), rtol=limit, atol=limit)
