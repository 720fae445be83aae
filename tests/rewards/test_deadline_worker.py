"""The killable process: whatever runs in it, the caller goes on in time and nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from rewards.deadline_worker import DeadlineExceeded, DeadlineWorker, FunctionFailed, ProcessDied

MARGIN_S = 5.0  # kill, start and a busy machine


@pytest.fixture
def worker():
    worker = DeadlineWorker(memory_mib=512)
    yield worker
    worker.close()


def running(argument: str) -> bool:
    """Is there a process with this command-line argument?"""
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if argument.encode() in entry.read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False


def wait_until(condition, timeout_s: float) -> bool:
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.05)
    return condition()


def test_value_comes_back_and_the_process_is_reused(worker):
    awkward = [2.5, None, "\ud800é\0"]
    assert worker.call("operator:add", [[1], awkward], 5) == [1, *awkward]
    assert worker.call("os:getpid", [], 5) == worker.call("os:getpid", [], 5) == worker.pid


def test_an_exception_names_its_type_and_costs_no_process(worker):
    pid = worker.call("os:getpid", [], 5)
    with pytest.raises(FunctionFailed) as failure:
        worker.call("operator:truediv", [1, 0], 5)
    assert failure.value.kind == "ZeroDivisionError"
    with pytest.raises(FunctionFailed) as failure:
        worker.call("sys:exit", [3], 5)
    assert failure.value.kind == "SystemExit"
    assert worker.call("os:getpid", [], 5) == pid


@pytest.mark.parametrize(
    ("function", "arguments"),
    [("builtins:pow", [7, 10**9]), ("time:sleep", [600]), ("signal:pause", [])],
    ids=["a C loop that holds the GIL", "sleep", "blocked"],
)
def test_killed_at_the_deadline_and_replaced(worker, function, arguments):
    pid = worker.call("os:getpid", [], 5)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        worker.call(function, arguments, 0.5)
    assert time.monotonic() - started < 0.5 + MARGIN_S
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    assert worker.call("os:getpid", [], 5) != pid


def test_memory_limit_is_an_error_of_the_call(worker):
    with pytest.raises(FunctionFailed) as failure:
        worker.call("operator:mul", ["a", 1 << 30], 5)
    assert failure.value.kind == "MemoryError"
    assert worker.call("operator:add", [1, 1], 5) == 2


def test_children_die_too_daemons_included(worker):
    seconds = [f"29{digit}.{os.getpid()}" for digit in range(3)]  # no other run's processes
    daemon, background, child = seconds
    worker.call("os:system", [f"setsid sleep {daemon} & sleep {background} &"], 5)
    assert wait_until(lambda: running(daemon) and running(background), 5)
    with pytest.raises(DeadlineExceeded):
        worker.call("os:system", [f"sleep {child}"], 0.5)
    assert wait_until(lambda: not any(map(running, seconds)), 5)


def test_printing_does_not_reach_the_channel(worker):
    assert worker.call("builtins:print", ["{}" * 100], 5) is None
    assert worker.call("os:system", ["echo hello"], 5) == 0
    assert worker.call("operator:add", [1, 1], 5) == 2


def test_an_oversized_reply_is_refused(worker):
    with pytest.raises(FunctionFailed) as failure:
        worker.call("operator:mul", ["a", 8 << 20], 5)
    assert failure.value.kind == "ReplyTooLarge"
    assert worker.call("operator:add", [1, 1], 5) == 2


def test_a_large_request_to_a_process_that_does_not_read_ends_in_time(worker):
    pid = worker.call("os:getpid", [], 5)
    os.kill(pid, signal.SIGSTOP)
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded):
        worker.call("builtins:len", ["a" * 50_000_000], 1.0)
    assert time.monotonic() - started < 1.0 + MARGIN_S
    assert worker.call("builtins:len", ["a" * 50_000_000], 20) == 50_000_000


def test_death_by_itself_is_told_from_death_from_outside(worker):
    with pytest.raises(ProcessDied) as death:
        worker.call("os:abort", [], 5)
    assert death.value.by_itself
    pid = worker.call("os:getpid", [], 5)
    threading.Timer(0.5, os.kill, (pid, signal.SIGKILL)).start()
    with pytest.raises(ProcessDied) as death:
        worker.call("time:sleep", [30], 20)
    assert not death.value.by_itself
    assert worker.call("operator:add", [1, 1], 5) == 2


def test_an_interrupted_call_leaves_no_answer_behind(worker):
    """As by Ctrl-C: the next call must not read what this one's comes to."""

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGUSR1, interrupt)
    try:
        assert worker.call("operator:add", [1, 1], 5) == 2
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGUSR1)).start()
        with pytest.raises(KeyboardInterrupt):
            worker.call("time:sleep", [1], 20)
        assert worker.call("operator:add", [2, 2], 20) == 4
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_a_module_that_hangs_is_no_items_fault(worker, monkeypatch, tmp_path):
    (tmp_path / "hangs_at_import.py").write_text("import time\ntime.sleep(600)\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert worker.call("operator:add", [1, 1], 5) == 2
    monkeypatch.setattr("rewards.deadline_worker.START_TIMEOUT_S", 0.5)
    with pytest.raises(FunctionFailed) as failure:
        worker.call("operator:add", [1, 1], 5, load="hangs_at_import")
    assert failure.value.kind == "ImportTimeout"


def test_it_ends_without_its_parent():
    """The parent is killed in mid-call: the kernel's timer ends a busy process, EOF an idle one."""
    code = (
        "import os, signal, sys, threading\n"
        "from rewards.deadline_worker import DeadlineWorker\n"
        "busy, idle = DeadlineWorker(512), DeadlineWorker(512)\n"
        "print(busy.call('os:getpid', [], 9), idle.call('os:getpid', [], 9), flush=True)\n"
        "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGKILL)).start()\n"
        "busy.call('time:sleep', [600], 1.0)\n"
    )
    command = [sys.executable, "-c", code]
    parent = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert parent.returncode == -signal.SIGKILL
    pids = [int(pid) for pid in parent.stdout.split()]
    assert len(pids) == 2
    assert wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids), 10)


def test_judging_loads_nothing_heavy():
    """No torch, no Ray, and no sympy before an answer needs algebra."""
    code = (
        "import sys, rewards.judge, rewards.ground_truth, rewards.math_verifier\n"
        "heavy = {'torch', 'transformers', 'vllm', 'deepspeed', 'ray', 'sympy', 'math_verify'}\n"
        "print(sorted(heavy & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stderr
