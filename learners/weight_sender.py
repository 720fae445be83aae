"""Rank 0's side of a weight transfer.

Invariant: bytes leave in the manifest's order, packed into its buckets, in the parameters' own
dtype, each with a checksum taken while they are on the wire. Beside the resident parameters one
bucket exists at a time, and under ZeRO-3 no gathered parameter: rank 0 receives shards straight
into the bucket. A bucket that is all of one whole parameter, or a part of one, leaves from the
parameter's own memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
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
    """Broadcast every parameter. `sharded` (ZeRO-3): all ranks bring their shards bucket by bucket
    in lockstep, and only rank 0 has a communicator.

    When a broadcast fails, rank 0 still takes what the other ranks bring, or they would wait for
    it for ever; then it raises.
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
    """(bucket, its bytes where there is somebody to send them to)."""
    parameters = dict(model.named_parameters())
    for bucket in manifest.buckets():
        if sharded:
            yield bucket, _from_shards(parameters, bucket, communicator)
        elif communicator is not None:
            parts = [_bytes(parameters[p.name].detach())[p.start : p.stop] for p in bucket]
            flat = parts[0] if len(parts) == 1 else torch.cat(parts)
            yield bucket, _on_device(flat, communicator)
            del flat


def _from_shards(
    parameters: dict[str, nn.Parameter], bucket: Sequence[Piece], communicator: Communicator | None
) -> Tensor | None:
    """The bucket on rank 0, from every rank that holds a part of it; all ranks call this alike.

    DeepSpeed's gather would make the parameter up to three times over: the collective's output, its
    concatenation and, on gloo, the collective's own buffer. Rank r's shard is `ds_tensor`: elements
    [r, r + 1) x ds_numel of the flat parameter, the last ones padded.
    """
    flat, offset = None, 0
    for piece in bucket:
        parameter: Any = parameters[piece.name]
        group, shard = parameter.ds_process_group, _bytes(parameter.ds_tensor.data)
        rank, size = dist.get_rank(group), shard.numel()
        if rank == 0 and flat is None:
            total = sum(piece.num_bytes for piece in bucket)
            flat = torch.empty(total, dtype=torch.uint8, device=shard.device)
        for owner in range(piece.start // size, -(-piece.stop // size)):
            start, stop = max(piece.start, owner * size), min(piece.stop, (owner + 1) * size)
            mine = shard[start - owner * size : stop - owner * size]
            place = slice(offset + start - piece.start, offset + stop - piece.start)
            if rank == owner == 0:
                flat[place] = mine
            elif rank == 0:
                dist.recv(flat[place], group=group, group_src=owner)
            elif rank == owner:
                dist.send(mine, group=group, group_dst=0)
        offset += piece.num_bytes
    return flat if flat is None or communicator is None else _on_device(flat, communicator)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


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
