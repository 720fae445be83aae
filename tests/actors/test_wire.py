"""What no GPU is needed for of the NCCL side: all ranks issue the same collectives, the payloads
pass vLLM's own validation, every rank of every engine has a number of its own."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch

from actors.staged_transfer import DONE, StagedTransfer
from h1r_rl.broadcast import BrokenWire, Communicator, Wire, open_store
from h1r_rl.errors import WeightTransferError
from h1r_rl.weight_manifest import (
    IN_FLIGHT,
    ParameterSpec,
    TransferEpoch,
    WeightManifest,
    assign_ranks,
)

TENSORS = {
    "a.weight": torch.randn(7, 5),
    "a.D": torch.randn(3).bfloat16(),
    "b.weight": torch.randn(40, 4),  # larger than a bucket
    "b.bias": torch.randn(1),
}
MANIFEST = WeightManifest(
    tuple(
        ParameterSpec(n, tuple(t.shape), str(t.dtype).removeprefix("torch."))
        for n, t in TENSORS.items()
    ),
    bucket_bytes=200,
)


def test_ranks_over_engines_of_unequal_size_are_unique_and_contiguous():
    offsets, world_size = assign_ranks({"a": 1, "b": 2, "c": 1})
    assert offsets == {"a": 1, "b": 2, "c": 4} and world_size == 5
    sizes = {"a": 1, "b": 2, "c": 1}
    ranks = [offsets[n] + r for n, size in sizes.items() for r in range(size)]
    assert [0, *ranks] == list(range(world_size))
    assert assign_ranks({}) == ({}, 1)


class Recorder:
    """Stands in for a communicator: keeps what was issued, delivers over memory."""

    wires: dict[int, list[tuple[str, int]]]

    def __init__(self, epoch: TransferEpoch, rank: int) -> None:
        self.epoch, self.rank = epoch, rank
        self.issued = self.wires.setdefault(rank, [])

    def begin(self, tensor: torch.Tensor, within_s: float) -> Callable[[], None]:
        self.issued.append((str(tensor.dtype), tensor.numel()))
        if self.rank == 0:

            def leave() -> None:  # as late as it may: the memory must still hold it then
                self.sent.append(tensor.clone())
                self.arrived.release(self.epoch.world_size - 1)

            return leave
        position = len(self.issued) - 1

        def finish() -> None:
            assert self.arrived.acquire(timeout=10)
            tensor.copy_(self.sent[position])

        return finish

    def close(self) -> None: ...


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        for name, value in TENSORS.items():
            self.register_parameter(name.replace(".", "_"), torch.nn.Parameter(value))
        for number in range(24):  # three a bucket: more buckets than are in flight
            small = torch.nn.Parameter(torch.full((15,), float(number)))
            self.register_parameter(f"small_{number}", small)


def test_all_ranks_issue_the_same_collectives_in_order_and_size(monkeypatch):
    """The learner's sender against receivers of three engines of 1, 2 and 1 ranks, on backend nccl:
    what differs between the backends is how the group is made, and nothing of this."""
    from learners.weight_sender import manifest_of, send_weights

    sizes = {"a": 1, "b": 2, "c": 1}
    offsets, world_size = assign_ranks(sizes)
    epoch = TransferEpoch(1, "nccl", "", 0, world_size, offsets, 10.0)
    Recorder.wires, Recorder.sent, Recorder.arrived = {}, [], threading.Semaphore(0)
    monkeypatch.setattr("actors.staged_transfer.Communicator", Recorder)
    monkeypatch.setattr("learners.weight_sender._on_device", lambda tensor, _: tensor)
    model = Model()
    manifest = manifest_of(model, 200)
    members = [
        StagedTransfer(epoch, offsets[name] + rank, torch.device("cpu"))
        for name, size in sizes.items()
        for rank in range(size)
    ]
    send_weights(model, manifest, Recorder(epoch, 0), sharded=False)
    for member in members:
        member.begin(manifest)
        member._last.result(10)
        assert member.outcome() == DONE
        staged = member.take()
        assert all(torch.equal(staged[n], p) for n, p in model.named_parameters())
    assert sorted(Recorder.wires) == list(range(world_size))
    first = Recorder.wires[0]
    assert all(issued == first for issued in Recorder.wires.values())
    buckets = [("torch.uint8", sum(p.num_bytes for p in b)) for b in manifest.buckets()]
    assert first == [*buckets, ("torch.int64", len(manifest.parameters))]


class Slow:
    """A communicator whose broadcasts end when asked for; the third one breaks."""

    epoch = TransferEpoch(1, "gloo", "", 0, 2, {}, 10.0)

    def __init__(self) -> None:
        self.log: list[str] = []

    def begin(self, tensor: torch.Tensor, within_s: float) -> Callable[[], None]:
        number = int(tensor)
        self.log.append(f"begin {number}")

        def finish() -> None:
            self.log.append(f"finish {number}")
            if number >= 2:
                raise RuntimeError("reset by peer")

        return finish


def test_a_wire_holds_so_many_at_once_and_ends_them_all_when_one_breaks():
    slow = Slow()
    wire = Wire(slow)
    for number in range(IN_FLIGHT):
        assert not wire.full
        wire.begin(torch.tensor(number), f"p{number}")
    assert wire.full and slow.log == [f"begin {n}" for n in range(IN_FLIGHT)]
    wire.finish()
    wire.finish()
    with pytest.raises(BrokenWire, match="p2: reset by peer") as caught:
        wire.finish()
    assert caught.value.what == "p2"
    wire.abandon()
    assert not wire.under_way
    assert slow.log[IN_FLIGHT:] == [f"finish {n}" for n in range(IN_FLIGHT)]
    wire._end = 0.0
    with pytest.raises(BrokenWire, match="deadline has passed"):
        wire.begin(torch.tensor(9), "p9")


def other_manifests() -> dict[str, WeightManifest]:
    """`MANIFEST` with a mistake in it, by what the error is to say of it."""
    first, *rest = MANIFEST.parameters
    wider = dataclasses.replace(rest[1], shape=(40, 5))
    parameters = {
        "a.weight (7, 5) float32 against x.weight (7, 5) float32": (
            dataclasses.replace(first, name="x.weight"), *rest
        ),
        "b.weight (40, 4) float32 against b.weight (40, 5) float32": (
            first, rest[0], wider, rest[2]
        ),
        "a.weight (7, 5) float32 against a.weight (7, 5) bfloat16": (
            dataclasses.replace(first, dtype="bfloat16"), *rest
        ),
        "parameter 0: a.weight (7, 5) float32 against a.D (3,) bfloat16": (
            rest[0], first, *rest[1:]
        ),
        "b.bias (1,) float32 against none": MANIFEST.parameters[:-1],
        "parameter 4: none against c.bias (1,) float32": (
            *MANIFEST.parameters, dataclasses.replace(rest[2], name="c.bias")
        ),
    }  # fmt: skip
    return {told: WeightManifest(p, MANIFEST.bucket_bytes) for told, p in parameters.items()}


@pytest.mark.parametrize("told", other_manifests())
def test_nothing_is_sent_by_a_manifest_that_is_not_the_models(told):
    """Gloo ends the process at the first size that differs, and a name would not be noticed."""
    from learners.weight_sender import send_weights

    class Named(torch.nn.Module):
        def named_parameters(self, *_, **__):
            return iter((name, torch.nn.Parameter(value)) for name, value in TENSORS.items())

    epoch = TransferEpoch(1, "gloo", "", 0, 3, {"rollout-0": 1, "rollout-1": 2}, 10.0)
    Recorder.wires, Recorder.sent, Recorder.arrived = {}, [], threading.Semaphore(0)
    with pytest.raises(WeightTransferError) as caught:
        send_weights(Named(), other_manifests()[told], Recorder(epoch, 0), sharded=False)
    assert "the learner (rank 0)" in str(caught.value) and told in str(caught.value)
    assert "rollout-0, rollout-1" in str(caught.value)
    assert Recorder.wires == {0: []}
    send_weights(Named(), MANIFEST, Recorder(epoch, 0), sharded=False)
    assert Recorder.wires[0]


def test_our_payloads_pass_vllms_own_validation():
    """The receiver is our subclass of vLLM's engine: its dictionaries are parsed by vLLM's
    `parse_init_info` and `parse_update_info` into our dataclasses, which derive from vLLM's."""
    from vllm.distributed.weight_transfer.base import (
        WeightTransferInitInfo,
        WeightTransferInitRequest,
        WeightTransferUpdateInfo,
        WeightTransferUpdateRequest,
    )

    from actors.weight_receiver import CommitInfo, ReceiverCommand, WeightReceiver

    assert issubclass(ReceiverCommand, WeightTransferInitInfo)
    assert issubclass(CommitInfo, WeightTransferUpdateInfo)
    receiver = WeightReceiver.__new__(WeightReceiver)
    epoch = TransferEpoch(3, "nccl", "10.0.0.1", 29500, 5, {"a": 1, "b": 2, "c": 4}, 60.0)
    for name, first in epoch.rank_offsets.items():
        join = {"action": "join", "epoch": dataclasses.asdict(epoch), "rank_offset": first}
        parsed = receiver.parse_init_info(WeightTransferInitRequest(join).init_info)
        assert parsed.rank_offset == first and TransferEpoch(**parsed.epoch) == epoch, name
    receive = {
        "action": "receive",
        "parameters": [(p.name, list(p.shape), p.dtype) for p in MANIFEST.parameters],
        "bucket_bytes": MANIFEST.bucket_bytes,
    }
    parsed = receiver.parse_init_info(WeightTransferInitRequest(receive).init_info)
    assert [tuple(p) for p in parsed.parameters] == [
        (p.name, list(p.shape), p.dtype) for p in MANIFEST.parameters
    ]
    assert receiver.parse_update_info(WeightTransferUpdateRequest({}).update_info) == CommitInfo()
    with pytest.raises(ValueError):
        receiver.parse_init_info({"action": "join", "rank_ofset": 1})


