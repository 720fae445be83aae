"""The communicator of one transfer epoch: open, broadcast, close, each under the epoch's deadline.

Invariant: it never touches torch's default process group (DeepSpeed owns that one in the learner,
vLLM in the engine), and gloo and NCCL differ in `_make_group` alone. Rank 0 is the learner.

Wire of one transfer: for each bucket of the manifest one broadcast of a flat uint8 tensor with the
parameters' bytes in order; then one broadcast of an int64 tensor with a checksum per parameter.
Some buckets travel at once (`Wire`), in the same order on every member.
"""

from __future__ import annotations

import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from h1r_rl.weight_manifest import IN_FLIGHT, TransferEpoch

dist: Any = torch.distributed  # stores and groups are exported at run time only

SHORTEST_WAIT_S = 0.05  # a collective whose time is over fails in it rather than at once
LOOK_AGAIN_S = 0.002
ERROR_HANDLING = "TORCH_NCCL_ASYNC_ERROR_HANDLING"
WATCHDOG_FACTOR = 10  # NCCL's own watchdog ends the process: it must never be the first


def open_store() -> Any:
    """A rendezvous store on this host and a free port, for the epoch's members to meet in."""
    return dist.TCPStore("0.0.0.0", 0, is_master=True, wait_for_workers=False)


class Communicator:
    """Blocking calls: run them on a thread of their own. An error leaves it unusable: close it."""

    def __init__(self, epoch: TransferEpoch, rank: int) -> None:
        """Meet the other members; raises when they do not come before the deadline."""
        self.epoch = epoch
        self.rank = rank
        self._lock = threading.Lock()
        self._in_flight = 0  # collectives begun and not finished
        self._closed = False
        timeout = timedelta(seconds=epoch.deadline_s)
        store = dist.TCPStore(epoch.address, epoch.port, is_master=False, timeout=timeout)
        self._store = dist.PrefixStore(f"epoch-{epoch.number}", store)
        self._group: Any = self._make_group(timeout)
        if epoch.backend == "nccl":  # which meets in its first collective, gloo when it is made
            self._meet_by_broadcast(torch.cuda.current_device())

    def _meet_by_broadcast(self, device: int) -> None:
        """NCCL waits for its peers inside a call without a deadline: on a thread of its own, which
        is left behind when the epoch's deadline has passed."""
        outcome: Future[None] = Future()

        def meet() -> None:
            try:
                self._first_broadcast(device)
                outcome.set_result(None)
            except BaseException as error:
                outcome.set_exception(error)

        threading.Thread(target=meet, name="weights-meeting", daemon=True).start()
        try:
            outcome.result(self.epoch.deadline_s)
        except TimeoutError:
            with self._lock:
                self._closed = True  # its group goes when that thread comes back
            raise RuntimeError(
                f"rank {self.rank}: the {self.epoch.world_size} members of epoch "
                f"{self.epoch.number} did not meet within {self.epoch.deadline_s:g} s (NCCL)"
            ) from None

    def _first_broadcast(self, device: int) -> None:
        self.broadcast(torch.zeros(1, dtype=torch.uint8, device=f"cuda:{device}"))

    def _make_group(self, timeout: timedelta) -> Any:
        size = self.epoch.world_size
        if self.epoch.backend == "gloo":
            options = dist.ProcessGroupGloo._Options()
            options._devices = [dist.ProcessGroupGloo.create_default_device()]
            options._timeout = timeout
            # A collective's deadline counts from when a thread takes it up: none may queue.
            options._threads = IN_FLIGHT
            return dist.ProcessGroupGloo(self._store, self.rank, size, options)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = WATCHDOG_FACTOR * timeout
        with _errors_are_ours():
            return dist.ProcessGroupNCCL(self._store, self.rank, size, options)

    def broadcast(self, tensor: Tensor, within_s: float | None = None) -> None:
        """Broadcast from rank 0 in place; returns when this member's part is done, raises
        RuntimeError after `within_s` (default: the epoch's deadline)."""
        self.begin(tensor, within_s)()

    def begin(self, tensor: Tensor, within_s: float | None = None) -> Callable[[], None]:
        """The same without waiting: what is returned waits, and must be called, in order."""
        seconds = self.epoch.deadline_s if within_s is None else within_s
        seconds = max(seconds, SHORTEST_WAIT_S)
        end = time.monotonic() + seconds
        options = dist.BroadcastOptions()
        options.rootRank = 0
        if self.epoch.backend == "gloo":
            options.timeout = timedelta(seconds=seconds)
        group = self._enter()
        try:
            work = group.broadcast([tensor], options)
        except BaseException:
            del group
            self._leave()
            raise

        def finish() -> None:
            nonlocal group, work
            try:
                left_s = max(end - time.monotonic(), SHORTEST_WAIT_S)
                if self.epoch.backend == "gloo":
                    work.wait(timedelta(seconds=left_s))
                else:
                    wait_or_abort(work, left_s, group.abort)
                    torch.cuda.current_stream(tensor.device).synchronize()
            finally:
                group = work = None
                self._leave()

        return finish

    def close(self) -> None:
        """Returns at once. A collective still pending on another thread ends with an error: NCCL's
        by abort, gloo's at its own deadline."""
        with self._lock:
            self._closed = True
            if self._group is not None and self.epoch.backend == "nccl":
                self._group.abort()
            self._drop_unless_needed()

    def _enter(self) -> Any:
        with self._lock:
            if self._group is None or self._closed:
                raise RuntimeError(f"the communicator of epoch {self.epoch.number} is closed")
            self._in_flight += 1
            return self._group

    def _leave(self) -> None:
        with self._lock:
            self._in_flight -= 1
            if self._closed:
                self._drop_unless_needed()

    def _drop_unless_needed(self) -> None:
        """Destroying a gloo group waits for what its threads still do: a thread of its own does."""
        if self._in_flight or self._group is None:
            return
        held, self._group = [self._group], None
        threading.Thread(target=held.clear, name="weights-reaper", daemon=True).start()


