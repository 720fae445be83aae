"""Prefix caching of hybrids on vLLM's CPU build, which dies of it as it comes (0.32).

Invariant: on the CPU no Mamba layer promises to export a state from inside a prefill. vLLM's
scheduler then ends prefill steps at block boundaries instead, and the states cached there are final
ones, the only ones that the CPU's scan returns (`_mamba_chunk_scan_combined_fwd_cpu` ignores
`return_intermediate_states`, and the first cached prompt longer than a block ends the engine with
an IndexError). On GPUs nothing is touched.
"""

from __future__ import annotations


def split_prefills_at_blocks() -> None:
    """Called in each worker before its KV-cache layout is asked for; may be called again."""
    from vllm.model_executor.layers.mamba.abstract import MambaBase
    from vllm.model_executor.layers.mamba.mamba_mixer2 import MambaMixer2
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        MambaMixer2.get_kv_cache_spec = MambaBase.get_kv_cache_spec
