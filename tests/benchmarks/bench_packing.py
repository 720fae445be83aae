"""Forward and backward of a small Falcon-H1: documents sharing rows, against right-padded rows, and
our scan against transformers' on equal lengths. Best of interleaved repeats in one process."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from h1r_rl.config.schema import TinyModelConfig
from h1r_rl.hybrid import boundaries
from h1r_rl.hybrid.load import load_policy
from h1r_rl.hybrid.packed_forward import _packed, _padded
from h1r_rl.hybrid.scan import chunked_scan
from h1r_rl.hybrid.tiny import build_tiny_model

REPEATS = 4


def best(functions: dict) -> dict[str, float]:
    times = {name: float("inf") for name in functions}
    for _ in range(REPEATS):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            times[name] = min(times[name], time.perf_counter() - start)
    return times


def packing_speedup(folder: Path) -> float:
    model = load_policy(folder).train()
    rng = np.random.default_rng(0)
    lengths = tuple(np.clip(rng.lognormal(5.0, 0.9, 32), 8, 2048).astype(int).tolist())
    ids = torch.from_numpy(rng.integers(0, 200, sum(lengths)))
    starts = torch.tensor((0, *lengths)).cumsum(0)
    documents = boundaries.Documents(lengths, starts)

    def run(forward):
        forward(model, ids, documents).square().mean().backward()
        model.zero_grad()

    times = best({"packed": lambda: run(_packed), "padded": lambda: run(_padded)})
    return times["padded"] / times["packed"]


def scan_speedup(folder: Path) -> float:
    """The shape of the 0.5B model's scan, one document of 1,024 tokens."""
    theirs = boundaries._modeling_module(load_policy(folder)).h1r_originals[1]
    tokens, heads, dim, state = 1024, 24, 64, 128
    torch.manual_seed(0)
    x, dt, B, C = (
        torch.randn(s, requires_grad=True)
        for s in [(tokens, heads, dim), (tokens, heads), (tokens, 1, state), (tokens, 1, state)]
    )
    A, D = -torch.rand(heads), torch.ones(heads)

    def ours():
        positive = torch.nn.functional.softplus(dt)
        chunked_scan(x, positive, A, B, C, D, (tokens,)).square().mean().backward()

    def fallback():
        y = theirs(x[None], dt[None], A, B[None], C[None], 128, D=D, dt_softplus=True)
        y.square().mean().backward()

    times = best({"ours": ours, "fallback": fallback})
    return times["fallback"] / times["ours"]


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as parent:
        folder = Path(parent) / "tiny"
        build_tiny_model(TinyModelConfig(), folder, seed=0)
        values = {"packing_speedup": packing_speedup(folder), "scan_speedup": scan_speedup(folder)}
    targets = {"packing_speedup": 1.5, "scan_speedup": 1.0}
    notes = {
        "packing_speedup": "over padded rows with our scan too; 32 log-normal lengths, one thread",
        "scan_speedup": "forward and backward, 0.5B's shape, 1,024 tokens, one thread",
    }
    write_result("packing", values, targets, notes)


def write_result(name: str, values: dict, targets: dict, notes: dict) -> None:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    result = {
        "benchmark": name,
        "commit": commit.strip(),
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count(), "memory": memory},
        "metrics": [
            {"name": key, "value": round(value, 3), "unit": "ratio", "target": f">= {targets[key]}",
             "meets": value >= targets[key], "note": notes[key]}
            for key, value in values.items()
        ],
    }  # fmt: skip
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n")
    print(path.read_text())


if __name__ == "__main__":
    main()
