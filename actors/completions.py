"""vLLM's final output as our record, and the tokens that end an answer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from h1r_rl.records import Completion, VersionSpan


def to_completion(output: Any, index: int, engine: str, tokenizer: Any) -> Completion:
    """The ids as sampled, their logprobs, and whose weights sampled them. A label that is not ours
    (vLLM's first one is "default") is an error, and so is a token without a label."""
    ids = np.array(output.token_ids, dtype=np.int32)
    flat = output.logprobs  # vLLM's FlatLogprobs
    if flat.token_ids != output.token_ids:
        raise RuntimeError(f"{engine}: expected one logprob, its own, of each of {len(ids)} tokens")
    logprobs = np.array(flat.logprobs, dtype=np.float32)
    spans = tuple(VersionSpan(s.version, s.start, s.end) for s in output.weight_versions or ())
    edges = [0, *(span.end for span in spans)]
    contiguous = [span.start for span in spans] == edges[:-1] and edges[-1] == len(ids)
    if not contiguous or any(not span.version.isdigit() for span in spans):
        raise RuntimeError(
            f"{engine}: expected our version labels over {len(ids)} tokens, found {spans}"
        )
    text = answer_text(tokenizer, output.token_ids, output.finish_reason)
    return Completion(index, ids, logprobs, spans, output.finish_reason, text, engine)


def answer_text(tokenizer: Any, token_ids: Sequence[int], finish_reason: str) -> str:
    """Without special tokens and the end token. Once an answer: vLLM would do it once a token, for
    every request beside it, in the process that serves them all."""
    ids = list(token_ids)[:-1] if finish_reason == "stop" else list(token_ids)
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def stop_ids(model_folder: str, tokenizer: Any) -> list[int]:
    """End tokens named by the model folder: its generation settings' and its tokenizer's."""
    from transformers import GenerationConfig

    ids: set[int | None] = set()
    try:
        eos = GenerationConfig.from_pretrained(model_folder).eos_token_id
        ids |= set(eos if isinstance(eos, list) else [eos])
    except OSError:
        pass  # a folder without generation settings
    ids.add(tokenizer.eos_token_id)
    return sorted(i for i in ids if i is not None)
