"""Whole runs as a user starts them: commands, and a run in the background under a test's eyes."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
RUN = ROOT / "cluster" / "runs" / "tiny-cpu.yaml"
H1R = Path(sys.executable).with_name("h1r")
SMALL = (
    "grpo.steps=3",
    "grpo.prompts_per_step=4",
    "grpo.samples_per_prompt=8",
    "evaluation.limit=8",
    "data.generate.sft_problems=256",
    "data.generate.rl_problems=512",
    "data.generate.evaluation_problems=16",
)


def h1r(folder: Path, command: str, *overrides: str) -> list[str]:
    store = f"tracking.uri=sqlite:///{folder}/mlflow.db"
    return [str(H1R), command, str(RUN), f"output={folder}", store, *SMALL, *overrides]


def from_model(folder: Path) -> tuple[str, ...]:
    """Overrides that start from a model folder, without SFT."""
    return ("sft=null", "model.tiny=null", f"model.path={folder}")


def call(command: list[str], timeout: float = 600) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def statuses(folder: Path) -> dict[str, str]:
    with sqlite3.connect(folder / "mlflow.db") as store:
        if not store.execute("select 1 from sqlite_master where name = 'runs'").fetchone():
            return {}  # it is only just being made
        return dict(store.execute("select name, status from runs"))


def records(folder: Path, stage: str, run: str = "tiny-cpu") -> list[dict]:
    file = folder / run / "metrics.jsonl"
    lines = file.read_text().splitlines() if file.exists() else []
    return [r for r in map(json.loads, lines) if r["stage"] == stage]


def tree_of(pid: int) -> dict[int, str]:
    """Descendants of a process, with their names: they outlive their parents' ids."""
    found: dict[int, str] = {}
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                name, rest = (entry / "stat").read_text().rsplit(")", 1)
            except OSError:
                continue
            parents[int(entry.name)] = (int(rest.split()[1]), name.partition("(")[2])
    known = {pid}
    while fresh := {p for p, (parent, _) in parents.items() if parent in known} - known:
        known |= fresh
    for child in known - {pid}:
        found[child] = parents[child][1]
    return found


def alive(tree: dict[int, str]) -> dict[int, str]:
    return {p: name for p, name in tree.items() if Path(f"/proc/{p}").exists()}


def command_line(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")
    except OSError:
        return ""


class Live:
    """A run in the background, every process that it ever had remembered."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        self.tree: dict[int, str] = {}

    def wait_for(self, condition: Callable[[], bool], deadline_s: float = 300) -> None:
        end = time.monotonic() + deadline_s
        while not condition():
            assert self.process.poll() is None, self.process.communicate()[1]
            assert time.monotonic() < end, f"waited {deadline_s} s"
            self.tree |= tree_of(self.process.pid)
            time.sleep(0.5)

    def interrupt(self, *, like_a_terminal: bool) -> None:
        """Ctrl-C: a terminal sends it to every process of the command's group."""
        if like_a_terminal:
            os.killpg(self.process.pid, signal.SIGINT)
        else:
            self.process.send_signal(signal.SIGINT)

    def kill(self, name: str) -> None:
        """SIGKILL to the first process with these words in its title or command line (the lowest
        id: a shell before what it runs)."""
        found = [pid for pid in sorted(alive(self.tree)) if name in command_line(pid)]
        assert found, {pid: command_line(pid) for pid in alive(self.tree)}
        os.kill(found[0], signal.SIGKILL)

    def end(self, deadline_s: float = 200, leftover_s: float = 20) -> tuple[int, str]:
        """Exit code and standard error; nothing of the run is left after `leftover_s`."""
        _, stderr = self.process.communicate(timeout=deadline_s)
        end = time.monotonic() + leftover_s
        while alive(self.tree) and time.monotonic() < end:
            time.sleep(0.5)
        assert not alive(self.tree), {p: command_line(p) for p in alive(self.tree)}
        return self.process.returncode, stderr

    def kill_all(self) -> None:
        """What a failed test has left."""
        self.tree |= tree_of(self.process.pid)
        self.process.kill()
        self.process.wait()
        for pid in alive(self.tree):
            os.kill(pid, signal.SIGKILL)