def test_the_same_names_shapes_and_ranks_pass_vllms_nccl_dataclasses():
    """Stock NCCL receivers could be driven by what we know: explicit rank offsets an engine."""
    from vllm.distributed.weight_transfer.nccl_engine import (
        NCCLWeightTransferEngine,
        NCCLWeightTransferInitInfo,
        NCCLWeightTransferUpdateInfo,
    )

    stock = NCCLWeightTransferEngine.__new__(NCCLWeightTransferEngine)
    offsets, world_size = assign_ranks({"a": 1, "b": 2, "c": 1})
    for first in offsets.values():
        info = stock.parse_init_info(
            {
                "master_address": "10.0.0.1",
                "master_port": 29500,
                "rank_offset": first,
                "world_size": world_size,
            }
        )
        assert isinstance(info, NCCLWeightTransferInitInfo) and info.rank_offset == first
    update = {
        "names": [p.name for p in MANIFEST.parameters],
        "dtype_names": [p.dtype for p in MANIFEST.parameters],
        "shapes": [list(p.shape) for p in MANIFEST.parameters],
    }
    assert isinstance(stock.parse_update_info(update), NCCLWeightTransferUpdateInfo)
    with pytest.raises(ValueError, match="same size"):
        stock.parse_update_info(update | {"shapes": []})


