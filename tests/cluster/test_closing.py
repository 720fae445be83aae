"""What a run says when it ends: the model and the files that are there, no others."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from cluster.code_share import STATE
from cluster.pipeline import _close
from cluster.run_folder import RunFolder, write_json
from h1r_rl.config.load import load_run

RUN = Path(__file__).parents[2] / "cluster" / "runs" / "tiny-cpu.yaml"
SCORES = {"greedy": {"pass@1": 0.5, "se": 0.1, "mean_length": 9.0}}


@pytest.mark.parametrize("made", [(), ("sft-model",), ("sft-model", "model")])
def test_the_last_model_is_named(tmp_path, capsys, made):
    config = load_run(RUN, (f"output={tmp_path}",))
    folder = RunFolder(config.folder)
    for name in ("base", *made):
        (folder.path / name).mkdir(parents=True)
    _close(config, folder, SimpleNamespace(log_artifact=lambda _: None), time.monotonic())
    result = json.loads((folder.path / "result.json").read_text())
    assert result["model"] == str(folder.path / ("base", *made)[-1])
    said = "".join(capsys.readouterr().out.split())
    assert result["model"] in said and "grpo.png" not in said and "held-out" not in said


def test_what_was_measured_is_shown(tmp_path, capsys):
    config = load_run(RUN, (f"output={tmp_path}",))
    folder = RunFolder(config.folder)
    write_json(folder.evaluation("base"), SCORES)
    (folder.path / "grpo.png").touch()
    _close(config, folder, SimpleNamespace(log_artifact=lambda _: None), time.monotonic())
    said = capsys.readouterr().out
    assert "50.0±10.0" in said and "grpo.png" in said
    assert json.loads((folder.path / "result.json").read_text())["evaluation"]["base"]["greedy"]


def test_code_problems_left_out_are_told(tmp_path, capsys):
    config = load_run(RUN, (f"output={tmp_path}",))
    folder = RunFolder(config.folder)
    folder.update_state(**{STATE: "the kernel said EPERM"})
    write_json(folder.evaluation("base"), SCORES)
    _close(config, folder, SimpleNamespace(log_artifact=lambda _: None), time.monotonic())
    said = "".join(capsys.readouterr().out.split())
    assert "withouttheshareofcodeproblems:thekernelsaidEPERM" in said
