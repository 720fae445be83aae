"""Rank 0's side of a weight transfer.

Invariant: bytes leave in the manifest's order, packed into its buckets, in the parameters' own
dtype, each with a checksum; beside the resident parameters at most one gathered parameter and one
bucket exist at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from h1r_rl.broadcast import Communicator
from h1r_rl.errors import WeightTransferError
from h1r_rl.weight_manifest import ParameterSpec, WeightManifest, checksum


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
    checksums: list[int] = []
    failure: Exception | None = None
    for first, flat in _packed_buckets(model, manifest, checksums, communicator, sharded):
        if communicator is not None and flat is not None and failure is None:
            failure = _try_send(communicator, flat, first, started)
        if failure is not None and not sharded:
            break
    if communicator is not None and failure is None:
        sums = _on_device(torch.tensor(checksums), communicator)
        failure = _try_send(communicator, sums, "the checksums", started)
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


def _packed_buckets(
    model: nn.Module,
    manifest: WeightManifest,
    checksums: list[int],
    communicator: Communicator | None,
    sharded: bool,
) -> Iterator[tuple[str, Tensor | None]]:
    """(name of the first parameter, the bucket's bytes where there is somebody to send them to);
    takes part in the gathers everywhere. A gathered parameter is let go once its bytes are packed;
    one larger than a bucket stays until its last piece is."""
    parameters = dict(model.named_parameters())
    with ExitStack() as held:
        data = nothing = torch.empty(0)
        for bucket in manifest.buckets():
            flat = None
            if communicator is not None:
                size = sum(piece.num_bytes for piece in bucket)
                flat = _on_device(torch.empty(size, dtype=torch.uint8), communicator)
            offset = 0
            for piece in bucket:
                if piece.start == 0:
                    gathered = whole(parameters[piece.name], sharded)
                    data = held.enter_context(gathered).contiguous().view(-1).view(torch.uint8)
                    if flat is not None:
                        checksums.append(checksum(data.cpu().numpy()))
                if flat is not None:
                    flat[offset : offset + piece.num_bytes] = data[piece.start : piece.stop]
                offset += piece.num_bytes
                if piece.ends:
                    data = nothing
                    held.close()
            yield bucket[0].name, flat


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
