"""Who may touch the learner's tensors while engines come and go."""

from __future__ import annotations

import asyncio

import pytest

from cluster.weight_sync import WeightSync
from h1r_rl.weight_manifest import ParameterSpec, TransferEpoch, WeightManifest

MANIFEST = WeightManifest((ParameterSpec("w", (1,), "float32"),), 64)


class Learner:
    """Its tensors are a number; what is sent is what they are when the last byte leaves."""

    def __init__(self) -> None:
        self.tensors, self.sent, self.sends = 1, 0, 0

    async def open_epoch(self, size: int, offsets: dict[str, int]) -> TransferEpoch:
        return TransferEpoch(1, "gloo", "", 0, size, offsets, 5.0)

    async def join_epoch(self, epoch: TransferEpoch) -> None: ...

    async def send(self) -> dict[str, float]:
        self.sends += 1
        await asyncio.sleep(0.05)
        self.sent = self.tensors
        return {"transfer_s": 0.0, "bytes_per_s": 0.0}


class Pool:
    def __init__(self, learner: Learner) -> None:
        self.learner, self.labels = learner, {"a": "0"}
        self.held: dict[str, tuple[str, int]] = {}  # engine -> (label, tensors that it got)

    def on_change(self, listener) -> None:
        self.changed = listener

    def join(self, name: str) -> None:
        self.labels[name] = "0"
        self.changed()

    def members(self) -> dict[str, int]:
        return dict.fromkeys(self.labels, 1)

    def newest(self) -> str:
        return max(self.labels.values())

    def behind(self) -> list[str]:
        return [name for name, label in self.labels.items() if label != self.newest()]

    async def any_engine(self) -> None: ...

    async def join_epoch(self, epoch: TransferEpoch) -> None:
        self.members_of_epoch = list(epoch.rank_offsets)

    async def begin_receive(self, manifest: WeightManifest) -> None: ...

    async def commit(self, version: str) -> float:
        for name in self.members_of_epoch:
            self.labels[name] = version
            self.held[name] = (version, self.learner.sent)
        return 0.0

    def end_transfer(self) -> None: ...


async def nothing() -> None: ...


@pytest.fixture
async def world():
    learner = Learner()
    pool = Pool(learner)
    started = []

    def start(**settings) -> WeightSync:
        weights = WeightSync(learner, pool, MANIFEST, **settings)
        started.append(asyncio.create_task(weights.serve()))
        return weights

    yield learner, pool, start
    for task in started:
        task.cancel()


async def test_a_joiner_in_the_middle_of_a_transfer_gets_the_version_that_its_label_says(world):
    learner, pool, start = world
    weights = start()
    weights.publish(1, nothing)
    await asyncio.sleep(0.02)
    pool.join("b")  # a second send of version 1 begins the moment that the first one ends
    await weights.sent()
    learner.tensors = 2  # the optimizer step
    await asyncio.sleep(0.2)
    assert pool.held["a"] == ("1", 1)
    assert pool.held.get("b", ("1", 1)) == ("1", 1)
    weights.publish(2, nothing)
    await weights.sent()
    assert pool.held == {"a": ("2", 2), "b": ("2", 2)}


async def test_under_zero_3_nothing_is_sent_beside_a_forward_pass(world):
    learner, pool, start = world
    weights = start(overlap=False)
    weights.publish(1, nothing)
    await weights.before_forward()
    sends = learner.sends
    pool.join("b")
    await asyncio.sleep(0.1)
    assert learner.sends == sends  # its collectives would meet the forward pass's
    await weights.sent()
    weights.unchanged()  # a skipped step: the tensors are still version 1
    await asyncio.sleep(0.15)
    assert pool.held["b"] == ("1", 1)
