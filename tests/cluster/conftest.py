"""The demo's result, made where it is not there yet."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def demo_folder() -> Path:
    """The run folder that `make demo` leaves."""
    folder = ROOT / "runs" / "tiny-cpu"
    if not (folder / "result.json").exists():
        h1r = Path(sys.executable).with_name("h1r")
        run = ROOT / "cluster" / "runs" / "tiny-cpu.yaml"
        subprocess.run([h1r, "run", run, "--resume"], cwd=ROOT, check=True, timeout=1400)
    return folder
