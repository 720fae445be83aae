"""`h1r selftest` on a real engine, and its exit codes."""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import selftest_lines as lines
from cluster.selftest_export import EXPORT

ROOT = Path(__file__).parents[2]
FORMATS = runpy.run_path(str(ROOT / "tests" / "hybrid_formats.py"))
LINES = (
    lines.LEAK, EXPORT, lines.FLOOR, lines.VALUES, lines.MULTIPLIERS, lines.RELOAD,
    lines.STALE,
)  # fmt: skip


def command(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "cluster.cli", "selftest", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=840,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("family", ["falcon", "granite-1-tied", "nemotron-1"])
def test_a_sound_model_passes_every_line(tiny_model_folder, tmp_path, family):
    folder = tiny_model_folder
    if family != "falcon":
        FORMATS["write_folder"](family, folder := tmp_path / "model")
    done = command(str(folder))
    assert done.returncode == 0, done.stdout + done.stderr
    found = done.stdout.splitlines()
    assert [line[6:].partition(":")[0] for line in found[:-1]] == list(LINES), done.stdout
    words = {line[6:].partition(":")[0]: line[:4] for line in found[:-1]}
    has_none = {lines.MULTIPLIERS} if family == "nemotron-1" else set()
    assert {name for name, word in words.items() if word != "pass"} == has_none, done.stdout
    assert all(words[name] == "n/a " for name in has_none)
    seconds = re.fullmatch(r"no line failed, (\d+) s in all", found[-1])
    assert seconds and int(seconds[1]) < 120, done.stdout  # what the command promises


@pytest.mark.parametrize(("failing", "last"), [(0, "no line failed"), (1, "1 lines failed")])
def test_the_last_line_counts_failures_and_seconds(tmp_path, monkeypatch, failing, last):
    import ray

    from cluster import selftest

    async def made(options, device, scratch):
        for name, passed in (("a", True), ("b", None), ("c", not failing)):
            yield lines.Line(name, passed, "figures")

    monkeypatch.setattr(selftest, "_lines", made)
    for check in ("refuse_no_model", "refuse_other_families"):
        monkeypatch.setattr(f"h1r_rl.hybrid.model_folder.{check}", lambda folder: None)
    monkeypatch.setattr(ray, "init", lambda **_: None)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    said: list[str] = []
    assert selftest.selftest(selftest.Options(tmp_path, device="cpu"), said.append) == (not failing)
    words = ["pass", "n/a ", "FAIL" if failing else "pass"]
    assert said[:-1] == [f"{w}  {n}: figures" for w, n in zip(words, "abc", strict=True)]
    assert re.match(rf"{last}, \d+ s in all", said[-1])


@pytest.mark.parametrize(("sound", "code"), [(True, 0), (False, 1)])
def test_exit_codes(tmp_path, monkeypatch, capsys, sound, code):
    from cluster import cli, selftest

    monkeypatch.setattr(selftest, "selftest", lambda options, say: sound)
    monkeypatch.setattr(sys, "argv", ["h1r", "selftest", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert (stopped.value.code or 0) == code
    assert ("did not pass the self-test" in capsys.readouterr().err) == (not sound)


def test_a_folder_that_is_no_model_is_the_users_mistake(tmp_path, monkeypatch, capsys):
    from cluster import cli

    monkeypatch.setattr(sys, "argv", ["h1r", "selftest", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    assert "expected a model folder with config.json" in capsys.readouterr().err
