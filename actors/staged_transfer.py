"""One epoch of weight transfers as a receiving member lives it: join, receive, be read.

Invariant: everything that can wait for another process happens on this object's own thread, into
host memory. Its owner polls `outcome` and never blocks; an epoch that is given up takes its thread
with it, so a dead sender can neither stop the engine nor write into the next epoch.
"""

from __future__ import annotations

import time
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from h1r_rl.broadcast import Communicator
from h1r_rl.errors import WeightTransferError
from h1r_rl.weight_manifest import Checksums, ParameterSpec, Piece, TransferEpoch, WeightManifest

RUNNING, DONE = "running", "done"


class StagedTransfer:
    def __init__(self, epoch: TransferEpoch, rank: int, device: torch.device) -> None:
        """Begin to meet the epoch's members."""
        self._epoch = epoch
        self._rank = rank
        self._device = device
        self._communicator: Communicator | None = None
        self._end = 0.0  # of the transfer under way
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"weights-{epoch.number}")
        self._last: Future[dict[str, Tensor]] = self._thread.submit(self._join)

    def begin(self, manifest: WeightManifest) -> None:
        """Receive one transfer behind whatever was begun before."""
        self._last = self._thread.submit(self._receive, manifest)

    def outcome(self) -> str:
        """`running`, `done`, or what went wrong with the last thing begun."""
        if not self._last.done():
            return RUNNING
        error = self._last.exception()
        return DONE if error is None else f"{type(error).__name__}: {error}"

    def take(self) -> dict[str, Tensor]:
        """What the last transfer staged, by parameter name, once."""
        if self.outcome() != DONE:
            raise WeightTransferError(f"expected a complete transfer, found: {self.outcome()}")
        staged, self._last = self._last.result(), self._thread.submit(dict)
        if not staged:
            raise WeightTransferError("a commit was asked for, but nothing has been received")
        return staged

    def close(self) -> None:
        """Give the epoch up: returns at once, whatever its thread still waits for."""
        self._last.cancel()
        if self._communicator is not None:
            self._communicator.close()
        self._thread.submit(self._leave)  # behind a meeting that may still be under way
        self._thread.shutdown(wait=False)

    def _join(self) -> dict[str, Tensor]:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # per thread
        self._communicator = Communicator(self._epoch, self._rank)
        return {}

    def _leave(self) -> None:
        if self._communicator is not None:
            self._communicator.close()

    def _receive(self, manifest: WeightManifest) -> dict[str, Tensor]:
        if self._communicator is None:
            raise WeightTransferError("a transfer was begun in an epoch that was never joined")
        self._end = time.monotonic() + self._epoch.deadline_s
        staged: dict[str, Tensor] = {}
        sums = Checksums()
        with ThreadPoolExecutor(1, thread_name_prefix="weights-sums") as summing:
            for bucket in manifest.buckets():
                data = self._receive_bucket(bucket, staged)
                summed = summing.submit(sums.add, bucket, data.numpy())  # while the next one comes
            summed.result()
        sent = torch.empty(len(sums.values), dtype=torch.int64, device=self._device)
        self._broadcast(sent, "the checksums")
        self._compare(manifest, sent.cpu().numpy(), np.array(sums.values))
        for spec in manifest.parameters:
            staged[spec.name] = _shaped(staged[spec.name], spec)
        return staged

    def _receive_bucket(self, bucket: list[Piece], staged: dict[str, Tensor]) -> Tensor:
        """The bucket's bytes on the host, noted in `staged` as far as they end there. What is a
        part of one parameter is received in its place; a GPU holds one bucket beside its model."""
        first, size = bucket[0], sum(piece.num_bytes for piece in bucket)
        for piece in bucket:
            if piece.start == 0 and (not piece.ends or piece is first):
                staged[piece.name] = torch.empty(piece.spec.num_bytes, dtype=torch.uint8)
        in_place = len(bucket) == 1 and self._device.type == "cpu"
        flat = (
            staged[first.name][first.start : first.stop]
            if in_place
            else torch.empty(size, dtype=torch.uint8, device=self._device)
        )
        self._broadcast(flat, first.name)
        if in_place:
            return flat
        flat, offset = flat.cpu(), 0
        for piece in bucket:
            data = flat[offset : offset + piece.num_bytes]
            if piece.name in staged:
                staged[piece.name][piece.start : piece.stop] = data
            else:
                staged[piece.name] = data
            offset += piece.num_bytes
        return flat

    def _broadcast(self, into: Tensor, what: str) -> None:
        """From the learner, within what is left of the transfer's one deadline."""
        assert self._communicator is not None
        left_s = self._end - time.monotonic()
        if left_s <= 0:
            raise WeightTransferError(
                f"transfer unfinished after its deadline of {self._epoch.deadline_s:g} s; the next "
                f"parameter from the learner (rank 0) to rank {self._rank} was {what}"
            )
        try:
            self._communicator.broadcast(into, left_s)
        except RuntimeError as error:
            raise WeightTransferError(
                f"rank {self._rank} lost the learner (rank 0) at {what}: {error}"
            ) from error

    def _compare(
        self, manifest: WeightManifest, sent: NDArray[np.int64], received: NDArray[np.int64]
    ) -> None:
        wrong = np.flatnonzero(sent != received)
        if len(wrong):
            at = int(wrong[0])
            raise WeightTransferError(
                f"checksum of {manifest.parameters[at].name}: learner sent {sent[at]:016x}, "
                f"rank {self._rank} received {received[at]:016x}"
            )


def _shaped(data: Tensor, spec: ParameterSpec) -> Tensor:
    """The parameter in its dtype and shape. Behind parameters of a narrower dtype in a bucket its
    bytes may lie where its dtype may not begin: then they are copied."""
    dtype = getattr(torch, spec.dtype)
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(spec.shape)
