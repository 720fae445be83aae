"""Every attack in attack_programs.txt is contained, scored wrong, and followed by a next item.

The programs print ESCAPED when they succeed and their problem expects just that, so a score above
0 is an escape; those marked `control: open` are shown to succeed where there are no walls.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest

from h1r_rl.config.schema import CodeConfig, RewardConfig
from h1r_rl.records import Prompt, Verdict
from rewards.code_verifier import executor_for, verify
from rewards.sandbox.executor import JailExecutor
from rewards.sandbox.limits import Limits

PROMPT_S = 15.0  # the next item's verdict, on a machine that does other things too
CODE = CodeConfig(
    cpu_s=2, wall_s=10, total_s=20, memory_mib=256, output_mib=1, file_mib=16, processes=6
)


def attacks() -> list[tuple[str, tuple[str, ...], bool, str]]:
    """(name, reasons, whether it succeeds without walls, source) of each program in the file."""
    sections = (Path(__file__).parent / "attack_programs.txt").read_text().split("\n### ")[1:]
    found = []
    for section in sections:
        title, _, source = section.partition("\n")
        name, reasons, control = (part.strip() for part in title.split("|"))
        found.append((name, tuple(reasons.split("/")), control == "open", source))
    return found


ATTACKS = attacks()


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    """What attacks reach for: a listener, sockets, a marker, a process that must not die."""
    listener = socket.create_server(("127.0.0.1", 0))
    marker = Path(tempfile.gettempdir()) / f"h1r-sandbox-marker-{os.getpid()}"
    marker.write_text("untouched")
    path, name = str(tmp_path_factory.mktemp("s") / "socket"), f"h1r-attack-{os.getpid()}"
    by_path, abstract = socket.socket(socket.AF_UNIX), socket.socket(socket.AF_UNIX)
    by_path.bind(path)
    abstract.bind("\0" + name)
    for server in (by_path, abstract):
        server.listen()
    sentinel = subprocess.Popen(["sleep", "600"])
    session = tmp_path_factory.mktemp("ray") / "session_latest"
    session.mkdir()
    (session / "plasma_store").write_text("marker")
    words = {
        "PORT": str(listener.getsockname()[1]), "SOCKET_PATH": path, "SOCKET_NAME": name,
        "RAY_SESSION": str(session),
    }
    yield words
    assert [file.name for file in session.iterdir()] == ["plasma_store"]
    assert sentinel.poll() is None, "an attack killed a process of the host"
    assert marker.read_text() == "untouched"
    sentinel.kill()
    sentinel.wait()
    marker.unlink()
    for server in (listener, by_path, abstract):
        server.close()


@pytest.fixture(scope="module")
def options(namespaces):
    return RewardConfig(code=CODE)


def verdict(options: RewardConfig, text: str, truth: dict) -> Verdict:
    ids = np.arange(2, dtype=np.int32)
    return verify(Prompt("p", 0, ids, "question", "code", json.dumps(truth)), text, options)


def judged(options: RewardConfig, source: str, expected: str) -> Verdict:
    tests = {"tests": [{"input": "5\n", "output": expected}]}
    return verdict(options, f"```python\n{source}\n```", tests)


def descendants(pid: int) -> list[int]:
    found = []
    for entry in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in map(int, entry.read_text().split()):
            found += [child, *descendants(child)]
    return found


def assert_next_item_is_served(options: RewardConfig) -> None:
    started = time.monotonic()
    assert judged(options, "print(int(input()) + 1)", "6").score == 1.0
    assert time.monotonic() - started < PROMPT_S


@pytest.mark.parametrize(
    ("reasons", "source"), [pytest.param(a[1], a[3], id=a[0]) for a in ATTACKS]
)
def test_attack_is_contained(reasons, source, host, options):
    for word, value in host.items():
        source = source.replace(word, value)
    if "timeout" in reasons:  # made to run for ever: no need to wait as long as others may
        options = options.model_copy(update={"code": CODE.model_copy(update={"wall_s": 1.5})})
    executor = executor_for(options)
    zygote = executor.pid
    attacked = judged(options, source, "ESCAPED")
    assert attacked.score == 0.0
    assert attacked.reason in reasons
    assert len(descendants(zygote)) == 1, "processes are left over"
    assert executor.pid == zygote, "the zygote was lost"
    assert_next_item_is_served(options)


def test_there_are_at_least_thirty():
    assert len(ATTACKS) >= 30
    assert len({name for name, *_ in ATTACKS}) == len(ATTACKS)


@pytest.fixture(scope="module")
def open_executor():
    executor = JailExecutor(jailed=False)
    yield executor
    executor.close()


@pytest.mark.parametrize("source", [pytest.param(a[3], id=a[0]) for a in ATTACKS if a[2]])
def test_attack_succeeds_without_walls(source, host, open_executor):
    """Otherwise its failure in the jail would prove nothing."""
    if os.geteuid() != 0 and "/root" in source:
        pytest.skip("needs a home that this user may read")
    for word, value in host.items():
        source = source.replace(word, value)
    limits = Limits(wall_s=120, memory_bytes=4 << 30, file_bytes=1 << 41)
    assert b"ESCAPED" in open_executor.script(source, b"", limits).stdout


def test_no_answer_is_within_reach(options):
    """A program that searches its memory and descriptors finds no expected output."""
    secret = "SECRET-" + os.urandom(16).hex()
    search = r"""
