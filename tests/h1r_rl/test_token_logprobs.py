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
