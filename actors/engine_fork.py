"""A CPU engine's process is forked from a server that imported vLLM beside its actor.

vLLM imports for a dozen seconds, first in the actor and then, in a spawned process, again. The
standard library's fork server takes the second import off the path. Not for GPUs (an engine there
loads for minutes and CUDA refuses forks) nor for tensor parallelism, whose workers are spawned.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path

IMPORTS = [
    "vllm.v1.engine.core",
    "vllm.v1.executor.uniproc_executor",
    "vllm.v1.worker.cpu_worker",
]


def begin_imports() -> None:
    """Start the server, which inherits this process's environment; returns at once."""
    libraries = [os.environ.get("LD_PRELOAD", ""), *_allocator()]
    os.environ["LD_PRELOAD"] = ":".join(filter(None, libraries))
    multiprocessing.set_forkserver_preload(IMPORTS)
    forkserver.ensure_running()


def fork_engines() -> None:
    """Make vLLM fork from the server: its environment variable admits "fork" and "spawn" alone."""
    import vllm.envs

    vllm.envs.VLLM_WORKER_MULTIPROC_METHOD = "forkserver"  # pyright: ignore


def _allocator() -> list[str]:
    """vLLM's tcmalloc, where its build brings one: vLLM preloads it into what it spawns."""
    package = importlib.util.find_spec("vllm")
    assert package is not None and package.submodule_search_locations
    found = Path(package.submodule_search_locations[0]).glob("libs/libtcmalloc_minimal*.so*")
    return [str(path) for path in sorted(found)[:1]]
