"""The receiving side of an epoch, in threads: three members, one that stops, what each is told."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from actors.staged_transfer import DONE, RUNNING, StagedTransfer
from h1r_rl.broadcast import Communicator, open_store
from h1r_rl.errors import WeightTransferError
from h1r_rl.weight_manifest import ParameterSpec, TransferEpoch, WeightManifest, checksum

CPU = torch.device("cpu")
TENSORS = {
    "a.weight": torch.randn(7, 5),
    "a.D": torch.randn(3).bfloat16(),
    "b.weight": torch.randn(40, 4),
    "b.bias": torch.randn(1),
    "c.D": torch.randn(3).bfloat16(),
    "c.weight": torch.randn(5),  # begins in its bucket where no float32 may
}
MANIFEST = WeightManifest(
    tuple(
        ParameterSpec(n, tuple(t.shape), str(t.dtype).removeprefix("torch."))
        for n, t in TENSORS.items()
    ),
    bucket_bytes=200,
)


def _epoch(store, size: int, deadline_s: float) -> TransferEpoch:
    return TransferEpoch(1, "gloo", "127.0.0.1", store.port, size, {}, deadline_s)


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8).flatten()


def _send(communicator: Communicator, *, damaged: tuple[str, ...] = ()) -> None:
    """Last bytes of `damaged` parameters leave flipped."""
    for bucket in MANIFEST.buckets():
        parts = [_bytes(TENSORS[p.name])[p.start : p.stop].clone() for p in bucket]
        for piece, part in zip(bucket, parts, strict=True):
            if piece.name in damaged and piece.ends:
                part[-1] ^= 1
        communicator.broadcast(torch.cat(parts))
    sums = [checksum(_bytes(t).numpy()) for t in TENSORS.values()]
    communicator.broadcast(torch.tensor(sums, dtype=torch.int64))


def _settle(transfer: StagedTransfer, seconds: float = 10) -> str:
    end = time.monotonic() + seconds
    while transfer.outcome() == RUNNING and time.monotonic() < end:
        time.sleep(0.01)
    return transfer.outcome()


def test_every_member_stages_the_same_bytes_twice():
    cut = [p for bucket in MANIFEST.buckets() for p in bucket if p.name == "b.weight"]
    assert [(p.start, p.stop) for p in cut] == [(0, 200), (200, 400), (400, 600), (600, 640)]
    assert all(sum(p.num_bytes for p in b) <= 200 for b in MANIFEST.buckets())
    store = open_store()
    epoch = _epoch(store, 3, 10)
    members = [StagedTransfer(epoch, rank, CPU) for rank in (1, 2)]
    learner = Communicator(epoch, 0)
    for _ in range(2):
        for member in members:
            member.begin(MANIFEST)
        _send(learner)
        for member in members:
            assert _settle(member) == DONE
            staged = member.take()
            assert list(staged) == list(TENSORS)
            assert all(torch.equal(staged[n], t) for n, t in TENSORS.items())
            with pytest.raises(WeightTransferError, match="nothing has been received"):
                _settle(member)
                member.take()
    for each in (*members, learner):
        each.close()


def test_a_damaged_parameter_is_named_with_both_sides_and_a_whole_transfer_follows():
    """One flipped bit in any parameter: cut, packed, of either dtype, the last one too."""
    store = open_store()
    epoch = _epoch(store, 3, 10)
    members = [StagedTransfer(epoch, rank, CPU) for rank in (1, 2)]
    learner = Communicator(epoch, 0)
    cases = [(name,) for name in TENSORS] + [("a.D", "b.weight", "c.weight")]
    for damaged in cases:
        for member in members:
            member.begin(MANIFEST)
        _send(learner, damaged=damaged)
        for rank, member in enumerate(members, 1):
            told = _settle(member)
            name = damaged[0] if len(damaged) == 1 else "a.D and 2 more"
            assert f"checksum of {name}: the learner (rank 0) sent " in told
            assert f", rank {rank} received " in told
            with pytest.raises(WeightTransferError, match="expected a complete transfer"):
                member.take()
    for member in members:
        member.begin(MANIFEST)
    _send(learner)
    for member in members:
        assert _settle(member) == DONE
        assert torch.equal(member.take()["b.weight"], TENSORS["b.weight"])
    for each in (*members, learner):
        each.close()


def test_a_member_that_never_comes_costs_the_others_a_deadline():
    store = open_store()
    epoch = _epoch(store, 3, 1.5)
    started = time.monotonic()
    learner = threading.Thread(target=_tolerant, args=(epoch,))
    learner.start()
    member = StagedTransfer(epoch, 1, CPU)  # rank 2 is missing
    member.begin(MANIFEST)
    outcome = _settle(member)
    assert "never joined" in outcome
    with pytest.raises(WeightTransferError, match="expected a complete transfer"):
        member.take()
    learner.join(10)
    assert time.monotonic() - started < 6
    member.close()


def test_an_epoch_given_up_does_not_wait_for_its_sender():
    store = open_store()
    epoch = _epoch(store, 2, 4)
    member = StagedTransfer(epoch, 1, CPU)
    learner = Communicator(epoch, 0)
    member.begin(MANIFEST)
    time.sleep(0.2)
    started = time.monotonic()
    member.close()
    assert time.monotonic() - started < 0.5
    learner.close()


def _tolerant(epoch: TransferEpoch) -> None:
    try:
        Communicator(epoch, 0)
    except RuntimeError:
        pass  # its own deadline: the test looks at the member
