"""vLLM's general plugin: our weight receiver under its backend names, and no orphaned engine.

vLLM loads this in the driver, the engine core and each worker, so it is light (the receiver is
imported only when an engine is built with it) and may be called any number of times.
"""

from actors.owner_watch import die_with_owner

BACKENDS = {"gloo": "h1r_gloo", "nccl": "h1r_nccl"}


def register() -> None:
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    die_with_owner()
    for name in BACKENDS.values():
        if name not in WeightTransferEngineFactory._registry:
            WeightTransferEngineFactory.register_engine(
                name, "actors.weight_receiver", "WeightReceiver"
            )
