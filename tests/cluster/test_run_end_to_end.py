"""The real thing, short: Ray jobs, DeepSpeed, vLLM, MLflow; ends, failures and interrupts."""

import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from h1r_rl.config.lora_targets import TARGETS

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
pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def h1r(folder: Path, command: str, *overrides: str) -> list[str]:
    store = f"tracking.uri=sqlite:///{folder}/mlflow.db"
    return [str(H1R), command, str(RUN), f"output={folder}", store, *SMALL, *overrides]


@pytest.fixture
def from_sft(demo_folder) -> tuple[str, ...]:
    """GRPO from the demo's SFT model, which answers in more than one way."""
    return ("sft=null", "model.tiny=null", f"model.path={demo_folder / 'sft-model'}")


def call(command: list[str], timeout: float = 600) -> subprocess.CompletedProcess:
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def statuses(folder: Path) -> dict[str, str]:
    with sqlite3.connect(folder / "mlflow.db") as store:
        return dict(store.execute("select name, status from runs"))


def records(folder: Path, stage: str) -> list[dict]:
    file = folder / "tiny-cpu" / "metrics.jsonl"
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
        """SIGKILL to the first process with these words in its title or command line."""
        found = [pid for pid in sorted(alive(self.tree)) if name in command_line(pid)]
        assert found, {pid: command_line(pid) for pid in alive(self.tree)}
        os.kill(found[0], signal.SIGKILL)

    def end(self, deadline_s: float = 200) -> tuple[int, str]:
        """Exit code and standard error; nothing of the run is left."""
        _, stderr = self.process.communicate(timeout=deadline_s)
        end = time.monotonic() + 20
        while alive(self.tree) and time.monotonic() < end:
            time.sleep(0.5)
        assert not alive(self.tree)
        return self.process.returncode, stderr


def test_a_synchronous_run_of_three_steps_ends_by_itself(tmp_path, from_sft):
    done = call(h1r(tmp_path, "run", *from_sft, "grpo.max_staleness=0"))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "tiny-cpu"
    result = json.loads((run / "result.json").read_text())
    assert set(result["evaluation"]) == {"base", "grpo"}
    assert set(result["evaluation"]["grpo"]) >= {"greedy", "t0.6", "t1", "pass@8", "mean_length"}
    assert (run / "model" / "model.safetensors").exists()
    assert set(statuses(tmp_path).values()) == {"FINISHED"}
    steps = records(tmp_path, "grpo")
    assert [r["step"] for r in steps] == [0, 1, 2]
    assert max(r["rollout/staleness_max"] for r in steps) == 0

    before = (run / "resolved.yaml").read_text()
    again = call(h1r(tmp_path, "run", *from_sft))
    assert again.returncode == 2 and "holds a run already" in again.stderr
    assert (run / "resolved.yaml").read_text() == before


def test_a_constant_reward_ends_with_an_explanation(tmp_path, from_sft):
    live = Live(h1r(tmp_path, "grpo", *from_sft, "reward.control=constant", "grpo.max_backfill=0"))
    code, stderr = live.end(600)
    assert code == 1 and "nothing can be learned" in " ".join(stderr.split())
    assert statuses(tmp_path) == {"tiny-cpu": "FAILED", "tiny-cpu/grpo": "FAILED"}


LONG = {"sft": ("sft.steps=5000",), "grpo": ("grpo.steps=500",)}


@pytest.mark.parametrize("like_a_terminal", [True, False])
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_ctrl_c_in_the_middle_leaves_nothing(tmp_path, from_sft, stage, like_a_terminal):
    start = from_sft if stage == "grpo" else ()
    live = Live(h1r(tmp_path, stage, *start, *LONG[stage]))
    live.wait_for(lambda: len(records(tmp_path, stage)) >= 2)
    live.interrupt(like_a_terminal=like_a_terminal)
    code, stderr = live.end()
    assert code == 130, stderr
    assert statuses(tmp_path) == {"tiny-cpu": "KILLED", f"tiny-cpu/{stage}": "KILLED"}


