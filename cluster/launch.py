"""Stages as Ray jobs: submit, watch, stop.

Invariant: a local run and a remote one differ in the address alone; whatever way a run ends, its
job is stopped; no request waits for ever, and a Jobs endpoint that is silent for a while (a busy
head node, a broken connection) costs nothing but that while.
"""

from __future__ import annotations

import logging
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cluster.embedded_ray import JOB_STOP_GRACE_S, Cluster
from cluster.run_folder import RunFolder
from h1r_rl.errors import ConfigError, RunFailed, UserError

logger = logging.getLogger(__name__)

POLL_S = 0.5
REQUEST_DEADLINE_S = 30.0
SILENCE_DEADLINE_S = 120.0
STOP_DEADLINE_S = JOB_STOP_GRACE_S + 10.0
SUBMIT_DEADLINE_S = 120.0


def jobs_client(address: str) -> Any:
    """A client of the Jobs API whose every request has a deadline (Ray's own have none).

    It shows this user's Ray token where there is one, as `ray.init` does: a cluster that was
    started beside a token asks for it.
    """
    from ray._private.authentication.authentication_token_setup import (
        maybe_enable_token_auth_if_token_available,
    )
    from ray.job_submission import JobSubmissionClient

    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)

    class Client(JobSubmissionClient):
        def _do_request(self, *words: Any, **options: Any) -> Any:
            return super()._do_request(*words, **({"timeout": REQUEST_DEADLINE_S} | options))

    try:
        return Client(address)
    except Exception as error:
        raise ConfigError(
            f"cluster.address: expected a Ray Jobs endpoint, found {address} "
            f"({error}); start the cluster, or use address: local"
        ) from error


def run_stage(
    cluster: Cluster,
    stage: str,
    folder: RunFolder,
    parent_run_id: str | None,
    *,
    on_poll: Callable[[], None],
) -> None:
    """Submit one stage and wait for its end; `on_poll` redraws progress."""
    client = jobs_client(cluster.jobs_address)
    (folder.path / "error.json").unlink(missing_ok=True)
    path = str(folder.path.resolve())
    where = ["env", f"RAY_ADDRESS={cluster.gcs_address}"] if cluster.gcs_address else []
    python = sys.executable if cluster.gcs_address else "python"
    words = [stage, path, *filter(None, [parent_run_id])]
    command = shlex.join([*where, python, "-m", "cluster.stage_main", *words])
    # Ray runs it in a shell: without `exec`, a shell killed by itself leaves the stage behind.
    job = _submit(client, f"exec {command}")
    try:
        status = _wait(client, job, on_poll)
    except BaseException:
        _stop(client, job)
        raise
    finally:
        (folder.path / f"{stage}.log").write_text(_logs(client, job))
    if status.value != "SUCCEEDED":
        raise _failure(stage, folder, client, job)


def _wait(client: Any, job: str, on_poll: Callable[[], None]) -> Any:
    """The job's last status."""
    answered = time.monotonic()
    while True:
        try:
            status = client.get_job_status(job)
        except (OSError, RuntimeError) as error:
            if time.monotonic() - answered > SILENCE_DEADLINE_S:
                raise RunFailed(
                    f"the cluster has not said for {SILENCE_DEADLINE_S:.0f} s how job {job} is "
                    f"({error}); see its head node, and `ray job status {job}`"
                ) from error
        else:
            answered = time.monotonic()
            if status.is_terminal():
                return status
        on_poll()
        time.sleep(POLL_S)


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
        cause = f"{_message(client, job)}; last output: {' | '.join(lines[-5:])}"
    return RunFailed(f"stage {stage} failed: {cause} (log: {folder.path / f'{stage}.log'})")


def _message(client: Any, job: str) -> str:
    try:
        return client.get_job_info(job).message
    except (OSError, RuntimeError) as error:
        return f"(the cluster does not say why: {error})"


def _stop(client: Any, job: str) -> None:
    deadline = time.monotonic() + STOP_DEADLINE_S
    try:
        client.stop_job(job)
        while not client.get_job_status(job).is_terminal() and time.monotonic() < deadline:
            time.sleep(POLL_S)
    except (OSError, RuntimeError) as error:
        logger.warning(
            "the cluster does not answer (%s): job %s may go on, unless the cluster ends with this "
            "run; to stop it: ray job stop %s", error, job, job,
        )  # fmt: skip


def _logs(client: Any, job: str) -> str:
    try:
        return client.get_job_logs(job)
    except (OSError, RuntimeError) as error:
        return f"(no log: {error})\n"


def resolved_path(path: Path) -> Path:
    return path.expanduser().resolve()
