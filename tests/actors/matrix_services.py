"""An engine and a learner's rank 0 as processes of their own, without a model: the real receiver
and the real sender around plain tensors. Imported by the processes of the failure matrix."""

from __future__ import annotations

import asyncio
import os
import time
from typing import Any

import ray
import torch

from actors.staged_transfer import StagedTransfer
from h1r_rl.broadcast import Communicator, open_store
from h1r_rl.errors import WeightTransferError
from h1r_rl.weight_manifest import TransferEpoch, WeightManifest, checksum

LAYERS = 6


def model(version: int) -> torch.nn.Module:
    """Every version's parameters differ from every other's."""
    torch.manual_seed(version)
    return torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(LAYERS)))


def digest(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {
        n: checksum(t.detach().contiguous().view(torch.uint8).flatten().numpy())
        for n, t in tensors.items()
    }


@ray.remote(num_cpus=0, max_concurrency=100)
class PlainEngine:
    """The part of RolloutActor that a weight transfer talks to."""

    def __init__(self, name: str, *_: Any) -> None:
        self._name, self._version = name, "0"
        self._transfer: StagedTransfer | None = None
        self._held: dict[str, int] = {}

    async def start(self, *_: Any, **__: Any) -> None: ...

    async def facts(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "version": self._version, "held": self._held}

    async def version(self) -> str:
        return self._version

    async def join_epoch(self, epoch: TransferEpoch) -> None:
        if self._transfer is not None:
            self._transfer.close()
        rank = epoch.rank_offsets[self._name]
        self._deadline_s = epoch.deadline_s
        self._transfer = StagedTransfer(epoch, rank, torch.device("cpu"))
        await self.staged()

    async def begin_receive(self, manifest: WeightManifest) -> None:
        assert self._transfer is not None
        self._transfer.begin(manifest)

    async def staged(self) -> None:
        assert self._transfer is not None
        end = time.monotonic() + self._deadline_s + 1
        while (outcome := self._transfer.outcome()) == "running":  # noqa: ASYNC110
            if time.monotonic() > end:
                raise WeightTransferError(f"{self._name}: not complete in time", (self._name,))
            await asyncio.sleep(0.01)
        if outcome != "done":
            raise WeightTransferError(f"{self._name}, receiving weights: {outcome}", (self._name,))

    async def commit(self, version: str) -> float:
        assert self._transfer is not None
        self._held, self._version = digest(self._transfer.take()), version
        return 0.0

    async def close(self) -> None: ...


@ray.remote(num_cpus=0, concurrency_groups={"weights": 1, "control": 1})
class PlainLearner:
    """The part of LearnerActor that a weight transfer talks to; a bucket takes `bucket_s`."""

    def __init__(self, deadline_s: float, bucket_s: float) -> None:
        self._deadline_s, self._bucket_s, self._version = deadline_s, bucket_s, 0
        self._communicator: Any = None

    @ray.method(concurrency_group="control")
    def pid(self) -> int:
        return os.getpid()

    @ray.method(concurrency_group="weights")
    def update(self, version: int) -> dict[str, int]:
        self._version = version
        return digest(dict(model(version).named_parameters()))

    @ray.method(concurrency_group="weights")
    def weight_manifest(self) -> WeightManifest:
        from learners.weight_sender import manifest_of

        return manifest_of(model(0), bucket_bytes=10_000)  # a layer's matrix is 16 KiB

    @ray.method(concurrency_group="weights")
    def open_epoch(self, number: int, offsets: dict[str, int], size: int) -> TransferEpoch:
        if self._communicator is not None:
            self._communicator.close()
        self._store = open_store()
        return TransferEpoch(
            number, "gloo", "127.0.0.1", self._store.port, size, offsets, self._deadline_s
        )

    @ray.method(concurrency_group="weights")
    def join_epoch(self, epoch: TransferEpoch) -> None:
        self._communicator = Communicator(epoch, 0)
        whole, pause_s = self._communicator.broadcast, self._bucket_s

        def slow(tensor: torch.Tensor, within_s: float | None = None) -> None:
            time.sleep(pause_s)
            whole(tensor, within_s)

        self._communicator.broadcast = slow

    @ray.method(concurrency_group="weights")
    def send(self) -> dict[str, float]:
        from learners.weight_sender import send_weights

        policy = model(self._version)
        return send_weights(
            policy, self.weight_manifest_now(policy), self._communicator, sharded=False
        )

    def weight_manifest_now(self, policy: torch.nn.Module) -> WeightManifest:
        from learners.weight_sender import manifest_of

        return manifest_of(policy, bucket_bytes=10_000)

    @ray.method(concurrency_group="control")
    def close(self) -> None: ...