def test_ctrl_c_before_an_engine_is_up_leaves_nothing(tmp_path, from_sft):
    live = Live(h1r(tmp_path, "eval", *from_sft))
    live.wait_for(lambda: any("RolloutActor" in command_line(p) for p in alive(live.tree)))
    live.interrupt(like_a_terminal=True)
    code, stderr = live.end()
    assert code == 130, stderr
    assert statuses(tmp_path)["tiny-cpu"] == "KILLED"
    assert set(statuses(tmp_path).values()) == {"KILLED"}


def test_ctrl_c_while_answers_are_measured_leaves_nothing(tmp_path, from_sft):
    """So many problems that the measuring is under way for a while."""
    many = ("evaluation.limit=20000", "data.generate.evaluation_problems=20000")
    live = Live(h1r(tmp_path, "eval", *from_sft, *many))
    live.wait_for(lambda: "tiny-cpu/evaluate-base" in statuses(tmp_path))
    time.sleep(5)
    live.interrupt(like_a_terminal=False)
    code, stderr = live.end()
    assert code == 130, stderr
    assert statuses(tmp_path) == {"tiny-cpu": "KILLED", "tiny-cpu/evaluate-base": "KILLED"}


@pytest.mark.parametrize(
    ("stage", "victim", "named"),
    [
        ("sft", "ray::LearnerActor", "learner"),
        ("grpo", "ray::LearnerActor", "learner"),
        ("grpo", "cluster.stage_main grpo", "stage grpo failed"),  # the loop itself
    ],
)
def test_a_crash_in_the_middle_is_told_and_leaves_nothing(tmp_path, from_sft, stage, victim, named):
    start = from_sft if stage == "grpo" else ()
    live = Live(h1r(tmp_path, stage, *start, *LONG[stage]))
    live.wait_for(lambda: len(records(tmp_path, stage)) >= 2)
    live.kill(victim)
    code, stderr = live.end()
    assert code == 1 and named in stderr.lower(), stderr
    assert statuses(tmp_path) == {"tiny-cpu": "FAILED", f"tiny-cpu/{stage}": "FAILED"}


def test_a_killed_command_leaves_nothing_and_its_run_goes_on_later(tmp_path, from_sft):
    """Engines and reward workers are replaced within the run; the command itself by --resume."""
    live = Live(h1r(tmp_path, "grpo", *from_sft, "grpo.steps=12"))

    def steps() -> int:
        return len(records(tmp_path, "grpo"))

    live.wait_for(lambda: steps() >= 2)
    for service in ("ray::RewardWorker", "ray::RolloutActor"):
        live.kill(service)
        reached = steps()
        live.wait_for(lambda reached=reached: steps() >= reached + 3)
    live.process.kill()
    live.end()
    assert set(statuses(tmp_path).values()) == {"RUNNING"}  # nobody was left to say otherwise
    done = call(h1r(tmp_path, "grpo", *from_sft, "grpo.steps=12", "--resume"))
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in records(tmp_path, "grpo")] == list(range(12))
    with sqlite3.connect(tmp_path / "mlflow.db") as store:
        found = store.execute("select name, status from runs order by start_time").fetchall()
    assert found == [
        ("tiny-cpu", "FAILED"),
        ("tiny-cpu/grpo", "FAILED"),
        ("tiny-cpu", "FINISHED"),
        ("tiny-cpu/grpo", "FINISHED"),
    ]


def test_two_runs_of_one_seed_start_alike(tmp_path):
    """Same data, weights, batches and first losses; in SFT nothing is sampled."""
    losses, files = [], []
    for name in ("a", "b"):
        folder = tmp_path / name
        done = call(h1r(folder, "sft", "sft.steps=3", "learner.threads=1"))
        assert done.returncode == 0, done.stderr
        losses.append([r["learner/loss"] for r in records(folder, "sft")])
        run = folder / "tiny-cpu"
        made = ("data/sft.parquet", "data/rl.parquet", "base/model.safetensors")
        files.append([(run / file).read_bytes() for file in made])
    assert losses[0] == losses[1] and files[0] == files[1]


