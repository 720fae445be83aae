"""NCCL's collectives under our deadline, on a stand-in for its work object."""

import threading
import time

import pytest

from h1r_rl.broadcast import wait_or_abort


class Work:
    def __init__(self) -> None:
        self.done = threading.Event()
        self.waited = self.aborted = self.failed = False

    def is_completed(self) -> bool:
        return self.done.is_set()

    def is_success(self) -> bool:
        return self.done.is_set() and not self.failed

    def wait(self) -> None:
        self.waited = True

    def abort(self) -> None:
        self.aborted = True


def test_a_collective_that_ends_in_time_is_waited_for():
    work = Work()
    threading.Timer(0.05, work.done.set).start()
    wait_or_abort(work, 20.0, work.abort)
    assert work.waited and not work.aborted


def test_one_that_does_not_is_aborted_at_the_deadline():
    work, started = Work(), time.monotonic()
    with pytest.raises(RuntimeError, match=r"within 0.1 s \(NCCL, aborted\)"):
        wait_or_abort(work, 0.1, work.abort)
    assert time.monotonic() - started >= 0.1
    assert work.aborted and not work.waited


def test_one_that_failed_is_aborted_and_never_waited_for():
    work = Work()
    work.failed = True
    work.done.set()
    with pytest.raises(RuntimeError, match="lost a peer"):
        wait_or_abort(work, 20.0, work.abort)
    assert work.aborted and not work.waited
