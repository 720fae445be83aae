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
from torch import Tensor

from h1r_rl.broadcast import Communicator
from h1r_rl.errors import WeightTransferError
from h1r_rl.weight_manifest import Piece, TransferEpoch, WeightManifest, checksum

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
        sums: list[int] = []
        for bucket in manifest.buckets():
            flat = self._broadcast(sum(p.num_bytes for p in bucket), torch.uint8, bucket[0].name)
            offset = 0
            for piece in bucket:
                data = flat[offset : offset + piece.num_bytes]
                whole = _assemble(staged, piece, data)
                if whole is not None:
                    sums.append(checksum(whole.numpy()))
                    dtype = getattr(torch, piece.spec.dtype)
                    staged[piece.name] = whole.view(dtype).view(piece.spec.shape)
                offset += piece.num_bytes
        sent = self._broadcast(len(sums), torch.int64, "the checksums")
        wrong = np.flatnonzero(sent.numpy() != np.array(sums))
        if len(wrong):
            at = int(wrong[0])
            raise WeightTransferError(
                f"checksum of {manifest.parameters[at].name}: learner sent {int(sent[at]):08x}, "
                f"rank {self._rank} received {sums[at]:08x}"
            )
        return staged

    def _broadcast(self, size: int, dtype: torch.dtype, what: str) -> Tensor:
        """From the learner to the host; a GPU holds this one buffer beside its model."""
        assert self._communicator is not None
        left_s = self._end - time.monotonic()
        if left_s <= 0:
            raise WeightTransferError(
                f"transfer unfinished after its deadline of {self._epoch.deadline_s:g} s; the next "
                f"parameter from the learner (rank 0) to rank {self._rank} was {what}"
            )
        flat = torch.empty(size, dtype=dtype, device=self._device)
        try:
            self._communicator.broadcast(flat, left_s)
        except RuntimeError as error:
            raise WeightTransferError(
                f"rank {self._rank} lost the learner (rank 0) at {what}: {error}"
            ) from error
        return flat.cpu()


def _assemble(staged: dict[str, Tensor], piece: Piece, data: Tensor) -> Tensor | None:
    """The parameter's bytes once its last piece is there."""
    if piece.num_bytes == piece.spec.num_bytes:
        return data
    if piece.start == 0:
        staged[piece.name] = torch.empty(piece.spec.num_bytes, dtype=torch.uint8)
    whole = staged[piece.name]
    whole[piece.start : piece.stop] = data
    return whole if piece.ends else None
