"""The chunked scan against the recurrence it stands for, in float64."""

import pytest
import torch

from h1r_rl.hybrid import scan
from h1r_rl.hybrid.scan import chunked_scan


def recurrence(x, dt, A, B, C, D, lengths):
    per_group = x.shape[1] // B.shape[1]
    out, t = [], 0
    for length in lengths:
        state = torch.zeros(x.shape[1], x.shape[2], B.shape[2], dtype=x.dtype)
        for _ in range(length):
            b, c = (m[t].repeat_interleave(per_group, 0) for m in (B, C))
            state = (dt[t] * A).exp()[:, None, None] * state
            state = state + dt[t][:, None, None] * x[t][:, :, None] * b[:, None, :]
            out.append((state * c[:, None, :]).sum(-1) + D[:, None] * x[t])
            t += 1
    return torch.stack(out)


def inputs(tokens, heads=4, groups=2, head_dim=3, state=5):
    torch.manual_seed(tokens)
    shapes = [(tokens, heads, head_dim), (tokens, heads), (heads,), (tokens, groups, state),
              (tokens, groups, state), (heads,)]  # fmt: skip
    x, dt, A, B, C, D = (torch.randn(s, dtype=torch.float64) for s in shapes)
    return [t.requires_grad_() for t in (x, dt.exp() / 10, -A.exp(), B, C, D)]


@pytest.mark.parametrize("chunk", [1, 7, 64])
@pytest.mark.parametrize(
    "lengths", [(1,), (1, 1, 1), (6, 7, 8), (63, 64, 65), (40, 1, 13, 129, 2, 7)]
)
def test_equals_recurrence_values_and_gradients(monkeypatch, chunk, lengths):
    monkeypatch.setattr(scan, "CHUNK", chunk)
    tensors = inputs(sum(lengths))
    seed = torch.randn(sum(lengths), 4, 3, dtype=torch.float64)
    results = []
    for function in (chunked_scan, recurrence):
        y = function(*tensors, lengths)
        results.append((y, *torch.autograd.grad((y * seed).sum(), tensors)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-10, atol=1e-12)


def test_a_document_is_bit_equal_whatever_stands_before_it():
    tensors = [t.detach().float() for t in inputs(70)]
    before = chunked_scan(*tensors, (30, 40))[30:]
    for i in (0, 1, 3, 4):
        tensors[i][:30] *= 1000
    assert torch.equal(chunked_scan(*tensors, (30, 40))[30:], before)


def test_strong_decay_stays_finite():
    tensors = [t.detach().float() for t in inputs(200)]
    tensors[1] *= 1e4
    assert torch.isfinite(chunked_scan(*tensors, (200,))).all()