@contextmanager
def _errors_are_ours() -> Iterator[None]:
    """A NCCL group made in here reports errors to who waits; else its watchdog takes the process
    down with any."""
    before = os.environ.get(ERROR_HANDLING)
    os.environ[ERROR_HANDLING] = "0"
    try:
        yield
    finally:
        if before is None:
            del os.environ[ERROR_HANDLING]
        else:
            os.environ[ERROR_HANDLING] = before


class BrokenWire(RuntimeError):
    """A broadcast of a transfer failed: `what` it held, and `cause`."""

    def __init__(self, what: str, cause: Exception) -> None:
        super().__init__(f"{what}: {cause}")
        self.what = what
        self.cause = cause


class Wire:
    """The broadcasts of one transfer, up to IN_FLIGHT at once: one alone leaves the wire idle while
    the processes at its ends come to themselves. All end by the transfer's one deadline."""

    def __init__(self, communicator: Communicator) -> None:
        self._communicator = communicator
        self._end = time.monotonic() + communicator.epoch.deadline_s
        self._begun: deque[tuple[str, Callable[[], None]]] = deque()

    @property
    def full(self) -> bool:
        """Whether one must be finished before the next one may begin."""
        return len(self._begun) == IN_FLIGHT

    @property
    def under_way(self) -> bool:
        return bool(self._begun)

    def begin(self, tensor: Tensor, what: str) -> None:
        """BrokenWire when it cannot; `tensor` is the wire's until it is finished."""
        left_s = self._end - time.monotonic()
        try:
            if left_s <= 0:
                raise TimeoutError("the transfer's deadline has passed")
            self._begun.append((what, self._communicator.begin(tensor, left_s)))
        except (RuntimeError, TimeoutError) as error:
            raise BrokenWire(what, error) from error

    def finish(self) -> None:
        """Wait for the oldest; BrokenWire."""
        what, finish = self._begun.popleft()
        try:
            finish()
        except RuntimeError as error:
            raise BrokenWire(what, error) from error

    def abandon(self) -> None:
        """Wait for what is still under way after a failure, which ends it as well."""
        while self._begun:
            with suppress(BrokenWire):
                self.finish()

    def __enter__(self) -> Wire:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """After a failure nothing is left under way, and of a wire that broke the communicator is
        closed: its members are no more at the same place."""
        if kind is not None and (self._begun or issubclass(kind, BrokenWire)):
            self.abandon()
            self._communicator.close()


def wait_or_abort(work: Any, seconds: float, abort: Callable[[], None]) -> None:
    """Wait for an NCCL collective on the host; abort it and raise RuntimeError after `seconds`, or
    when it has failed, which counts as completed: its stream would then be waited for without end.

    Its own `wait(timeout)` orders streams and returns: the deadline would be the watchdog's, which
    takes the process down.
    """
    end = time.monotonic() + seconds
    while not work.is_completed():
        if time.monotonic() > end:
            abort()
            raise RuntimeError(f"no answer from a peer within {seconds:g} s (NCCL, aborted)")
        time.sleep(LOOK_AGAIN_S)
    if not work.is_success():
        abort()
        raise RuntimeError("lost a peer (NCCL, aborted)")
    work.wait()