import gc, os, re, sys
pattern = re.compile("SECRET" + "-[0-9a-f]{32}")
found = set()
for thing in gc.get_objects():
    try:
        found.update(pattern.findall(repr(thing)[:100_000]))
    except Exception:
        pass
for file in range(256):
    try:
        found.update(pattern.findall(os.pread(file, 1 << 20, 0).decode("latin-1")))
    except OSError:
        pass
print(*found)
"""
    assert judged(options, search, secret).score == 0.0
    assert judged(options, f"print({secret!r})", secret).score == 1.0  # the search's own check
    assert judged(options, search, secret).score == 0.0  # nor does an earlier program leave it


def test_zygote_memory_holds_no_program(options):
    """What passes through it passes as descriptors; its memory is what programs inherit."""
    secret = "SECRET-" + os.urandom(16).hex()
    assert judged(options, f"print({secret!r})", secret).score == 1.0
    zygote = descendants(executor_for(options).pid)[-1]
    try:
        memory = open(f"/proc/{zygote}/mem", "rb")  # noqa: SIM115
    except PermissionError:
        pytest.skip("this user may not read the zygote's memory")
    regions, looked = [], 0
    for line in Path(f"/proc/{zygote}/maps").read_text().splitlines():
        span, rights = line.split()[:2]
        if rights.startswith("rw"):
            regions.append([int(edge, 16) for edge in span.split("-")])
    with memory:
        for start, end in regions:
            memory.seek(start)
            data = memory.read(end - start)
            looked += len(data)
            assert secret.encode() not in data
    assert looked > 1 << 20


def test_nothing_survives_a_program(options):
    plant = """
import builtins, json, os, sys, tempfile
for path in ("/tmp/state", "/dev/shm/state", "state"):
    open(path, "w").write("state")
builtins.state = json.state = sys.state = os.environ["STATE"] = "state"
sys.path.insert(0, "/tmp")
os.umask(0)
os.nice(5) if hasattr(os, "never") else None
print(6)
"""
    look = """
import builtins, json, os, sys
seen = os.listdir("/tmp") + os.listdir("/dev/shm") + [
    name for thing in (builtins, json, sys) for name in ["state"] if hasattr(thing, "state")]
print("ESCAPED" if seen or "STATE" in os.environ or os.umask(0) == 0 else 6)
"""
    for source in (plant, look, plant, look):
        assert judged(options, source, "6").score == 1.0


def test_huge_completion(options):
    started = time.monotonic()
    tests = {"tests": [{"input": "", "output": "ESCAPED"}]}
    block = "```python\n" + "#" * (50 << 20) + "\n```"
    for text in ("x" * (50 << 20), block, "```\n" * (12 << 20)):
        found = verdict(options, text, tests)
        assert found.score == 0.0
        assert found.reason == "no_answer" or text[:4] == "```\n"  # its beginning is not read
    assert time.monotonic() - started < 4 * PROMPT_S
    assert_next_item_is_served(options)


@pytest.mark.parametrize(
    "source",
    ["print('ESCAPED')\0", "print('ESCAPED')\ud800", "\ufeff\udcff", "x = '" + "a" * 300_000 + "'"],
    ids=["nul", "surrogate", "no_text", "long"],
)
def test_source_that_is_no_text(source, options):
    found = judged(options, source, "ESCAPED")
    assert found.score == 0.0
    assert (found.reason == "too_long") == (len(source) > 300_000)
    assert_next_item_is_served(options)