def meet(deadline_s: float) -> dict[int, Communicator]:
    """The two members of an epoch on gloo, by rank."""
    store = open_store()
    epoch = TransferEpoch(1, "gloo", "127.0.0.1", store.port, 2, {}, deadline_s)
    made: dict[int, Communicator] = {}

    def come(rank: int) -> None:
        made[rank] = Communicator(epoch, rank)

    threads = [threading.Thread(target=come, args=(rank,)) for rank in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    return made


def test_a_peer_that_falls_silent_late_costs_one_deadline_and_nobody_waits_at_the_close():
    """No broadcast in flight may wait for a thread: its own time would begin then."""
    deadline_s = 3.0
    made = meet(deadline_s)

    def two_and_silence() -> None:
        time.sleep(0.7 * deadline_s)
        for _ in range(2):
            made[0].broadcast(torch.zeros(8))

    peer = threading.Thread(target=two_and_silence)
    peer.start()
    started = time.monotonic()
    wire = Wire(made[1])
    for number in range(IN_FLIGHT):
        wire.begin(torch.zeros(8), f"p{number}")
    wire.finish()
    wire.finish()
    with pytest.raises(BrokenWire, match="p2"):
        wire.finish()
    wire.abandon()
    ended = time.monotonic()
    made[1].close()
    assert ended - started < deadline_s + 1.5
    assert time.monotonic() - ended < 0.5
    peer.join(10)
    made[0].close()


def test_closing_a_communicator_does_not_wait_for_a_pending_collective():
    made = meet(5.0)
    receiver = made[1]
    outcome = SimpleNamespace(error=None)

    def wait() -> None:
        try:
            receiver.broadcast(torch.zeros(8))
        except RuntimeError as error:
            outcome.error = error

    waiting = threading.Thread(target=wait)
    waiting.start()
    time.sleep(0.3)
    started = time.monotonic()
    receiver.close()
    assert time.monotonic() - started < 1
    with pytest.raises(RuntimeError, match="epoch 1 is closed"):
        receiver.broadcast(torch.zeros(8))
    waiting.join(10)
    assert outcome.error is not None  # an error for who waits, not silence
    for communicator in made.values():
        communicator.close()


def test_nccls_meeting_ends_at_the_epochs_deadline(monkeypatch):
    """A peer that stands still inside NCCL's set-up holds nobody: its call has no deadline."""
    store, never = open_store(), threading.Event()
    epoch = TransferEpoch(7, "nccl", "127.0.0.1", store.port, 3, {}, 0.3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(Communicator, "_make_group", lambda *_: SimpleNamespace())
    monkeypatch.setattr(Communicator, "_first_broadcast", lambda *_: never.wait(20))
    started = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank 1: the 3 members of epoch 7 did not meet within"):
        Communicator(epoch, 1)
    assert time.monotonic() - started < 5
    never.set()
    monkeypatch.setattr(Communicator, "_first_broadcast", lambda *_: None)
    Communicator(epoch, 1)
