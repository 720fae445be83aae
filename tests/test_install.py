"""Set-up with a Python whose pip is a stub: what is asked of the indexes, and when."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).parents[1]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
# It knows the calls of the script and fails on others. Wheels that the indexes have: $STUB_HAS.
PYTHON = """#!{python} -S
import json, os, pathlib, shutil, sys
words, home = sys.argv[1:], pathlib.Path({home!r})
with (home / "calls").open("a") as calls:
    calls.write(json.dumps(words) + "\\n")
installed = home / "torch"
if words[:2] == ["-m", "venv"]:
    os.makedirs(words[2] + "/bin")
    shutil.copy2(__file__, words[2] + "/bin/python")
elif words[:2] == ["-m", "pip"]:
    torch = [word for word in words if word.startswith("torch=")]
    has = os.environ["STUB_HAS"].split()
    if torch and "index" not in has and not (
        "public" in has and {index!r} in words and "--extra-index-url" in words
    ):
        sys.exit(f"ERROR: No matching distribution found for {{torch[0]}}, attempt {{len(words)}}")
    if torch:
        installed.write_text(torch[0].split("=")[-1])
elif words[0] == "-c" and "version_info" in words[1]:
    print(os.environ.get("STUB_VERSION", "3.11"))
elif words[0] == "-c" and "importlib.metadata" in words[1]:
    print(installed.read_text())
elif words[0] != "-c" or "import torch, transformers" not in words[1]:
    sys.exit(f"the stub does not know {{words}}")
"""


@pytest.fixture
def setup(tmp_path):
    """`run(platform, has)`: a set-up in a folder of its own; `calls()`: what was asked since."""
    folder = tmp_path / "checkout"
    shutil.copytree(ROOT / "requirements", folder / "requirements")
    shutil.copy2(ROOT / "pyproject.toml", folder)
    stub = tmp_path / "python3"
    stub.write_text(PYTHON.format(python=sys.executable, home=str(tmp_path), index=CPU_INDEX))
    stub.chmod(0o755)
    log = tmp_path / "calls"

    def run(platform: str = "cpu", has: str = "index", **env: str) -> subprocess.CompletedProcess:
        command = ["bash", str(folder / "requirements" / "install.sh"), platform]
        env = os.environ | {"PYTHON": str(stub), "STUB_HAS": has} | env
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)

    def calls() -> list[list[str]]:
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return [json.loads(line) for line in lines]

    return SimpleNamespace(run=run, calls=calls, folder=folder)


def installs(calls: list[list[str]]) -> list[list[str]]:
    return [words for words in calls if words[:2] == ["-m", "pip"]]


def asked_torch(calls: list[list[str]]) -> list[str]:
    return [w for words in calls for w in words if w.startswith("torch=")]


def test_the_configured_indexes_are_asked_alone_where_they_have_it(setup):
    done = setup.run()
    assert done.returncode == 0, done.stderr
    calls = setup.calls()
    assert asked_torch(calls) == ["torch==2.13.0+cpu"]
    assert not [words for words in calls if "--extra-index-url" in words]
    assert "PyTorch's public" not in done.stdout
    assert all("--no-deps" in words for words in installs(calls))
    files = [words[words.index("-r") + 1] for words in calls if "-r" in words]
    assert files == ["requirements/cpu.txt", "requirements/cpu-engine.txt"]


def test_pytorchs_own_cpu_index_is_added_and_told(setup):
    done = setup.run(has="public")
    assert done.returncode == 0, done.stderr
    assert "the configured indexes lack torch==2.13.0+cpu: adding PyTorch's public" in done.stdout
    calls = setup.calls()
    assert asked_torch(calls) == ["torch==2.13.0+cpu"] * 2
    added = [words for words in calls if "--extra-index-url" in words]
    assert len(added) == 1 and added[0][added[0].index("--extra-index-url") + 1] == CPU_INDEX
    assert added[0][-1] == "torch==2.13.0+cpu"  # for nothing else


def test_what_pip_says_is_shown_when_neither_has_it(setup):
    done = setup.run(has="")
    assert done.returncode == 1
    assert done.stderr.count("ERROR: No matching distribution found for torch==2.13.0+cpu") == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("install.sh: neither the configured indexes nor") and CPU_INDEX in last
    assert not list((setup.folder / ".venv").glob(".locks-*"))
    assert len(installs(setup.calls())) == 2  # nothing else was begun
    assert setup.run(has="public").returncode == 0  # once it is there


def test_a_gpu_machine_takes_no_cpu_build(setup):
    done = setup.run("cuda", has="public")
    assert done.returncode == 1 and "ERROR: No matching distribution" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("install.sh: the configured indexes do not give")
    calls = setup.calls()
    assert asked_torch(calls) == ["torch===2.13.0"]
    assert not [words for words in calls if "--extra-index-url" in words]


def test_no_cuda_build_on_a_cpu_machine(setup):
    """Neither by its own line nor by what the locks bring."""
    setup.run(has="public")
    assert set(asked_torch(setup.calls())) == {"torch==2.13.0+cpu"}
    locked = (ROOT / "requirements" / "cpu.txt").read_text()
    locked += (ROOT / "requirements" / "cpu-engine.txt").read_text()
    names = [line.split("==")[0].strip().lower() for line in locked.splitlines() if "==" in line]
    assert len(names) > 100
    cuda = ("nvidia-", "cuda-")
    assert not [n for n in names if n in ("torch", "vllm") or n.startswith(cuda)]


def test_a_second_run_does_nothing_until_a_lock_changes(setup):
    assert setup.run().returncode == 0
    assert setup.calls()
    again = setup.run()
    assert again.returncode == 0 and setup.calls() == [] and again.stdout == ""
    with (setup.folder / "requirements" / "cpu.txt").open("a") as lock:
        lock.write("# another\n")
    assert setup.run().returncode == 0
    calls = setup.calls()
    assert [words for words in calls if "-r" in words] and not asked_torch(calls)


def test_a_python_that_is_not_tested_is_refused_first(setup):
    done = setup.run(STUB_VERSION="3.9")
    assert done.returncode == 2 and "expected Python 3.11 or 3.12, found 3.9" in done.stderr
    assert not installs(setup.calls())
