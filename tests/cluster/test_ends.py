"""Ctrl-C, crashes and kills in the middle of real runs: the true outcome, and nothing left."""

import sqlite3
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from live_runs import Live, alive, call, command_line, from_model, h1r, records, statuses  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def from_sft(demo_folder) -> tuple[str, ...]:
    return from_model(demo_folder / "sft-model")


LONG = {"sft": ("sft.steps=5000",), "grpo": ("grpo.steps=500",)}


@pytest.mark.parametrize(("stage", "like_a_terminal"), [("sft", False), ("grpo", True)])
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
