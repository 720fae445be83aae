"""One epoch of weight transfers as a receiving member lives it: join, receive, be read.

Invariant: everything that can wait for another process happens on this object's own thread, into
host memory. Its owner polls `outcome` and never blocks; an epoch that is given up takes its thread
with it, so a dead sender can neither stop the engine nor write into the next epoch.
"""

from __future__ import annotations

from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from h1r_rl.broadcast import BrokenWire, Communicator, Wire
from h1r_rl.errors import WeightTransferError
from h1r_rl.host_memory import HostMemory
from h1r_rl.weight_manifest import (
    Checksums,
    ParameterSpec,
    Piece,
    TransferEpoch,
    WeightManifest,
)

RUNNING, DONE = "running", "done"


class StagedTransfer:
    def __init__(self, epoch: TransferEpoch, rank: int, device: torch.device) -> None:
        """Begin to meet the epoch's members."""
        self._epoch = epoch
        self._rank = rank
        self._device = device
        self._communicator: Communicator | None = None
        self._memory = HostMemory()  # of a whole transfer: what one needs, the next one needs
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
        # Behind a meeting that may still be under way. A failure kept here would keep its frames,
        # and with them the memory of a whole transfer.
        self._last = self._thread.submit(self._leave)
        self._thread.shutdown(wait=False)

    def _join(self) -> dict[str, Tensor]:
        if self._device.type == "cuda":
            torch.cuda.set_device(self._device)  # per thread
        self._communicator = Communicator(self._epoch, self._rank)
        return {}

    def _leave(self) -> dict[str, Tensor]:
        if self._communicator is not None:
            self._communicator.close()
        return {}

    def _receive(self, manifest: WeightManifest) -> dict[str, Tensor]:
        if self._communicator is None:
            raise WeightTransferError("a transfer was begun in an epoch that was never joined")
        try:
            with Wire(self._communicator) as wire:
                return self._receive_through(wire, manifest)
        except BrokenWire as broken:
            raise WeightTransferError(
                f"rank {self._rank} lost the learner (rank 0) at {broken.what}: {broken.cause}"
            ) from broken

    def _receive_through(self, wire: Wire, manifest: WeightManifest) -> dict[str, Tensor]:
        sums, arrived = Checksums(), 0
        memory = self._memory.lend(manifest.num_bytes)  # parameters in their order
        coming: deque[tuple[list[Piece], Tensor, Tensor]] = deque()

        def finish_one() -> None:
            wire.finish()
            bucket, place, into = coming.popleft()
            if into is not place:
                place.copy_(into)
            sums.add(bucket, place.numpy())  # while the next ones come

        for bucket in manifest.buckets():
            place = memory[arrived : arrived + sum(piece.num_bytes for piece in bucket)]
            arrived += len(place)
            # A GPU holds a bucket beside its model first.
            into = (
                place
                if self._device.type == "cpu"
                else torch.empty_like(place, device=self._device)
            )
            wire.begin(into, bucket[0].name)
            coming.append((bucket, place, into))
            if wire.full:
                finish_one()
        while coming:
            finish_one()
        sent = torch.empty(len(sums.values), dtype=torch.int64, device=self._device)
        wire.begin(sent, "the checksums")
        wire.finish()
        self._compare(manifest, sent.cpu().numpy(), np.array(sums.values))
        ends = np.cumsum([spec.num_bytes for spec in manifest.parameters]).tolist()
        return {
            spec.name: _shaped(memory[end - spec.num_bytes : end], spec)
            for spec, end in zip(manifest.parameters, ends, strict=True)
        }

    def _compare(
        self, manifest: WeightManifest, sent: NDArray[np.int64], received: NDArray[np.int64]
    ) -> None:
        wrong = np.flatnonzero(sent != received)
        if len(wrong):
            at = int(wrong[0])
            more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
            raise WeightTransferError(
                f"checksum of {manifest.parameters[at].name}{more}: the learner (rank 0) sent "
                f"{sent[at]:016x}, rank {self._rank} received {received[at]:016x}"
            )


def _shaped(data: Tensor, spec: ParameterSpec) -> Tensor:
    """The parameter in its dtype and shape. Behind parameters of a narrower dtype its bytes may lie
    where its dtype may not begin: then they are copied."""
    dtype = getattr(torch, spec.dtype)
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(spec.shape)
