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
from h1r_rl.host_memory import HostMemory
from h1r_rl.weight_manifest import Checksums, ParameterSpec, TransferEpoch, WeightManifest

RUNNING, DONE = "running", "done"


class StagedTransfer:
    def __init__(self, epoch: TransferEpoch, rank: int, device: torch.device) -> None:
        """Begin to meet the epoch's members."""
        self._epoch = epoch
        self._rank = rank
        self._device = device
        self._communicator: Communicator | None = None
        self._memory = HostMemory()  # of a whole transfer: what one needs, the next one needs
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
        sums, arrived = Checksums(), 0
        memory = self._memory.lend(manifest.num_bytes)  # parameters in their order
        with ThreadPoolExecutor(1, thread_name_prefix="weights-sums") as summing:
            for bucket in manifest.buckets():
                place = memory[arrived : arrived + sum(piece.num_bytes for piece in bucket)]
                self._receive_into(place, bucket[0].name)
                summed = summing.submit(sums.add, bucket, place.numpy())  # while the next one comes
                arrived += len(place)
            summed.result()
        sent = torch.empty(len(sums.values), dtype=torch.int64, device=self._device)
        self._broadcast(sent, "the checksums")
        self._compare(manifest, sent.cpu().numpy(), np.array(sums.values))
        ends = np.cumsum([spec.num_bytes for spec in manifest.parameters]).tolist()
        return {
            spec.name: _shaped(memory[end - spec.num_bytes : end], spec)
            for spec, end in zip(manifest.parameters, ends, strict=True)
        }

    def _receive_into(self, place: Tensor, what: str) -> None:
        """A bucket, straight into its place on the host; a GPU holds it beside its model first."""
        if self._device.type == "cpu":
            self._broadcast(place, what)
            return
        bucket = torch.empty_like(place, device=self._device)
        self._broadcast(bucket, what)
        place.copy_(bucket)

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
    """The parameter in its dtype and shape. Behind parameters of a narrower dtype its bytes may lie
    where its dtype may not begin: then they are copied."""
    dtype = getattr(torch, spec.dtype)
    if data.storage_offset() % dtype.itemsize:
        data = data.clone()
    return data.view(dtype).view(spec.shape)
