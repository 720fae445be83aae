"""An engine and a learner's rank 0 as processes of their own, without a model and without Ray: the
real receiver and the real sender around plain tensors, called over a pipe in the manner of Ray's
actors (`handle.method.remote(...)`, Ray's own errors)."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import torch

from actors.staged_transfer import StagedTransfer
from h1r_rl.broadcast import Communicator, open_store
from h1r_rl.errors import WeightTransferError
from h1r_rl.weight_manifest import TransferEpoch, WeightManifest, checksum

LAYERS = 6
COMMIT_S = 0.3  # a real engine pauses and loads
BUCKET_BYTES = 10_000  # a layer's matrix is 16 KiB
# Processes fork from a server that has torch already: a replacement is there at once.
PROCESSES = multiprocessing.get_context("forkserver")
PROCESSES.set_forkserver_preload(["torch", "actors.staged_transfer", "learners.weight_sender"])


class Handle:
    """A process as the pool and the learner group see an actor. `kill` is `ray.kill`'s part."""

    def __init__(self, kind: type, *args: Any) -> None:
        self._pipe, theirs = PROCESSES.Pipe()
        self._process = PROCESSES.Process(target=_host, args=(theirs, kind, args), daemon=True)
        self._process.start()
        theirs.close()
        self._lock = threading.Lock()
        self._waiting: dict[int, tuple[str, Future[Any]]] = {}
        self._count, self._dead = 0, False
        threading.Thread(target=self._read, daemon=True).start()

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def kill(self) -> None:
        self._process.kill()

    def __getattr__(self, method: str) -> SimpleNamespace:
        return SimpleNamespace(remote=lambda *args, **kwargs: self._call(method, args, kwargs))

    def _call(self, method: str, args: Any, kwargs: Any) -> asyncio.Future[Any]:
        from ray.exceptions import RayActorError

        answer: Future[Any] = Future()
        with self._lock:
            self._count += 1
            try:
                if self._dead:
                    raise BrokenPipeError
                self._waiting[self._count] = (method, answer)
                self._pipe.send((self._count, method, args, kwargs))
            except OSError:
                self._waiting.pop(self._count, None)
                answer.set_exception(RayActorError())
        return asyncio.wrap_future(answer)

    def _read(self) -> None:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            while True:
                number, value, error = self._pipe.recv()
                method, answer = self._waiting.pop(number)
                if not answer.set_running_or_notify_cancel():
                    continue  # nobody waits any more
                if error is None:
                    answer.set_result(value)
                else:
                    task_error = RayTaskError(method, "", error)
                    answer.set_exception(task_error.as_instanceof_cause())
        except (EOFError, OSError):
            with self._lock:
                self._dead, waiting = True, list(self._waiting.values())
        for _, answer in waiting:
            if answer.set_running_or_notify_cancel():
                answer.set_exception(RayActorError())


def _host(pipe: Connection, kind: type, args: tuple[Any, ...]) -> None:
    """Serve calls until the other side is gone: coroutines beside each other, functions one after
    another on a thread."""
    torch.set_num_threads(1)
    service, loop, thread = kind(*args), asyncio.new_event_loop(), ThreadPoolExecutor(1)
    sending = threading.Lock()

    async def call(number: int, method: str, args: Any, kwargs: Any) -> None:
        function, value, error = getattr(service, method), None, None
        try:
            if asyncio.iscoroutinefunction(function):
                value = await function(*args, **kwargs)
            else:
                value = await loop.run_in_executor(thread, lambda: function(*args, **kwargs))
        except Exception as raised:
            error = raised
        with sending:
            pipe.send((number, value, error))

    threading.Thread(target=loop.run_forever, daemon=True).start()
    try:
        while True:
            asyncio.run_coroutine_threadsafe(call(*pipe.recv()), loop)
    except (EOFError, OSError):
        os._exit(0)


def model(version: int) -> torch.nn.Module:
    """Every version's parameters differ from every other's."""
    torch.manual_seed(version)
    return torch.nn.Sequential(*(torch.nn.Linear(64, 64) for _ in range(LAYERS)))


