"""Is every defence of the reward services held by a test? Each is broken in turn.

The repository's tracked files are copied to a temporary folder. There the tests that the table
names must pass; then each mutant of `defence_mutants.MUTANTS`, one defence deleted or weakened, is
put in place, and the tests that should notice are run until the first one fails. A mutant is killed
by that test, or by time-out where the tests hang; one that passes them all survives, which says
that a defence could be lost unnoticed. All processes of a run are killed when it ends, those that
left its group too: they become children of this one.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import contextmanager
from pathlib import Path
from signal import SIGKILL
from typing import NamedTuple

from defence_mutants import MUTANTS, Mutant
from results_file import metric, write_results
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

ROOT = Path(__file__).parents[2]
GRACE_S = 60.0  # for a test that timed out to tidy up
BASE_TIMEOUT_S = 1800.0
PASSED, FAILED, INTERNAL_ERROR = 0, 1, 3  # pytest's exit codes
PR_SET_CHILD_SUBREAPER = 36


class Found(NamedTuple):
    mutant: str
    killed_by: str | None  # a test, "time-out", or None: it survived
    seconds: float


class Ran(NamedTuple):
    code: int | None  # None: killed at the time-out
    output: str
    seconds: float


def copied(target: Path) -> None:
    """The tracked files as they stand; open to the ordinary user that some tests run as."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in listed.stdout.decode().split("\0"):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, target / name)
    target.chmod(0o755)


def mutated(mutant: Mutant, text: str) -> str:
    if text.count(mutant.old) != 1 or mutant.old == mutant.new:
        raise SystemExit(
            f"mutant '{mutant.name}': expected its old text once in {mutant.file}, found it "
            f"{text.count(mutant.old)} times; the code has moved on, correct defence_mutants.py:\n"
            f"{mutant.old}"
        )
    return text.replace(mutant.old, mutant.new)


@contextmanager
def in_place(mutant: Mutant, folder: Path):
    file = folder / mutant.file
    whole = file.read_text()
    try:
        _write(file, mutated(mutant, whole))
        yield
    finally:
        _write(file, whole)


def _write(file: Path, text: str) -> None:
    file.write_text(text)
    # Compiled files are told apart by size and whole seconds: too little for quick changes.
    shutil.rmtree(file.parent / "__pycache__", ignore_errors=True)


def run_tests(folder: Path, tests: Sequence[str], test_s: float, timeout_s: float) -> Ran:
    command = [
        sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--tb=short",
        f"--timeout={test_s}", *tests,
    ]
    environment = {
        "PYTHONPATH": str(folder),
        "PYTHONDONTWRITEBYTECODE": "1",
        "COLUMNS": "1000",  # or pytest's summary leaves reasons out
    }
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as output:
        process = subprocess.Popen(
            command, cwd=folder, stdout=output, stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL, start_new_session=True,
            env=os.environ | environment,
        )
        try:
            code = process.returncode = exit_code(process.pid, started + timeout_s)
        finally:
            end_children()
        seconds = time.monotonic() - started
        output.seek(0)
        return Ran(code, output.read(), seconds)


def exit_code(process: int, end: float) -> int | None:
    """Of that child; None at the time-out. Orphans are buried meanwhile, as tests wait for that."""
    while time.monotonic() < end:
        child, status = os.waitpid(-1, os.WNOHANG)
        if child == process:
            return os.waitstatus_to_exitcode(status)
        if child == 0:
            time.sleep(0.02)
    return None


def end_children() -> None:
    """Kill until none is left: what a killed process had started becomes our child in turn."""
    me = os.getpid()
    while children := Path(f"/proc/{me}/task/{me}/children").read_text().split():
        for child in map(int, children):
            os.kill(child, SIGKILL)
            os.waitpid(child, 0)


def judged(mutant: Mutant, ran: Ran) -> Found:
    first = re.search(r"^(?:FAILED|ERROR) tests/(.+?)(?: - (.*))?$", ran.output, re.M)
    late = first is not None and (first[2] or "").startswith("Failed: Timeout")
    # Python may not know the line that a time-out's signal interrupts, and pytest fails on that.
    late |= ran.code == INTERNAL_ERROR and ran.seconds >= mutant.timeout_s
    if ran.code is None or late:
        return Found(mutant.name, "time-out", ran.seconds)
    if ran.code == PASSED:
        return Found(mutant.name, None, ran.seconds)
    if ran.code != FAILED or first is None:
        raise SystemExit(f"mutant '{mutant.name}': its tests did not run:\n{ran.output[-3000:]}")
    return Found(mutant.name, first[1], ran.seconds)


def chosen(words: Sequence[str]) -> list[Mutant]:
    found = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    if not found:
        raise SystemExit(f"no mutant has {' or '.join(map(repr, words))} in its name")
    return found


def check_unmutated(folder: Path, mutants: Sequence[Mutant]) -> None:
    for mutant in mutants:
        mutated(mutant, (folder / mutant.file).read_text())
    tests = sorted({test for mutant in mutants for test in mutant.tests})
    ran = run_tests(folder, tests, max(m.timeout_s for m in mutants), BASE_TIMEOUT_S)
    if ran.code != PASSED:
        raise SystemExit(f"the tests fail without any mutant:\n{ran.output[-5000:]}")


def break_each(mutants: Sequence[Mutant]) -> list[Found]:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    found = []
    with (
        tempfile.TemporaryDirectory(prefix="h1r-defences-") as name,
        Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as bars,
    ):
        folder = Path(name)
        copied(folder)
        task = bars.add_task("without a mutant", total=len(mutants))
        check_unmutated(folder, mutants)
        for mutant in mutants:
            bars.update(task, description=mutant.name)
            with in_place(mutant, folder):
                ran = run_tests(folder, mutant.tests, mutant.timeout_s, mutant.timeout_s + GRACE_S)
            found.append(judged(mutant, ran))
            verdict = found[-1].killed_by or "SURVIVED"
            bars.console.print(
                f"{mutant.name}: {verdict}", markup=False, highlight=False, soft_wrap=True
            )
            bars.advance(task)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="NAME",
        help="mutants that have one of these in their name; writes no results file",
    )
    only = parser.parse_args().only
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    started = time.monotonic()
    found = break_each(chosen(only))
    minutes = (time.monotonic() - started) / 60
    survivors = [one.mutant for one in found if one.killed_by is None]
    killed = len(found) - len(survivors)
    note = (
        f"defences broken one at a time, each noticed by a test ({minutes:.0f} minutes); "
        f"survivors: {', '.join(survivors) or 'none'}"
    )
    print(f"{killed} of {len(found)}: {note}")
    if only:
        return
    table = [one._asdict() | {"seconds": round(one.seconds, 1)} for one in found]
    row = metric("defences_killed", killed, "mutants", str(len(found)), not survivors, note)
    write_results("defences", [row], table=table)


if __name__ == "__main__":
    main()
