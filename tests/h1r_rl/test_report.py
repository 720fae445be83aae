"""result.json has its promised shape; the table says what result.json says; plots are drawn."""

import json
from pathlib import Path

import pytest
from rich.console import Console

from h1r_rl.evaluation.report import (
    closing_table,
    markdown_table,
    plot_grpo,
    read_metrics,
    stage_entry,
    terminal_plot,
    write_result,
)


def summary(accuracy, length, **extra):
    return {"pass@1": accuracy, "se": 0.01, "mean_length": length, "format_rate": 1.0, **extra}


@pytest.fixture()
def result(tmp_path):
    evaluation = {
        "base": stage_entry({"greedy": summary(0.0, 64.0)}),
        "sft": stage_entry(
            {"greedy": summary(0.25, 13.0), "t1": summary(0.24, 14.5, **{"pass@8": 0.81})}
        ),
    }
    minutes = {"start": 0.5, "sft": 2.0}
    return write_result(tmp_path, evaluation, minutes, Path("runs/x/model"))


def test_result_file_has_the_promised_shape(result, tmp_path):
    written = json.loads((tmp_path / "result.json").read_text())
    assert written == result and set(written) == {"evaluation", "minutes", "model"}
    sft = written["evaluation"]["sft"]
    assert sft["greedy"]["pass@1"] == 0.25 and sft["t1"]["se"] == 0.01
    assert sft["pass@8"] == 0.81 and sft["mean_length"] == 14.5
    assert written["model"] == "runs/x/model" and written["minutes"]["sft"] == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["result.json"]  # no draft left


def test_tables_agree_with_the_result(result):
    lines = markdown_table(result).splitlines()
    assert lines[0] == "| stage | greedy | t1 | pass@8 | length | minutes |"
    assert lines[2] == "| base | 0.0 ± 1.0 |  |  | 64.0 |  |"
    assert lines[3] == "| sft | 25.0 ± 1.0 | 24.0 ± 1.0 | 81.0 | 14.5 | 2.0 |"
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(closing_table(result))
    text = console.export_text()
    assert "25.0±1.0" in text and "grpo" not in text


def test_code_has_rows_of_its_own_and_notes_are_said(result, tmp_path):
    code = {"sft": stage_entry({"greedy": summary(0.125, 39.0)})}
    both = write_result(
        tmp_path,
        result["evaluation"],
        result["minutes"],
        Path("m"),
        evaluation_code=code,
        notes=["without walls"],
    )
    assert json.loads((tmp_path / "result.json").read_text())["evaluation_code"] == code
    lines = markdown_table(both).splitlines()
    assert "| sft, code | 12.5 ± 1.0 |  |  | 39.0 |  |" in lines and lines[-1] == "without walls"
    console = Console(width=100, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(closing_table(both))
    assert "without walls" in console.export_text()


def test_metrics_of_a_killed_run_are_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert read_metrics(file) == []
    file.write_text('{"stage": "grpo", "step": 0, "reward/mean": 0.5}\n{"stage": "gr')
    assert read_metrics(file) == [{"stage": "grpo", "step": 0, "reward/mean": 0.5}]


def test_plots(tmp_path):
    records = [
        {"step": i, "reward/mean": i / 9, "rollout/length_mean": 14 + i, "learner/entropy": 0.5}
        for i in range(10)
    ]
    plot_grpo(records, tmp_path / "grpo.png")  # a missing curve leaves its panel empty
    assert (tmp_path / "grpo.png").read_bytes().startswith(b"\x89PNG")
    text = terminal_plot(
        [r["step"] for r in records], [r["reward/mean"] for r in records], "reward"
    )
    assert "reward" in text and len(text.splitlines()) >= 10
