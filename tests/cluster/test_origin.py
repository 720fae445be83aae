"""The commit and the machine that a run's results carry."""

import json
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import pytest

from cluster import pipeline
from cluster.origin import commit_of, machine
from cluster.run_folder import RunFolder
from h1r_rl.config.load import load_run

RUN = Path(__file__).parents[2] / "cluster" / "runs" / "tiny-cpu.yaml"


@pytest.fixture
def checkout(tmp_path):
    """A repository with one room, and `git` in it."""

    def git(*words: str) -> str:
        name = ["-c", "user.name=n", "-c", "user.email=e"]
        command = ["git", "-C", str(tmp_path), *name, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    (tmp_path / "h1r_rl").mkdir()
    (tmp_path / "h1r_rl" / "__init__.py").touch()
    (tmp_path / "README.md").touch()
    git("init", "-q")
    git("add", "-A")
    git("commit", "-qm", "first")
    return SimpleNamespace(path=tmp_path, git=git)


def test_a_commit_and_whether_its_code_was_changed(checkout):
    head = checkout.git("rev-parse", "HEAD")
    assert len(head) == 40 and commit_of(checkout.path) == head
    (checkout.path / "README.md").write_text("a benchmark's row")  # no code
    (checkout.path / "h1r_rl" / "notes.txt").touch()  # not tracked
    assert commit_of(checkout.path) == head
    (checkout.path / "h1r_rl" / "__init__.py").write_text("x = 1\n")
    assert commit_of(checkout.path) == f"{head}-dirty"


def test_an_installed_wheel_is_of_no_commit(checkout):
    """Also not of that of a repository that it happens to be installed in."""
    installed = checkout.path / "lib"
    (installed / "h1r_rl").mkdir(parents=True)
    (installed / "h1r_rl" / "__init__.py").touch()
    assert commit_of(installed) is None


def test_the_machine():
    found = machine()
    assert found["cpu"] and found["cores"] >= 1 and found["memory"] > 1e8


def test_each_stage_notes_what_made_it(tmp_path, monkeypatch):
    """A stage that runs again notes it again; the others keep what they said."""
    folder = RunFolder(tmp_path)
    for commit, stage in (("a", "sft"), ("a", "grpo"), ("b", "grpo")):
        monkeypatch.setattr("cluster.run_folder.origin", lambda c=commit: {"commit": c})
        folder.note_origin(stage)
    noted = json.loads((tmp_path / "origin.json").read_text())
    assert noted == {"sft": {"commit": "a"}, "grpo": {"commit": "b"}}


def test_a_run_notes_the_stages_that_it_runs(tmp_path, monkeypatch):
    noted, ran = [], []
    tracker = MagicMock(run_id="r")
    monkeypatch.setattr("h1r_rl.tracking.Tracker.start", lambda *_, **__: tracker)
    monkeypatch.setattr(pipeline, "ray_cluster", lambda _: nullcontext())
    monkeypatch.setattr(pipeline, "run_stage", lambda _, stage, *__, **___: ran.append(stage))
    monkeypatch.setattr(RunFolder, "note_origin", lambda _, stage: noted.append(stage))
    few = [f"data.generate.{split}_problems=16" for split in ("sft", "rl", "evaluation")]
    config = load_run(RUN, (f"output={tmp_path}", "data.generate.code_fraction=0", *few))
    pipeline.execute(config, resume=False, only="sft")
    assert noted == ["prepare", "sft"] and ran == ["sft"]
    pipeline.execute(config, resume=True, only="sft")
    assert noted == ["prepare", "sft"]  # nothing was left to do