def digest(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    return {
        n: checksum(t.detach().contiguous().view(torch.uint8).flatten().numpy())
        for n, t in tensors.items()
    }


class PlainEngine:
    """The part of RolloutActor that a weight transfer talks to."""

    def __init__(self, name: str) -> None:
        self._name, self._version = name, "0"
        self._transfer: StagedTransfer | None = None
        self._held: dict[str, int] = {}

    async def start(self, *_: Any, **__: Any) -> None: ...

    async def facts(self) -> dict[str, Any]:
        return {"pid": os.getpid(), "version": self._version, "held": self._held}

    async def version(self) -> str:
        return self._version

    async def join_epoch(self, epoch: TransferEpoch) -> None:
        if self._transfer is not None:
            self._transfer.close()
        rank = epoch.rank_offsets[self._name]
        self._deadline_s = epoch.deadline_s
        self._transfer = StagedTransfer(epoch, rank, torch.device("cpu"))
        await self.staged()

    async def begin_receive(self, manifest: WeightManifest) -> None:
        assert self._transfer is not None
        self._transfer.begin(manifest)

    async def staged(self) -> None:
        assert self._transfer is not None
        end = time.monotonic() + self._deadline_s + 1
        while (outcome := self._transfer.outcome()) == "running":  # noqa: ASYNC110
            if time.monotonic() > end:
                raise WeightTransferError(f"{self._name}: not complete in time", (self._name,))
            await asyncio.sleep(0.01)
        if outcome != "done":
            raise WeightTransferError(f"{self._name}, receiving weights: {outcome}", (self._name,))

    async def commit(self, version: str) -> float:
        assert self._transfer is not None
        taken = self._transfer.take()
        await asyncio.sleep(COMMIT_S)
        self._held, self._version = digest(taken), version
        return 0.0

    async def close(self) -> None: ...


class PlainLearner:
    """The part of LearnerActor that a weight transfer talks to; a bucket takes `bucket_s`."""

    def __init__(
        self, deadline_s: float, bucket_s: float, folders: tuple[str, ...] = (), bucket: int = 0
    ) -> None:
        """`folders`: real models that the versions take turns in, for real engines."""
        self._deadline_s, self._bucket_s, self._version = deadline_s, bucket_s, 0
        self._folders, self._bucket_bytes = folders, bucket or BUCKET_BYTES
        self._communicator: Any = None

    def update(self, version: int) -> dict[str, int]:
        self._version = version
        return digest(dict(self._model().named_parameters()))

    def weight_manifest(self) -> WeightManifest:
        from learners.weight_sender import manifest_of

        return manifest_of(self._model(), self._bucket_bytes)

    def _model(self) -> torch.nn.Module:
        if not self._folders:
            return model(self._version)
        from transformers import AutoModelForCausalLM

        folder = self._folders[self._version % len(self._folders)]
        return AutoModelForCausalLM.from_pretrained(folder, dtype="float32")

    def open_epoch(self, number: int, offsets: dict[str, int], size: int) -> TransferEpoch:
        if self._communicator is not None:
            self._communicator.close()
        self._store = open_store()
        return TransferEpoch(
            number, "gloo", "127.0.0.1", self._store.port, size, offsets, self._deadline_s
        )

    def join_epoch(self, epoch: TransferEpoch) -> None:
        self._communicator = Communicator(epoch, 0)
        begin, pause_s = self._communicator.begin, self._bucket_s

        def slow(tensor: torch.Tensor, within_s: float) -> Callable[[], None]:
            time.sleep(pause_s)
            return begin(tensor, within_s)

        self._communicator.begin = slow

    def send(self) -> dict[str, float]:
        from learners.weight_sender import manifest_of, send_weights

        policy = self._model()
        manifest = manifest_of(policy, self._bucket_bytes)
        return send_weights(policy, manifest, self._communicator, sharded=False)

    def close(self) -> None: ...
