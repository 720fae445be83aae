"""Results say which code and machine made them; a table is of one commit."""

import importlib
import json
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent
MACHINE = {"cpu": "c", "cores": 2, "memory": 1}


@pytest.fixture
def modules(monkeypatch, tmp_path):
    """(results_file, update_readme), writing to a folder of their own."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    found = [importlib.import_module(name) for name in ("results_file", "update_readme")]
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(found[0], "RESULTS", results)
    monkeypatch.setattr(found[1], "DEMO", results / "demo.json")
    monkeypatch.setattr(found[1], "CURVE", tmp_path / "curve.png")
    yield found
    for name in ("results_file", "update_readme"):
        sys.modules.pop(name)


def made(folder: Path, done=("sft", "grpo"), **commits: str) -> Path:
    """A finished run whose stages were made at `commits`."""
    folder.mkdir()
    (folder / "state.json").write_text(json.dumps({"done": list(done)}))
    result = {"evaluation": {}, "minutes": {"sft": 1.0}, "model": "/there"}
    (folder / "result.json").write_text(json.dumps(result))
    (folder / "grpo.png").write_bytes(b"png")
    if commits:
        origins = {stage: {"commit": c, "machine": MACHINE} for stage, c in commits.items()}
        (folder / "origin.json").write_text(json.dumps(origins))
    return folder


def test_runs_of_one_commit_give_the_table_its_stamp(modules, tmp_path):
    results_file, _ = modules
    runs = [made(tmp_path / name, sft="ab", grpo="ab") for name in ("seed0", "seed1")]
    made_by = results_file.origin_of_runs(runs)
    results_file.write_results("main", [], made_by=made_by)
    written = json.loads((results_file.RESULTS / "main.json").read_text())
    assert (written["commit"], written["machine"]) == ("ab", MACHINE)


def test_without_runs_it_is_what_is_here(modules):
    from cluster.origin import commit_of

    results_file, _ = modules
    results_file.write_results("main", [])
    written = json.loads((results_file.RESULTS / "main.json").read_text())
    assert written["commit"] == commit_of(BENCHMARKS.parents[1]) and written["machine"]["cores"]


@pytest.mark.parametrize(
    ("second", "said"),
    [
        ({"sft": "ab", "grpo": "cd"}, "cd"),  # resumed under other code
        ({"sft": "cd", "grpo": "cd"}, "cd"),
        ({"grpo": "ab"}, "no commit noted"),  # its SFT stage is older than the notes
        ({}, "no commit noted"),
    ],
    ids=["resumed", "another", "half noted", "not noted"],
)
def test_runs_of_different_commits_are_no_table(modules, tmp_path, second, said):
    results_file, _ = modules
    runs = [made(tmp_path / "a", sft="ab", grpo="ab"), made(tmp_path / "b", **second)]
    with pytest.raises(SystemExit, match="(?s)one commit.*Remove the run folders") as caught:
        results_file.origin_of_runs(runs)
    lines = str(caught.value).splitlines()
    assert any(line.strip().startswith(f"{said}: ") and "/b" in line for line in lines), lines


def test_older_runs_are_refused_before_others_are_added(modules, tmp_path):
    from cluster.origin import commit_of

    results_file, _ = modules
    here = commit_of(BENCHMARKS.parents[1]) or ""
    mine, gone = made(tmp_path / "mine", sft=here, grpo=here), tmp_path / "not there yet"
    results_file.refuse_other_commits([mine, gone])
    with pytest.raises(SystemExit, match="the code that is here"):
        results_file.refuse_other_commits([mine, made(tmp_path / "old", sft="ab", grpo="ab")])


def test_the_demo_is_taken_up_with_what_made_it(modules, tmp_path):
    _, update_readme = modules
    update_readme.take_up(made(tmp_path / "demo", sft="abcdef0123456", grpo="abcdef0123456"))
    taken = json.loads(update_readme.DEMO.read_text())
    assert taken["commit"] == "abcdef0123456" and taken["machine"] == MACHINE
    assert taken["model"] == "runs/tiny-cpu/model"
    assert "at commit `abcdef0123`," in update_readme.demo_section()
    with pytest.raises(SystemExit, match="no commit noted"):
        update_readme.take_up(made(tmp_path / "old"))
