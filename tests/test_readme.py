"""README.md, the command line, the recipes and the Makefile say the same."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
SHELL = "\n".join(re.findall(r"```bash\n(.*?)```", README, re.S))
COMMANDS = [shlex.split(line, comments=True) for line in SHELL.splitlines()]
COMMANDS = [words for words in COMMANDS if words]
H1R = [words[1:] for words in COMMANDS if words[0].endswith("h1r")]
MAKE = sorted({words[1] for words in COMMANDS if words[0] == "make"})


def test_there_is_something_to_check():
    assert H1R and {"demo", "test"} <= set(MAKE)
    assert all(words[0] == "make" or words[0].endswith("h1r") for words in COMMANDS), COMMANDS


@pytest.mark.parametrize("words", H1R, ids=" ".join)
def test_every_h1r_command_is_one(words):
    import typer
    from typer.testing import CliRunner

    from cluster.cli import app
    from h1r_rl.config.load import load_run

    command = typer.main.get_command(app).commands[words[0]]  # pyright: ignore
    context = command.make_context(words[0], words[1:])  # raises on an unknown option
    run_file = context.params.get("run_file")
    if run_file is not None:
        load_run(ROOT / run_file, context.params.get("overrides") or ())
    assert CliRunner().invoke(app, [words[0], "--help"]).exit_code == 0


@pytest.mark.parametrize("target", MAKE)
def test_every_make_target_is_one(target):
    done = subprocess.run(
        ["make", "-n", target], cwd=ROOT, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("path", sorted(set(re.findall(r"`([\w/.-]+\.(?:py|md|yaml))`", README))))
def test_every_file_it_names_is_there(path):
    assert (ROOT / path).exists() or path in ("report.md",), path


def test_every_alarm_has_a_page_that_it_links():
    from h1r_rl.grpo.tripwires import ALARMS

    pages = {f"docs/tripwires/{alarm}.md" for alarm in ALARMS}
    assert pages == {str(p.relative_to(ROOT)) for p in ROOT.glob("docs/tripwires/*")}
    links = set(re.findall(r"\]\(([^)#]+)\)", README))
    assert pages | {"docs/selftest.md"} <= links
    assert not [link for link in links if "://" not in link and not (ROOT / link).exists()]


def test_every_preset_is_named():
    from h1r_rl.grpo.presets import PRESETS

    for name in PRESETS:
        assert f"`{name}`" in README


def test_its_tables_are_those_of_the_committed_results():
    import importlib.util

    file = ROOT / "tests" / "benchmarks" / "update_readme.py"
    spec = importlib.util.spec_from_file_location("update_readme", file)
    assert spec is not None and spec.loader is not None
    update_readme = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(update_readme)
    assert update_readme.updated(README) == README, "run tests/benchmarks/update_readme.py"


def test_the_parts_of_a_score_name_settings_that_there_are():
    from h1r_rl.config.schema import RewardConfig

    section = README.split("## What a score is made of")[1].split("\n## ")[0]
    rows = [line.split("|")[3] for line in section.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)", row)}
    assert named and named <= RewardConfig.model_fields.keys()
