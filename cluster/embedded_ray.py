"""The cluster of a run: one that is there, or Ray started inside the command line's process.

Invariant: an embedded Ray is shut down whatever way its run ends, and takes no other cluster's
ports and no signal that is meant for the command line.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, partialmethod

from cluster.check_machine import check_port
from h1r_rl.config.checks import embedded_cpus
from h1r_rl.config.schema import ClusterConfig

JOB_STOP_GRACE_S = 50  # a stopped stage closes engines and learners in order; Ray's default is 3 s


@dataclass(frozen=True)
class Cluster:
    """Where to submit jobs; `gcs_address` of an embedded Ray, which its jobs must be told.

    Ray tells a job "auto" instead, which on a machine with several clusters is any of them.
    """

    jobs_address: str
    gcs_address: str | None = None


@contextmanager
def ray_cluster(config: ClusterConfig) -> Iterator[Cluster]:
    """The run's cluster, an embedded one where the address is `local`."""
    if config.address != "local":
        yield Cluster(config.address)
        return
    import ray

    os.environ["RAY_JOB_STOP_WAIT_TIME_S"] = str(JOB_STOP_GRACE_S)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    check_port(config.dashboard_port)
    with _any_agent_port(), _own_process_groups():
        context = ray.init(
            address="local",
            num_cpus=embedded_cpus(config),
            include_dashboard=True,
            dashboard_port=config.dashboard_port or _free_port(),
            log_to_driver=False,
            logging_level="warning",
        )
    try:
        yield Cluster(f"http://{context.dashboard_url}", context.address_info["gcs_address"])
    finally:
        ray.shutdown()


@contextmanager
def _any_agent_port() -> Iterator[None]:
    """`ray start` takes a port for the agent that runs jobs, `ray.init` (2.60) always asks for the
    same one: a second cluster on a machine comes up without an agent and takes no job."""
    from ray._private.parameter import RayParams

    original = RayParams.__init__
    RayParams.__init__ = partialmethod(original, dashboard_agent_listen_port=0)
    try:
        yield
    finally:
        RayParams.__init__ = original


@contextmanager
def _own_process_groups() -> Iterator[None]:
    """A terminal's Ctrl-C goes to its whole foreground group. Ray blocks it in what it starts, but
    the dashboard's multiprocessing unblocks it: the part that stops jobs would die of it, and the
    request to stop one would never be answered."""
    from ray._private import services

    original = services.ConsolePopen
    services.ConsolePopen = partial(original, process_group=0)
    try:
        yield
    finally:
        services.ConsolePopen = original


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
