"""`h1r selftest` on a real engine, and its exit codes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from cluster import selftest_lines as lines

ROOT = Path(__file__).parents[2]
LINES = (
    lines.LEAK, lines.EXPORT, lines.FLOOR, lines.VALUES, lines.MULTIPLIERS, lines.RELOAD,
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
def test_a_sound_model_passes_every_line(tiny_model_folder):
    done = command(str(tiny_model_folder))
    assert done.returncode == 0, done.stdout + done.stderr
    found = done.stdout.splitlines()
    assert [line[6:].partition(":")[0] for line in found[:-1]] == list(LINES), done.stdout
    assert all(line.startswith("pass  ") for line in found[:-1]), done.stdout
    assert found[-1] == "no line failed"


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
