"""A family's forward multipliers: where each acts, and a model without one of them.

Invariant: a name here is one scalar of the configuration; `without` takes that one out of the
forward pass and puts it back, whatever happens between. They are absent from checkpoints, so a side
that loses one still loads: only its numbers tell.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

SECTIONS = ("z", "x", "B", "C", "dt")  # of in_proj's output, in its order


def multiplier_values(config: Any) -> dict[str, float]:
    """Scalars by name; empty for a family that has none of its own. Example:
    {"embedding": 5.66, ..., "ssm_in": 2.5, "mlp_gate": 1.77, "ssm_z": 0.354, ...}."""
    if config.model_type == "granitemoehybrid":
        return {
            "embedding": float(config.embedding_multiplier),
            "attention": float(config.attention_multiplier),
            "residual": float(config.residual_multiplier),
            "logits": float(config.logits_scaling),
        }
    if config.model_type != "falcon_h1":
        return {}
    gate, down = config.mlp_multipliers
    named = {
        "embedding": config.embedding_multiplier,
        "lm_head": config.lm_head_multiplier,
        "key": config.key_multiplier,
        "attention_in": config.attention_in_multiplier,
        "attention_out": config.attention_out_multiplier,
        "ssm_in": config.ssm_in_multiplier,
        "ssm_out": config.ssm_out_multiplier,
        "mlp_gate": gate,
        "mlp_down": down,
    }
    named |= {
        f"ssm_{name}": value for name, value in zip(SECTIONS, config.ssm_multipliers, strict=True)
    }
    return {name: float(value) for name, value in named.items()}


@contextmanager
def without(model: Any, name: str) -> Iterator[None]:
    """The model with the multiplier taken out (1 in its place; 2 where it is 1 anyway)."""
    value = multiplier_values(model.config)[name]
    other = 1.0 if value != 1.0 else 2.0
    section = name.removeprefix("ssm_")
    if section in SECTIONS:
        vectors = [layer.mamba.mup_vector for layer in model.model.layers]
        kept = [vector.clone() for vector in vectors]
        for vector in vectors:
            vector[..., sections(model.config)[section]] = other
        try:
            yield
        finally:
            for vector, values in zip(vectors, kept, strict=True):
                vector.copy_(values)
        return
    places = list(_places(model, name))
    for owner, attribute in places:
        setattr(owner, attribute, other)
    try:
        yield
    finally:
        for owner, attribute in places:
            setattr(owner, attribute, value)


def sections(config: Any) -> dict[str, slice]:
    """Where each of SECTIONS lies in in_proj's output (and in the multiplier vector)."""
    inner = config.mamba_d_ssm or int(config.mamba_expand * config.hidden_size)
    state = config.mamba_n_groups * config.mamba_d_state
    widths = (inner, inner, state, state, config.mamba_n_heads)
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    return {s: slice(e - w, e) for s, w, e in zip(SECTIONS, widths, ends, strict=True)}


def _places(model: Any, name: str) -> Iterator[tuple[Any, str]]:
    decoder = model.model
    if model.config.model_type == "granitemoehybrid":
        yield from _granites_places(model, name)
        return
    if name == "embedding":
        yield decoder, "embedding_multiplier"
    elif name == "lm_head":
        yield decoder, "lm_head_multiplier"  # of transformers' forward
        yield model.config, "lm_head_multiplier"  # of our loss, which reads the configuration
    for layer in decoder.layers:
        yield from {
            "key": [(layer.self_attn, "key_multiplier")],
            "attention_in": [(layer, "attention_in_multiplier")],
            "attention_out": [(layer, "attn_out_multiplier")],
            "ssm_in": [(layer.mamba, "ssm_in_multiplier")],
            "ssm_out": [(layer, "ssm_out_multiplier")],
            "mlp_gate": [(layer.feed_forward, "gate_multiplier")],
            "mlp_down": [(layer.feed_forward, "down_multiplier")],
        }.get(name, [])


def _granites_places(model: Any, name: str) -> Iterator[tuple[Any, str]]:
    if name == "embedding":
        yield model.model, "embedding_multiplier"
    elif name == "logits":
        yield model.config, "logits_scaling"  # transformers' forward and our loss read it there
    for layer in model.model.layers:
        if name == "residual":
            yield layer, "residual_multiplier"
        elif name == "attention" and getattr(layer, "self_attn", None) is not None:
            yield layer.self_attn, "scaling"
