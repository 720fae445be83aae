"""Rank 0's side of a weight transfer.

Invariant: bytes leave in the manifest's order, packed into its buckets, in the parameters' own
dtype, each with a checksum taken while they are on the wire. Beside the resident parameters only
the buckets in flight exist, and under ZeRO-3 no gathered parameter: rank 0 receives shards straight
into a bucket. A bucket that is all of one whole parameter, or a part of one, leaves from the
parameter's own memory. Weights with adapters leave merged, made one at a time.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from h1r_rl.broadcast import BrokenWire, Communicator, Wire
from h1r_rl.errors import WeightTransferError
from h1r_rl.host_memory import HostMemory
from h1r_rl.hybrid.lora import adapted_layers, checkpoint_parameters
from h1r_rl.weight_manifest import IN_FLIGHT, Checksums, ParameterSpec, Piece, WeightManifest


def manifest_of(model: nn.Module, bucket_bytes: int) -> WeightManifest:
    """Parameters in the model's order, under the names of its checkpoint; tied ones once, adapters
    not at all."""
    return WeightManifest(
        tuple(
            ParameterSpec(name, _full_shape(p), str(p.dtype).removeprefix("torch."))
            for name, p in checkpoint_parameters(model).items()
        ),
        bucket_bytes,
    )


def send_weights(
    model: nn.Module, manifest: WeightManifest, communicator: Communicator | None, *, sharded: bool
) -> dict[str, float]:
    """Broadcast every parameter. `sharded` (ZeRO-3): all ranks bring their shards bucket by bucket
    in lockstep, and only rank 0 has a communicator. `manifest`: what the engines were told to
    expect; nothing is sent by another one, which a collective would not survive, or not notice.

    When a broadcast fails, rank 0 still takes what the other ranks bring, or they would wait for
    it for ever; then it raises.
    """
    wrong = manifest_of(model, manifest.bucket_bytes).difference(manifest)
    if wrong:
        members = tuple(communicator.epoch.rank_offsets) if communicator is not None else ()
        raise WeightTransferError(
            "the learner (rank 0) holds other parameters than its manifest told "
            f"{', '.join(members) or 'the engines'}: {wrong}",
            members,
        )
    started = time.monotonic()
    if communicator is None:
        for _ in _buckets(model, manifest, None, sharded):
            pass  # brought to rank 0
    else:
        try:
            with Wire(communicator) as wire:
                _send_through(wire, model, manifest, communicator, sharded)
        except BrokenWire as error:
            raise _lost(communicator, error) from error
    seconds = time.monotonic() - started
    return {
        "transfer_s": seconds,
        "bytes": float(manifest.num_bytes),
        "bytes_per_s": manifest.num_bytes / max(seconds, 1e-9),
    }


def _send_through(
    wire: Wire,
    model: nn.Module,
    manifest: WeightManifest,
    communicator: Communicator,
    sharded: bool,
) -> None:
    sums = Checksums()
    broken: BrokenWire | None = None
    for bucket, flat in _buckets(model, manifest, communicator, sharded):
        if broken is None and flat is not None:
            try:
                wire.begin(flat, bucket[0].name)
                sums.add(bucket, flat.cpu().numpy())
                if wire.full:  # the next bucket takes the oldest one's memory
                    wire.finish()
            except BrokenWire as error:
                broken = error
                wire.abandon()
        if broken is not None and not sharded:
            break
    if broken is not None:
        raise broken
    while wire.under_way:
        wire.finish()
    wire.begin(_on_device(torch.tensor(sums.values), communicator), "the checksums")
    wire.finish()


def _buckets(
    model: nn.Module, manifest: WeightManifest, communicator: Communicator | None, sharded: bool
) -> Iterator[tuple[Sequence[Piece], Tensor | None]]:
    """(bucket, its bytes where there is somebody to send them to); good for IN_FLIGHT of them."""
    parameters, adapted = checkpoint_parameters(model), adapted_layers(model)
    sender = _is_first(parameters) if sharded else communicator is not None

    @lru_cache(maxsize=1)  # a weight of many buckets is merged once
    def values(name: str) -> Tensor:
        return adapted[name].merged() if name in adapted else parameters[name].detach()

    memory = None  # the same for all buckets: its pages are faulted in once
    buckets = manifest.buckets()
    for number, bucket in enumerate(buckets):
        flat = None
        if sender and (sharded or len(bucket) > 1):
            if memory is None:
                device = _stored(parameters[bucket[0].name], sharded).device
                room = min(IN_FLIGHT, len(buckets)) * manifest.bucket_bytes
                on_host = device.type == "cpu"
                memory = HostMemory().lend(room) if on_host else _new_bytes(room, device)
            # Where those of the last IN_FLIGHT buckets that are still on the wire do not lie.
            start = number % IN_FLIGHT * manifest.bucket_bytes
            flat = memory[start : start + sum(piece.num_bytes for piece in bucket)]
        if sharded:
            _fill_from_shards(parameters, bucket, flat)
        elif sender:
            parts = [_bytes(values(p.name))[p.start : p.stop] for p in bucket]
            flat = parts[0] if flat is None else torch.cat(parts, out=flat)
        if flat is not None and communicator is not None:
            flat = _on_device(flat, communicator)
        yield bucket, flat


def _fill_from_shards(
    parameters: dict[str, nn.Parameter], bucket: Sequence[Piece], flat: Tensor | None
) -> None:
    """The bucket on rank 0 (`flat`; None elsewhere), from every rank that holds a part of it; all
    ranks call this alike.

    DeepSpeed's gather would make the parameter up to three times over: the collective's output, its
    concatenation and, on gloo, the collective's own buffer. Rank r's shard is `ds_tensor`: elements
    [r, r + 1) x ds_numel of the flat parameter, the last ones padded.
    """
    offset = 0
    for piece in bucket:
        parameter: Any = parameters[piece.name]
        group, shard = parameter.ds_process_group, _bytes(_stored(parameter, True))
        rank, size = dist.get_rank(group), shard.numel()
        for owner in range(piece.start // size, -(-piece.stop // size)):
            start, stop = max(piece.start, owner * size), min(piece.stop, (owner + 1) * size)
            mine = shard[start - owner * size : stop - owner * size]
            if flat is None:
                if rank == owner:
                    dist.send(mine, group=group, group_dst=0)
                continue
            place = flat[offset + start - piece.start : offset + stop - piece.start]
            if rank == owner:
                place.copy_(mine)
            else:
                dist.recv(place, group=group, group_src=owner)
        offset += piece.num_bytes


def _new_bytes(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, device=device)


def _is_first(parameters: dict[str, nn.Parameter]) -> bool:
    parameter: Any = next(iter(parameters.values()))
    return dist.get_rank(parameter.ds_process_group) == 0


def _stored(parameter: Any, sharded: bool) -> Tensor:
    """What this rank holds of it."""
    return parameter.ds_tensor.data if sharded else parameter.detach()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


@contextmanager
def whole(parameter: nn.Parameter, sharded: bool) -> Iterator[Tensor]:
    """The full parameter; under ZeRO-3 (`sharded`) a collective of all ranks."""
    if not sharded:
        yield parameter.detach()
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield parameter.detach()


def _lost(communicator: Communicator, broken: BrokenWire) -> WeightTransferError:
    members = tuple(communicator.epoch.rank_offsets)
    return WeightTransferError(
        f"learner (rank 0) could not send {broken.what} to {', '.join(members) or 'nobody'} in "
        f"epoch {communicator.epoch.number}: {broken.cause}",
        members,
    )


def _full_shape(parameter: nn.Parameter) -> tuple[int, ...]:
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _on_device(tensor: Tensor, communicator: Communicator) -> Tensor:
    return tensor.cuda() if communicator.epoch.backend == "nccl" else tensor
