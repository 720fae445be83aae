"""The communicator of one transfer epoch: open, broadcast, close, each under the epoch's deadline.

Invariant: it never touches torch's default process group (DeepSpeed owns that one in the learner,
vLLM in the engine), and gloo and NCCL differ in `_make_group` alone. Rank 0 is the learner.

Wire of one transfer: for each bucket of the manifest one broadcast of a flat uint8 tensor with the
parameters' bytes in order; then one broadcast of an int64 tensor with a CRC-32 per parameter.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from h1r_rl.weight_manifest import TransferEpoch

dist: Any = torch.distributed  # stores and groups are exported at run time only


def open_store() -> Any:
    """A rendezvous store on this host and a free port, for the epoch's members to meet in."""
    return dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)


class Communicator:
    """Blocking calls: run them on a thread of their own. An error leaves it unusable: close it."""

    def __init__(self, epoch: TransferEpoch, rank: int) -> None:
        """Meet the other members; raises when they do not come before the deadline."""
        self.epoch = epoch
        self.rank = rank
        self._timeout = timedelta(seconds=epoch.deadline_s)
        store = dist.TCPStore(epoch.address, epoch.port, is_master=False, timeout=self._timeout)
        self._store = dist.PrefixStore(f"epoch-{epoch.number}", store)
        self._group: Any = self._make_group()

    def _make_group(self) -> Any:
        size = self.epoch.world_size
        if self.epoch.backend == "gloo":
            return dist.ProcessGroupGloo(self._store, self.rank, size, self._timeout)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        return dist.ProcessGroupNCCL(self._store, self.rank, size, options)

    def broadcast(self, tensor: Tensor) -> None:
        """Broadcast from rank 0 in place; returns when this member's part is done."""
        options = dist.BroadcastOptions()
        options.rootRank = 0
        options.timeout = self._timeout
        self._group.broadcast([tensor], options).wait(self._timeout)
        if tensor.is_cuda:
            torch.cuda.current_stream(tensor.device).synchronize()

    def close(self) -> None:
        """Drop the group. A member stuck in a collective sees an error, not silence."""
        group, self._group = self._group, None
        if group is not None and hasattr(group, "abort"):
            group.abort()
