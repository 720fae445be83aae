import itertools

import pytest
import torch

from h1r_rl.hybrid.token_logprobs import token_logprobs


def naive(hidden, targets, weight, scale):
    logprobs = (hidden @ weight.T * scale).log_softmax(-1)
    entropy = -(logprobs.exp() * logprobs).sum(-1)
    return logprobs.gather(1, targets[:, None])[:, 0], entropy.detach()


@pytest.mark.parametrize("chunk", [1, 4, 7, 100])
def test_equals_whole_logits(chunk):
    torch.manual_seed(0)
    hidden = torch.randn(13, 8, requires_grad=True)
    weight = torch.randn(29, 8, requires_grad=True)
    targets, seed = torch.randint(0, 29, (13,)), torch.randn(13)
    results = []
    for chunked in (True, False):
        if chunked:
            logprobs, entropy = token_logprobs(
                hidden, targets, weight, logit_multiplier=2.5, temperature=0.6, chunk_tokens=chunk
            )
            assert not entropy.requires_grad
        else:
            logprobs, entropy = naive(hidden, targets, weight, 2.5 / 0.6)
        grads = torch.autograd.grad((logprobs * seed).sum(), (hidden, weight))
        results.append((logprobs, entropy, *grads))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_nothing_to_predict_still_reaches_every_parameter():
    hidden, weight = torch.randn(0, 8, requires_grad=True), torch.randn(29, 8, requires_grad=True)
    logprobs, _ = token_logprobs(
        hidden, torch.zeros(0, dtype=torch.long), weight,
        logit_multiplier=1.0, temperature=1.0, chunk_tokens=4,
    )  # fmt: skip
    logprobs.sum().backward()
    assert weight.grad is not None and not weight.grad.any()


def case(tokens=13, width=8, words=29, dtype=torch.float64):
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    weight = torch.randn(words, width, dtype=dtype, requires_grad=True)
    return hidden, torch.randint(0, words, (tokens,)), weight


def chunked(hidden, targets, weight, chunk=4, **changes):
    settings = {"logit_multiplier": 2.5, "temperature": 0.6} | changes
    return token_logprobs(hidden, targets, weight, chunk_tokens=chunk, **settings)


@pytest.mark.parametrize("chunk", [1, 4, 50])
def test_values_and_gradients_in_float64(chunk):
    hidden, targets, weight = case(tokens=8, width=5, words=11)
    assert torch.autograd.gradcheck(
        lambda h, w: chunked(h, targets, w, chunk)[0], (hidden, weight), rtol=1e-4, atol=1e-7
    )
    seed = torch.randn(len(targets), dtype=torch.float64)
    results = []
    for logprobs, entropy in (
        chunked(hidden, targets, weight, chunk),
        naive(hidden, targets, weight, 2.5 / 0.6),
    ):
        gradients = torch.autograd.grad((logprobs * seed).sum(), (hidden, weight))
        results.append((logprobs, entropy, *gradients))
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_what_is_frozen_gets_no_gradient():
    hidden, targets, weight = case()
    full = torch.autograd.grad(chunked(hidden, targets, weight)[0].sum(), (hidden, weight))
    frozen = weight.detach()
    chunked(hidden, targets, frozen)[0].sum().backward()
    assert torch.equal(hidden.grad, full[0]) and frozen.grad is None
    chunked(hidden.detach(), targets, weight)[0].sum().backward()
    assert torch.equal(weight.grad, full[1])


def test_logits_far_apart_stay_finite():
    hidden, targets, weight = case(dtype=torch.float32)
    logprobs, entropy = chunked(hidden, targets, weight, temperature=1e-4)
    gradients = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert all(torch.isfinite(t).all() for t in (logprobs, entropy, *gradients))
    assert logprobs.max() <= 0 and entropy.min() >= 0


def test_autocast_multiplies_in_its_dtype_and_sums_in_float32():
    hidden, targets, weight = case(dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        logprobs, entropy = chunked(hidden, targets, weight)
    gradients = torch.autograd.grad(logprobs.sum(), (hidden, weight))
    assert {t.dtype for t in (logprobs, entropy, *gradients)} == {torch.float32}
    rounded = (t.detach().bfloat16().requires_grad_() for t in (hidden, weight))
    h, w = rounded
    logits = (h @ w.T).float() * (2.5 / 0.6)
    expected = logits.log_softmax(-1).gather(1, targets[:, None])[:, 0]
    torch.testing.assert_close(logprobs, expected, rtol=1e-5, atol=1e-5)
    for ours, theirs in zip(gradients, torch.autograd.grad(expected.sum(), (h, w)), strict=True):
        torch.testing.assert_close(ours, theirs.float(), rtol=3e-2, atol=1e-1)


def peak_bytes(function) -> int:
    """Most bytes of the CPU allocator that were in use at once, beside what was before."""
    with torch.profiler.profile(profile_memory=True) as profiler:
        function()
    assert profiler.profiler is not None
    events = profiler.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    return max(itertools.accumulate(size for _, size in changes))


@pytest.mark.parametrize("autocast", [False, True])
def test_two_chunks_of_logits_at_most(autocast):
    tokens, width, words, chunk = 640, 16, 4096, 32
    hidden, targets, weight = case(tokens, width, words, torch.float32)

    def loss_and_gradients():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            logprobs, _ = chunked(hidden, targets, weight, chunk)
        logprobs.sum().backward()

    buffers = 2 * chunk * words * 4
    known = (words + tokens) * width * 4 * (1.5 if autocast else 1)  # and copies in bfloat16
    peak = peak_bytes(loss_and_gradients)
    assert 0.95 * buffers < peak < 1.02 * (buffers + known)
