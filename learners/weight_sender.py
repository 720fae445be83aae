"""Rank 0's side of a weight transfer.

Invariant: bytes leave in the manifest's order, packed into its buckets, in the parameters' own
dtype, each with a checksum; beside the resident parameters at most one gathered parameter and one
bucket exist at a time. A bucket that is all of one parameter, or a part of one, leaves from the
parameter's own memory. Checksums are taken while their bytes are on the wire.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from h1r_rl.broadcast import Communicator
from h1r_rl.errors import WeightTransferError
from h1r_rl.weight_manifest import Checksums, ParameterSpec, Piece, WeightManifest


def manifest_of(model: nn.Module, bucket_bytes: int) -> WeightManifest:
    """Parameters in the model's order, under the names of its checkpoint; tied ones once."""
    return WeightManifest(
        tuple(
            ParameterSpec(name, _full_shape(p), str(p.dtype).removeprefix("torch."))
            for name, p in model.named_parameters()
        ),
        bucket_bytes,
    )


def send_weights(
    model: nn.Module, manifest: WeightManifest, communicator: Communicator | None, *, sharded: bool
) -> dict[str, float]:
    """Broadcast every parameter. `sharded` (ZeRO-3): all ranks gather one parameter at a time in
    lockstep, and only rank 0 has a communicator.

    When a broadcast fails, rank 0 still takes part in the remaining gathers, or the other ranks
    would wait for it for ever; then it raises.
    """
    started = time.monotonic()
    sums = Checksums()
    failure: Exception | None = None
    with ThreadPoolExecutor(1, thread_name_prefix="weights-wire") as wire:
        for bucket, flat in _buckets(model, manifest, communicator, sharded):
            if communicator is not None and flat is not None and failure is None:
                sending = wire.submit(_try_send, communicator, flat, bucket[0].name, started)
                sums.add(bucket, flat.cpu().numpy())
                failure = sending.result()
                del sending
            del flat  # before the next bucket takes its memory
            if failure is not None and not sharded:
                break
    if communicator is not None and failure is None:
        values = _on_device(torch.tensor(sums.values), communicator)
        failure = _try_send(communicator, values, "the checksums", started)
    if failure is not None:
        assert communicator is not None
        communicator.close()
        raise failure
    seconds = time.monotonic() - started
    return {
        "transfer_s": seconds,
        "bytes": float(manifest.num_bytes),
        "bytes_per_s": manifest.num_bytes / max(seconds, 1e-9),
    }


def _buckets(
    model: nn.Module, manifest: WeightManifest, communicator: Communicator | None, sharded: bool
) -> Iterator[tuple[Sequence[Piece], Tensor | None]]:
    """(bucket, its bytes where there is somebody to send them to); takes part in the gathers
    everywhere. A gathered parameter is let go once its bytes are packed or sent."""
    parameters = dict(model.named_parameters())
    with ExitStack() as held:
        data = nothing = torch.empty(0, dtype=torch.uint8)
        for bucket in manifest.buckets():
            alone = len(bucket) == 1
            flat = None
            if communicator is not None and not alone:
                size = sum(piece.num_bytes for piece in bucket)
                flat = _on_device(torch.empty(size, dtype=torch.uint8), communicator)
            offset = 0
            for piece in bucket:
                if piece.start == 0:
                    gathered = whole(parameters[piece.name], sharded)
                    data = held.enter_context(gathered).contiguous().view(-1).view(torch.uint8)
                part = data[piece.start : piece.stop]
                if communicator is not None and alone:
                    yield bucket, _on_device(part, communicator)
                elif flat is not None:
                    flat[offset : offset + piece.num_bytes] = part
                offset += piece.num_bytes
                if piece.ends:
                    data = part = nothing
                    held.close()
            if flat is not None or communicator is None:
                yield bucket, flat


def _try_send(
    communicator: Communicator, flat: Tensor, what: str, started: float
) -> WeightTransferError | None:
    """Broadcast within what is left of the transfer's one deadline, or say who was not reached."""
    left_s = communicator.epoch.deadline_s - (time.monotonic() - started)
    try:
        if left_s <= 0:
            raise TimeoutError("the transfer's deadline has passed")
        communicator.broadcast(flat, left_s)
    except (RuntimeError, TimeoutError) as error:
        return _lost(communicator, what, error)
    return None


@contextmanager
def whole(parameter: nn.Parameter, sharded: bool) -> Iterator[Tensor]:
    """The full parameter; under ZeRO-3 (`sharded`) a collective of all ranks."""
    if not sharded:
        yield parameter.detach()
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter.detach()


def _lost(communicator: Communicator, what: str, error: Exception) -> WeightTransferError:
    members = tuple(communicator.epoch.rank_offsets)
    return WeightTransferError(
        f"learner (rank 0) could not send {what} to {', '.join(members) or 'nobody'} in epoch "
        f"{communicator.epoch.number}: {error}",
        members,
    )


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _on_device(tensor: Tensor, communicator: Communicator) -> Tensor:
    return tensor.cuda() if communicator.epoch.backend == "nccl" else tensor