def test_adapters_through_both_stages(tmp_path, demo_folder):
    """GRPO goes on from what SFT merged; engines agree with the learner after every transfer."""
    base = demo_folder / "sft-model"
    lora = ("model.tiny=null", f"model.path={base}", "model.lora.rank=4", "sft.steps=3")
    for command, *more in (("sft",), ("grpo", "--resume")):
        done = call(h1r(tmp_path, command, *lora, *more))
        assert done.returncode == 0, done.stderr
    run = tmp_path / "tiny-cpu"
    held = [load_file(f / "model.safetensors") for f in (base, run / "sft-model", run / "model")]
    for before, after in pairwise(held):
        assert before.keys() == after.keys()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name.split(".")[-2] for name in moved} == set(TARGETS["falcon_h1"])
    assert (run / "model" / "adapter" / "adapter_config.json").exists()
    steps = records(tmp_path, "grpo")
    assert len(steps) == 3 and max(r["learner/probe_gap"] for r in steps) < 3e-5


def in_flight(record: dict) -> float:
    """Admitted groups of a step that were neither trained on nor dropped by then."""
    dropped = sum(value for key, value in record.items() if key.startswith("buffer/dropped_"))
    return record["buffer/admitted"] - record["buffer/trained"] - dropped


@pytest.mark.proof  # three engines' starts: minutes
@pytest.mark.timeout(1500)
def test_a_live_run_scales_and_its_services_restart(tmp_path, from_sft):
    """From one engine to three and back; then the learner alone, then the engines alone."""
    live = Live(
        h1r(
            # A policy that all but stands still has signal for as long as this takes.
            tmp_path, "grpo", *from_sft, "grpo.steps=5000", "grpo.optimizer.learning_rate=1e-7",
            "cluster.num_cpus=8", "learner.threads=1", "rollout.kv_cache_gib=0.1",
            "rollout.num_cpus=0.5",
        )
    )  # fmt: skip
    folder = tmp_path / "tiny-cpu"

    def last() -> dict:
        return (records(tmp_path, "grpo") or [{"step": -1}])[-1]

    def ask(*words: str) -> str:
        command = [str(H1R), words[0], str(folder), *words[1:], "--wait", "400"]
        done = call(command, timeout=450)
        assert done.returncode == 0, done.stderr
        assert "done:" in done.stdout, done.stdout
        return done.stdout

    def serving(count: int) -> bool:
        """That many engines, each of which has generated since the last step."""
        names = [key for key in last() if re.fullmatch(r"engine/rollout-\d+/tokens_per_s", key)]
        busy = [key for key in names if last()[key] > 0]
        return last().get("engine/engines") == count == len(busy) == len(names)

    try:
        live.wait_for(lambda: last()["step"] >= 1)
        assert "3 rollout actors" in ask("scale", "--rollout-actors", "3")
        live.wait_for(lambda: serving(3))
        ask("scale", "--rollout-actors", "1")
        live.wait_for(lambda: serving(1))
        ask("restart", "--learner")
        restarted = last()["step"]
        live.wait_for(lambda: last()["step"] >= restarted + 2)
        before = {key for key in last() if key.startswith("engine/rollout-")}
        ask("restart", "--rollout-actors")
        live.wait_for(lambda: serving(1) and not before & set(last()))
        restarted = last()["step"]
        live.wait_for(lambda: last()["step"] >= restarted + 2)
    finally:
        live.process.send_signal(signal.SIGINT)
        code, stderr = live.end()
    assert code == 130, stderr
    for record in records(tmp_path, "grpo"):
        assert in_flight(record) == record["buffer/rolling"] + record["buffer/ready"]
        assert record["buffer/slots_used"] <= record["buffer/slots"]
        assert record["buffer/dropped_stale"] == 0
        assert record["rollout/staleness_max"] <= 1
        assert record.get("faults/quarantined", 0) == record.get("faults/engines_lost", 0) == 0
    steps = [record["step"] for record in records(tmp_path, "grpo")]
    assert steps == list(range(len(steps)))
