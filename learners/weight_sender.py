"""Rank 0's side of a weight transfer.

Invariant: bytes leave in the manifest's order, packed into its buckets, in the parameters' own
dtype, each with a checksum; at most one bucket beside the parameters exists at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

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
    parameters = dict(model.named_parameters())
    checksums: list[int] = []
    failure: Exception | None = None
    for bucket in manifest.buckets():
        flat = _pack(bucket, parameters, checksums, communicator, sharded)
        if communicator is not None and failure is None:
            try:
                if time.monotonic() - started > communicator.epoch.deadline_s:
                    raise TimeoutError("the transfer's deadline has passed")
                communicator.broadcast(flat)
            except (RuntimeError, TimeoutError) as error:
                failure = _lost(communicator, bucket[0].name, error)
        if failure is not None and not sharded:
            break
    if communicator is not None:
        if failure is not None:
            communicator.close()
            raise failure
        try:
            communicator.broadcast(_on_device(torch.tensor(checksums), communicator))
        except RuntimeError as error:
            raise _lost(communicator, "the checksums", error) from error
    seconds = time.monotonic() - started
    return {
        "transfer_s": seconds,
        "bytes": float(manifest.num_bytes),
        "bytes_per_s": manifest.num_bytes / max(seconds, 1e-9),
    }


def _pack(
    bucket: list[ParameterSpec],
    parameters: dict[str, nn.Parameter],
    checksums: list[int],
    communicator: Communicator | None,
    sharded: bool,
) -> Tensor | None:
    """The bucket's bytes as one tensor where there is somebody to send them to; takes part in the
    gathers everywhere."""
    flat = None
    if communicator is not None:
        num_bytes = sum(spec.num_bytes for spec in bucket)
        flat = _on_device(torch.empty(num_bytes, dtype=torch.uint8), communicator)
    offset = 0
    for spec in bucket:
        with whole(parameters[spec.name], sharded) as values:
            if flat is not None:
                data = values.contiguous().view(-1).view(torch.uint8)
                flat[offset : offset + spec.num_bytes] = data
                checksums.append(checksum(data.cpu().numpy()))
        offset += spec.num_bytes
    return flat


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
