"""Stages as Ray jobs: submit, watch, stop.

Invariant: a local run and a remote one differ in the address alone; whatever way a run ends, its
job is stopped and an embedded Ray is shut down.
"""

from __future__ import annotations

import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partialmethod
from pathlib import Path
from typing import Any

from cluster.check_machine import check_port
from cluster.run_folder import RunFolder
from h1r_rl.config.checks import embedded_cpus
from h1r_rl.config.schema import ClusterConfig
from h1r_rl.errors import ConfigError, RunFailed, UserError

POLL_S = 0.5
STOP_DEADLINE_S = 60.0
SUBMIT_DEADLINE_S = 120.0


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

    # A stopped stage closes engines and learners in order; Ray's default grace is 3 s.
    os.environ["RAY_JOB_STOP_WAIT_TIME_S"] = str(int(STOP_DEADLINE_S - 10))
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    check_port(config.dashboard_port)
    with _any_agent_port():
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


def run_stage(
    cluster: Cluster,
    stage: str,
    folder: RunFolder,
    parent_run_id: str | None,
    *,
    on_poll: Callable[[], None],
) -> None:
    """Submit one stage and wait for its end; `on_poll` redraws progress."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    try:
        client = JobSubmissionClient(cluster.jobs_address)
    except Exception as error:
        raise ConfigError(
            f"cluster.address: expected a Ray Jobs endpoint, found {cluster.jobs_address} "
            f"({error}); start the cluster, or use address: local"
        ) from error
    (folder.path / "error.json").unlink(missing_ok=True)
    path = str(folder.path.resolve())
    where = ["env", f"RAY_ADDRESS={cluster.gcs_address}"] if cluster.gcs_address else []
    python = sys.executable if cluster.gcs_address else "python"
    words = [stage, path, *filter(None, [parent_run_id])]
    job = _submit(client, shlex.join([*where, python, "-m", "cluster.stage_main", *words]))
    try:
        while not (status := client.get_job_status(job)).is_terminal():
            on_poll()
            time.sleep(POLL_S)
    except BaseException:
        _stop(client, job)
        raise
    finally:
        (folder.path / f"{stage}.log").write_text(_logs(client, job))
    if status is not JobStatus.SUCCEEDED:
        raise _failure(stage, folder, client, job)


def _submit(client: Any, command: str) -> str:
    """A cluster that has just started answers before its agents can run a job: ask again."""
    deadline = time.monotonic() + SUBMIT_DEADLINE_S
    while True:
        try:
            return client.submit_job(entrypoint=command)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise RunFailed(f"the cluster took no job: {error}") from error
            time.sleep(POLL_S)


def _failure(stage: str, folder: RunFolder, client: Any, job: str) -> Exception:
    import json

    file = folder.path / "error.json"
    if file.exists():
        error = json.loads(file.read_text())
        if error["code"] == 2:
            return UserError(error["message"])
        cause = error["message"]
    else:
        lines = _logs(client, job).strip().splitlines()
        cause = f"{client.get_job_info(job).message}; last output: {' | '.join(lines[-5:])}"
    return RunFailed(f"stage {stage} failed: {cause} (log: {folder.path / f'{stage}.log'})")


def _stop(client: Any, job: str) -> None:
    deadline = time.monotonic() + STOP_DEADLINE_S
    client.stop_job(job)
    while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
        time.sleep(POLL_S)


def _logs(client: Any, job: str) -> str:
    try:
        return client.get_job_logs(job)
    except RuntimeError as error:
        return f"(no log: {error})\n"


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def resolved_path(path: Path) -> Path:
    return path.expanduser().resolve()
