"""One sample as vLLM is asked for it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from h1r_rl.interfaces import Sampling
from h1r_rl.records import Prompt


def sampling_request(
    prompt: Prompt,
    sampling: Sampling,
    *,
    stop_ids: Sequence[int],
    seed: int | None,
    cache_salt: str | None,
) -> tuple[Any, Any]:
    """(TokensPrompt, SamplingParams). `cache_salt`: the version whose blocks alone may match the
    prompt's; None where nothing is cached."""
    from vllm import SamplingParams
    from vllm.inputs import TokensPrompt
    from vllm.sampling_params import RequestOutputKind

    inputs = TokensPrompt(prompt_token_ids=prompt.token_ids.tolist())
    if cache_salt is not None:
        inputs["cache_salt"] = cache_salt
    parameters = SamplingParams(
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        max_tokens=sampling.max_tokens,
        logprobs=0,  # the sampled token's own
        flat_logprobs=True,  # no dict and object a token in the process that serves them all
        detokenize=False,  # see answer_text
        stop_token_ids=list(stop_ids),
        output_kind=RequestOutputKind.FINAL_ONLY,
        seed=seed,
    )
    return inputs, parameters
