"""Packed rows against transformers' own model, one document at a time."""

import inspect
import re
import runpy
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch.nn.attention import varlen

from h1r_rl.hybrid import boundaries
from h1r_rl.hybrid.boundaries import ATTENTION, Documents, honours_boundaries, install_boundaries
from h1r_rl.hybrid.load import output_head
from h1r_rl.hybrid.packed_forward import hidden_states
from h1r_rl.hybrid.scan import CHUNK
from h1r_rl.hybrid.varlen_attention import takes_varlen, varlen_attention

FORMATS = runpy.run_path(str(Path(__file__).parents[1] / "hybrid_formats.py"))
SHAPES, randomise = FORMATS["SHAPES"], FORMATS["randomise"]
LENGTHS = (1, 15, 16, 17, 2, 40, 1, 63, 65, 9)
MODELS = [*SHAPES, "granite-2-tied", "granite-1-untied", "nemotron-1", "nemotron-2"]
EXACT = 1e-10  # float64, of the largest value
ROUNDING = 1e-5  # float32, of the largest value
AROUND_CHUNKS = (1, 15, 16, 17, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 1)


def build(name):
    torch.manual_seed(0)
    return FORMATS["MODELS"][name](50)


def in_float64(model, patch):
    """`model` in float64 throughout: transformers' casts to float32 (norms, scan, rotations) become
    casts to float64 as long as `patch` holds."""
    patch.setattr(torch.Tensor, "float", torch.Tensor.double)
    patch.setattr(torch, "float32", torch.float64)
    return model.double()


@pytest.fixture(params=MODELS)
def model(request, monkeypatch):
    """In float64, so that packed and one by one differ by what they compute, not by rounding."""
    model = in_float64(build(request.param).train(), monkeypatch)
    randomise(model)
    install_boundaries(model)
    return model


@contextmanager
def originals(model):
    """The model as transformers made it."""
    module = boundaries._modeling_module(model)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "causal_conv1d_fn", module.h1r_originals[0])
        patch.setattr(module, "mamba2_chunk_scan", module.h1r_originals[1])
        model.set_attn_implementation("sdpa")
        yield
    model.set_attn_implementation(ATTENTION)


def row(seed=0, lengths=LENGTHS):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, 50, (sum(lengths),), generator=generator)
    return ids, torch.tensor((0, *lengths)).cumsum(0)


def packed_logits(model, ids, starts):
    weight, multiplier = output_head(model)
    return hidden_states(model, ids, starts) @ weight.T * multiplier


def gradients(model, loss):
    parameters = dict(model.get_decoder().named_parameters())
    return dict(zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True))


def loss_of(logits, ids, starts):
    """Weighted log-probabilities of every token that another one of its document precedes."""
    positions = torch.tensor([i for i in range(len(ids)) if i not in starts.tolist()])
    weights = torch.rand(len(positions), generator=torch.Generator().manual_seed(5))
    chosen = logits.log_softmax(-1)[positions - 1, ids[positions]]
    return -(chosen * weights.to(chosen.dtype)).sum()


def apart(found, expected):
    """Largest difference, of the largest value expected."""
    largest = expected.detach().abs().max().clamp(min=1e-3)
    return float((found.detach() - expected.detach()).abs().max() / largest)


def results(model, logits, ids, starts):
    """Logits, loss and every gradient, by name."""
    parameters = dict(model.named_parameters())
    loss = loss_of(logits, ids, starts)
    found = torch.autograd.grad(loss, list(parameters.values()))
    return {"logits": logits.detach(), "loss": loss.detach()} | dict(
        zip(parameters, found, strict=True)
    )


def packed(model, lengths, seed=0):
    ids, starts = row(seed, lengths)
    assert honours_boundaries(model)
    return results(model, packed_logits(model, ids, starts), ids, starts)


def one_by_one(model, lengths, seed=0):
    """The same row by transformers' own model, a document at a time."""
    ids, starts = row(seed, lengths)
    with originals(model):
        logits = [
            model(input_ids=ids[None, s:e], use_cache=False).logits.reshape(int(e - s), -1)
            for s, e in zip(starts[:-1], starts[1:], strict=True)
        ]
        return results(model, torch.cat(logits), ids, starts)


def distances(found, expected):
    assert found.keys() == expected.keys()
    return {name: apart(found[name].to(expected[name].dtype), expected[name]) for name in found}


def assert_exact(model, lengths, seed=0):
    found, expected = packed(model, lengths, seed), one_by_one(model, lengths, seed)
    assert {v.dtype for v in (*found.values(), *expected.values())} == {torch.float64}
    off = distances(found, expected)
    assert max(off.values()) <= EXACT, sorted(off.items(), key=lambda item: -item[1])[:3]


def test_loss_logits_and_gradients_equal_one_by_one(model):
    assert_exact(model, LENGTHS)


