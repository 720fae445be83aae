"""The format of a benchmark's results, and where they stand."""

from __future__ import annotations

import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def metric(
    name: str, value: float, unit: str, target: str, meets: bool | None, note: str
) -> dict[str, Any]:
    """`meets` None: reported without a target."""
    return {
        "name": name,
        "value": round(float(value), 4) if abs(value) >= 0.01 else float(f"{float(value):.4g}"),
        "unit": unit,
        "target": target,
        "meets": None if meets is None else bool(meets),
        "note": note,
    }


def write_results(benchmark: str, metrics: list[dict[str, Any]], **more: Any) -> None:
    """`more`: what the metrics were made of, for tests and readers of the file."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    result = {
        "benchmark": benchmark,
        "commit": commit.strip(),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        },
        "metrics": metrics,
        **more,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{benchmark}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(file.read_text())


def _cpu() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
