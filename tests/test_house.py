"""Rules of the house that no linter of ours knows."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import BaseModel

from h1r_rl.config.schema import RunConfig

ROOT = Path(__file__).parents[1]
ROOMS = ("h1r_rl", "rewards", "actors", "learners", "cluster")
SOURCES = [file for room in ROOMS for file in sorted((ROOT / room).rglob("*.py"))]


def calls_without_timeout(source: str) -> list[int]:
    """Lines with ray.get(...) or ray.wait(...) and no timeout."""
    return [
        node.lineno
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr in ("get", "wait")
        and isinstance(node.func.value, ast.Name)
        and node.func.value.id == "ray"
        and not any(
            keyword.arg == "timeout" and ast.unparse(keyword.value) != "None"
            for keyword in node.keywords
        )
    ]


def test_no_ray_get_without_a_deadline():
    # the check itself can fail
    assert calls_without_timeout("ray.get(x, timeout=3)\nray.get(x)\nray.get(x, timeout=None)") == [
        2,
        3,
    ]
    assert not [f for f in SOURCES if "from ray import" in f.read_text()]
    found = [f"{f}:{n}" for f in SOURCES for n in calls_without_timeout(f.read_text())]
    assert not found


def test_help_loads_no_heavy_package():
    code = (
        "import sys, cluster.cli\n"
        "from typer.testing import CliRunner\n"
        "assert CliRunner().invoke(cluster.cli.app, ['--help']).exit_code == 0\n"
        "print([m for m in ('vllm', 'deepspeed', 'mlflow', 'torch', 'ray') if m in sys.modules])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert out.stdout.strip() == "[]", out.stderr


def test_rooms_lie_beside_each_other():
    for room in ROOMS:
        module = __import__(room)
        assert Path(module.__path__[0]).resolve() == ROOT / room


def sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    found: dict[str, type[BaseModel]] = {model.__name__: model}
    for field in model.model_fields.values():
        for kind in [field.annotation, *getattr(field.annotation, "__args__", ())]:
            if isinstance(kind, type) and issubclass(kind, BaseModel):
                found |= sections(kind)
    return found


def attribute_names() -> set[str]:
    names = set()
    for file in SOURCES:
        own = file.name == "schema.py"  # there only what a section's own property reads
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute):
                if not own or (isinstance(node.value, ast.Name) and node.value.id == "self"):
                    names.add(node.attr)
    return names


# Read through `getattr(data, split)`, and `preset` from the raw section before validation.
BY_NAME = {"sft", "rl", "evaluation", "preset"}


@pytest.mark.parametrize("section", sorted(sections(RunConfig)))
def test_every_setting_is_described_and_read(section):
    read = attribute_names() | BY_NAME
    for name, field in sections(RunConfig)[section].model_fields.items():
        assert field.description, f"{section}.{name} has no description"
        assert name in read, f"{section}.{name} is read by nothing"


@pytest.mark.parametrize("file", sorted((ROOT / "cluster" / "runs").glob("*.yaml")), ids=str)
def test_every_recipe_passes_its_checks(file):
    from h1r_rl.config.load import load_run

    load_run(file)