@pytest.mark.parametrize("model", ["34B", "granite-2-tied", "nemotron-2"], indirect=True)
@settings(
    max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(st.sampled_from(AROUND_CHUNKS) | st.integers(1, 40), min_size=1, max_size=9),
    seed=st.integers(0, 9),
)
@example(lengths=[1, 2], seed=0)
@example(lengths=[CHUNK + 1, 1, CHUNK, CHUNK - 1, 2 * CHUNK + 1], seed=0)
@example(lengths=[1, 3, 2, 2, 1, 5, 1, 4] * 5, seed=0)
def test_rows_of_any_lengths_equal_one_by_one(model, lengths, seed):
    """The same model serves all examples: nothing in it changes."""
    if max(lengths) == 1:
        lengths = [*lengths, 2]  # else there is no loss
    assert_exact(model, tuple(lengths), seed)


def kind(name: str) -> str:
    """Without the layer's number: what transformers is off by in one layer is a single draw."""
    return re.sub(r"layers\.\d+\.", "", name)


@pytest.mark.parametrize("name", ["34B", "1.5B", "granite-2-tied", "nemotron-2"])
def test_in_float32_they_are_equal_to_rounding(name):
    """Against float64, beside what transformers' own float32 is off by: also A_log's and dt_bias's
    gradients, sums over pairs of tokens that nearly cancel."""
    model = build(name).train()
    randomise(model)
    install_boundaries(model)
    found, plain = packed(model, LENGTHS), one_by_one(model, LENGTHS)
    assert {value.dtype for value in found.values()} == {torch.float32}
    with pytest.MonkeyPatch.context() as patch:
        expected = one_by_one(in_float64(model, patch), LENGTHS)
    off = distances(found, expected)
    own, kinds = distances(plain, expected), {name: kind(name) for name in found}
    worst = {k: max(own[n] for n in own if kinds[n] == k) for k in kinds.values()}
    allowed = {name: ROUNDING + 4 * worst[kinds[name]] for name in off}
    beyond = {name: (off[name], allowed[name]) for name in off if off[name] > allowed[name]}
    assert not beyond, beyond


def test_a_document_never_moves_another(model):
    ids, starts = row()
    b = slice(int(starts[5]), int(starts[6]))
    before = packed_logits(model, ids, starts)[b]
    expected = gradients(model, before.square().sum())
    changed = row(seed=9)[0]
    changed[b] = ids[b]
    after = packed_logits(model, changed, starts)[b]
    assert torch.equal(before, after)
    embedding = model.get_input_embeddings().weight
    touched = gradients(model, hidden_states(model, changed, starts)[b].square().sum())
    for name, gradient in gradients(model, after.square().sum()).items():
        if gradient.shape != embedding.shape:
            assert apart(gradient, expected[name]) <= EXACT, name
    name = next(n for n, p in model.get_decoder().named_parameters() if p is embedding)
    strangers = torch.ones(50, dtype=torch.bool)
    strangers[ids[b]] = False
    assert not touched[name][strangers].any()


OTHER_LENGTHS = (70, 1, 3, 16, 33, 40, 2, 90, 1)  # the sixth document alone is as long as before


def test_nor_does_one_of_another_length(model):
    """Before it and after it, and another number of them."""
    ids, starts = row()
    b = slice(int(starts[5]), int(starts[6]))
    others, places = row(seed=9, lengths=OTHER_LENGTHS)
    moved = slice(int(places[5]), int(places[6]))
    assert LENGTHS[5] == OTHER_LENGTHS[5] and b != moved
    others[moved] = ids[b]
    before, after = (
        packed_logits(model, ids, starts)[b],
        packed_logits(model, others, places)[moved],
    )
    assert apart(after, before) <= EXACT
    expected = gradients(model, before.square().sum())
    for name, gradient in gradients(model, after.square().sum()).items():
        assert apart(gradient, expected[name]) <= EXACT, name


def varlen_by_definition(calls):
    """In place of torch's kernel: what its arguments mean, from its own signature and docstring."""
    signature = inspect.signature(varlen.varlen_attn)

    def attend(*positional, **named):
        given = signature.bind(*positional, **named)
        given.apply_defaults()
        a = given.arguments
        calls.append(a)
        assert a["window_size"] == (-1, 0)  # "(-1, 0) for causal attention"
        assert a["cu_seq_q"] is a["cu_seq_k"] and a["cu_seq_q"].dtype == torch.int32
        q, k, v = a["query"], a["key"], a["value"]
        assert a["cu_seq_q"][0] == 0 and a["cu_seq_q"][-1] == len(q) == len(k) == len(v)
        assert type(a["max_q"]) is type(a["max_k"]) is int
        assert a["max_q"] == a["max_k"] == int(a["cu_seq_q"].diff().max())
        assert a["enable_gqa"] or q.shape[1] == k.shape[1]
        assert all(x.stride(-1) == 1 for x in (q, k, v))  # the kernel's own condition
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        scale = q.shape[-1] ** -0.5 if a["scale"] is None else a["scale"]
        rows = []
        for s, e in pairwise(a["cu_seq_q"].tolist()):
            scores = torch.einsum("qhd,khd->hqk", q[s:e], k[s:e]) * scale
            later = torch.ones(e - s, e - s, dtype=torch.bool).triu(1)
            weights = scores.masked_fill(later, -torch.inf).softmax(-1)
            rows.append(torch.einsum("hqk,khd->qhd", weights, v[s:e]))
        return torch.cat(rows)

    return attend


