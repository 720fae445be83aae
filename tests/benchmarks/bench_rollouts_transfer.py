"""Weights from the learner to the engines: bytes/s against a bare gloo broadcast, the sender's peak
over ZeRO-3 shards, and how long a new communicator of 16 members takes.

Each side is a process of its own. Ratios within one run, best of interleaved repeats.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from h1r_rl.config.schema import WeightsConfig  # noqa: E402
from h1r_rl.weight_manifest import IN_FLIGHT  # noqa: E402

REPEATS = 8
LAYERS, WIDTH = 8, 2048  # 8 x 16 MiB of float32 = 134 MB
IN_TRANSIT = WeightsConfig().bucket_mib * 2**20  # bytes under way at once
MEMBERS = 16


def model() -> Any:
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(*(torch.nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))


def meet(store_port: int, number: int, rank: int, size: int) -> Any:
    from h1r_rl.broadcast import Communicator
    from h1r_rl.weight_manifest import TransferEpoch

    epoch = TransferEpoch(number, "gloo", "127.0.0.1", store_port, size, {"rollout-0": 1}, 300.0)
    return epoch, Communicator(epoch, rank) if rank == 0 or number < 0 else None


def receiver(port: int) -> None:
    """Rank 1: bare broadcasts and whole transfers in turn."""
    import torch

    torch.set_num_threads(1)
    from actors.staged_transfer import StagedTransfer
    from h1r_rl.weight_manifest import TransferEpoch
    from learners.weight_sender import manifest_of

    manifest = manifest_of(model(), IN_TRANSIT // IN_FLIGHT)
    _, bare = meet(port, -1, 1, 2)
    epoch = TransferEpoch(1, "gloo", "127.0.0.1", port, 2, {"rollout-0": 1}, 300.0)
    staged = StagedTransfer(epoch, 1, torch.device("cpu"))
    flat = torch.empty(manifest.num_bytes, dtype=torch.uint8)
    for _ in range(REPEATS):
        bare.broadcast(flat)
        bare.broadcast(torch.zeros(1))
        staged.begin(manifest)
        while staged.outcome() == "running":
            time.sleep(0.002)
        staged.take()
        bare.broadcast(torch.zeros(1))


def transfer_efficiency() -> tuple[float, str]:
    import torch

    from h1r_rl.broadcast import open_store
    from learners.weight_sender import manifest_of, send_weights

    torch.set_num_threads(1)
    store = open_store()
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=receiver, args=(store.port,))
    process.start()
    policy = model()
    manifest = manifest_of(policy, IN_TRANSIT // IN_FLIGHT)
    flat = torch.empty(manifest.num_bytes, dtype=torch.uint8)
    _, bare = meet(store.port, -1, 0, 2)
    _, ours = meet(store.port, 1, 0, 2)
    best = {"bare": float("inf"), "ours": float("inf")}
    for _ in range(REPEATS):
        started = time.perf_counter()
        bare.broadcast(flat)
        bare.broadcast(torch.zeros(1))  # the other side has it, too
        best["bare"] = min(best["bare"], time.perf_counter() - started)
        started = time.perf_counter()
        send_weights(policy, manifest, ours, sharded=False)
        bare.broadcast(torch.zeros(1))
        best["ours"] = min(best["ours"], time.perf_counter() - started)
    process.join(60)
    rates = {name: manifest.num_bytes / seconds / 1e6 for name, seconds in best.items()}
    note = (
        f"{manifest.num_bytes / 1e6:.0f} MB: {rates['ours']:.0f} MB/s packed, summed and staged, "
        f"{rates['bare']:.0f} MB/s bare, one core a side"
    )
    return rates["ours"] / rates["bare"], note


def epoch_rebuild_s() -> tuple[float, str]:
    from h1r_rl.broadcast import Communicator, open_store
    from h1r_rl.weight_manifest import TransferEpoch

    seconds = []
    for number in range(REPEATS):
        store = open_store()
        epoch = TransferEpoch(number, "gloo", "127.0.0.1", store.port, MEMBERS, {}, 60.0)
        made: list[Any] = []
        meeting = [
            threading.Thread(target=lambda rank=rank, epoch=epoch, made=made: made.append(
                Communicator(epoch, rank)))
            for rank in range(MEMBERS)
        ]  # fmt: skip
        started = time.perf_counter()
        for thread in meeting:
            thread.start()
        for thread in meeting:
            thread.join(60)
        seconds.append(time.perf_counter() - started)
        assert len(made) == MEMBERS
        for communicator in made:
            communicator.close()
    return min(seconds), f"{MEMBERS} members as threads of one process over the loopback"


def zero_rank(rank: int, port: int, peaks: Any) -> None:
    """One of two ZeRO-3 ranks; rank 0 sends to a receiver thread beside it."""
    os.environ.update(
        MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE="2",
        LOCAL_RANK="0", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    import deepspeed
    import torch

    from h1r_rl.broadcast import open_store
    from learners.weight_sender import manifest_of, send_weights

    torch.set_num_threads(1)
    deepspeed.init_distributed("gloo", verbose=False, auto_mpi_discovery=False)
    policy = model()
    engine, *_ = deepspeed.initialize(
        model=policy,
        config={
            "train_micro_batch_size_per_gpu": 1,
            "zero_optimization": {"stage": 3},
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "torch_adam": True}},
        },
    )
    manifest = manifest_of(engine.module, IN_TRANSIT // IN_FLIGHT)
    store = open_store() if rank == 0 else None
    communicator = None
    if rank == 0:
        other = multiprocessing.get_context("spawn").Process(
            target=drain, args=(store.port, manifest)
        )
        other.start()
        _, communicator = meet(store.port, 2, 0, 2)
    for _ in range(REPEATS):  # the first one also makes the libraries' own buffers
        ctypes.CDLL(None).malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        resident = _status("VmRSS")
        send_weights(engine.module, manifest, communicator, sharded=True)
        if rank == 0:
            layer = max(spec.num_bytes for spec in manifest.parameters)
            peaks.put((_status("VmHWM") - resident, layer, IN_TRANSIT))
    if rank == 0:
        other.join(60)


def drain(port: int, manifest: Any) -> None:
    import torch

    from actors.staged_transfer import StagedTransfer
    from h1r_rl.weight_manifest import TransferEpoch

    epoch = TransferEpoch(2, "gloo", "127.0.0.1", port, 2, {"rollout-0": 1}, 300.0)
    staged = StagedTransfer(epoch, 1, torch.device("cpu"))
    for _ in range(REPEATS):
        staged.begin(manifest)
        while staged.outcome() == "running":
            time.sleep(0.01)
        staged.take()


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def sender_peak_ratio() -> tuple[float, str]:
    from h1r_rl.broadcast import open_store

    context = multiprocessing.get_context("spawn")
    peaks = context.Queue()
    probe = open_store()
    port = probe.port
    del probe
    ranks = [context.Process(target=zero_rank, args=(r, port, peaks)) for r in (0, 1)]
    for process in ranks:
        process.start()
    measured = [peaks.get(timeout=500) for _ in range(REPEATS)]
    grown, layer, bucket = min(measured[1:])
    for process in ranks:
        process.join(60)
    note = (
        f"two ZeRO-3 ranks on gloo: peak {grown / 2**20:.1f} MiB above the resident before the "
        f"transfer, after one to warm up; largest gathered {layer / 2**20:.0f}, in "
        f"transit {bucket / 2**20:.0f}; allocator and libraries included"
    )
    return grown / (layer + bucket), note


def main() -> None:
    from results_file import metric, write_results

    efficiency, how = transfer_efficiency()
    rebuild, where = epoch_rebuild_s()
    peak, what = sender_peak_ratio()
    write_results(
        "rollouts_transfer",
        [
            metric("transfer_efficiency", efficiency, "ratio", ">= 0.8", efficiency >= 0.8, how),
            metric("sender_peak_ratio", peak, "ratio", "<= 1.1", peak <= 1.1, what),
            metric("epoch_rebuild_s", rebuild, "s", "< 5", rebuild < 5, where),
        ],
    )


if __name__ == "__main__":
    main()