@pytest.mark.parametrize("model", ["34B", "0.5B", "granite-2-tied", "nemotron-2"], indirect=True)
def test_a_varlen_kernel_makes_the_packed_result(model, monkeypatch):
    calls = []
    monkeypatch.setattr(boundaries, "takes_varlen", lambda query: True)
    monkeypatch.setattr(varlen, "varlen_attn", varlen_by_definition(calls))
    assert_exact(model, LENGTHS)
    layers = [name for name, _ in model.named_modules() if name.endswith("q_proj")]
    assert len(calls) == len(layers) > 0


def test_torchs_kernel_takes_what_it_is_sent():
    """The operator's own checks of types and shapes, without its computation."""
    ids, starts = row()
    documents = Documents(LENGTHS, starts.to("meta"))
    query = torch.empty(len(ids), 8, 64, dtype=torch.bfloat16, device="meta")
    key = value = torch.empty(len(ids), 2, 64, dtype=torch.bfloat16, device="meta")
    found = varlen_attention(query, key, value, documents, 0.125)
    assert found.shape == query.shape and found.dtype == query.dtype


@pytest.mark.parametrize(
    ("head_dim", "dtype", "capability", "taken"),
    [
        (64, torch.bfloat16, (9, 0), True),
        (128, torch.float16, (8, 0), True),
        (64, torch.float32, (9, 0), False),
        (20, torch.bfloat16, (9, 0), False),
        (264, torch.bfloat16, (9, 0), False),
        (64, torch.bfloat16, (7, 5), False),
    ],
)
def test_the_kernel_is_chosen_by_what_it_can(monkeypatch, head_dim, dtype, capability, taken):
    query = torch.empty(3, 4, head_dim, dtype=dtype)
    assert not takes_varlen(query)  # not on a GPU
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert takes_varlen(query) is taken


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [8, 2])
def test_torchs_kernel_on_a_gpu_equals_padded_calls(monkeypatch, kv_heads):
    generator = torch.Generator("cuda").manual_seed(0)
    starts = torch.tensor((0, *LENGTHS), device="cuda").cumsum(0)
    heads = (8, kv_heads, kv_heads)

    def attend(padded: bool):
        generator.manual_seed(0)
        inputs = [
            torch.randn(1, h, sum(LENGTHS), 64, generator=generator, device="cuda")
            .bfloat16()
            .requires_grad_()
            for h in heads
        ]
        monkeypatch.setattr(
            boundaries, "takes_varlen", (lambda q: False) if padded else takes_varlen
        )
        documents = Documents(LENGTHS, starts)
        out, _ = boundaries.document_attention(None, *inputs, None, documents, scaling=0.125)
        weights = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)
        return out, *torch.autograd.grad((out * weights).sum(), inputs)

    for found, expected in zip(attend(False), attend(True), strict=True):
        torch.testing.assert_close(found.float(), expected.float(), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("name", ["causal_conv1d_fn", "mamba2_chunk_scan"])
def test_functions_put_back_honour_no_boundaries(name, monkeypatch):
    """As when the modeling module is loaded again."""
    model = build("0.5B")
    install_boundaries(model)
    assert honours_boundaries(model)
    module = boundaries._modeling_module(model)
    monkeypatch.setattr(module, name, lambda *args, **kwargs: None)
    assert not honours_boundaries(model)


def test_padded_rows_where_boundaries_are_not_honoured(model):
    ids, starts = row()
    expected = hidden_states(model, ids, starts)
    with originals(model):
        assert not honours_boundaries(model)
        assert apart(hidden_states(model, ids, starts), expected) <= EXACT


def test_transformers_fallback_would_have_leaked():
    """The reason for all this: if it ever stops leaking, our path may go."""
    model = build("0.5B")
    randomise(model)
    install_boundaries(model)
    ids, starts = row()
    inside = hidden_states(model, ids, starts)
    with originals(model):
        boundary_blind = model.get_decoder()(
            input_ids=ids[None],
            seq_idx=torch.bucketize(torch.arange(len(ids)), starts[1:], right=True)[None].int(),
            use_cache=False,
        ).last_hidden_state[0]
    assert (boundary_blind - inside).abs().max() > 1e-2
