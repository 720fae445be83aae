"""Metrics, tables and files to MLflow, beside the loop and never in its way.

Invariant: `log_step` returns at once; a thread writes, the steps of TOGETHER_S in one request: ten
are little more work than one, and on a small machine that work is taken from the learner. Every
step also goes to metrics.jsonl in the run folder, which needs no server. A store that cannot be
reached at the start is an error; one that fails later is counted and said once.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import re
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

from h1r_rl.config.schema import TrackingConfig
from h1r_rl.errors import ConfigError

logger = logging.getLogger(__name__)

FLUSH_DEADLINE_S = 30.0
SHOWN_CHARS = 200  # of what MLflow says
CLOSE_DEADLINE_S = 5.0  # for the status alone, once the metrics had their time
TOGETHER_S = 2.0
MOST_TOGETHER = 500  # metrics; MLflow takes 1,000 in a request
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "GIT_PYTHON_REFRESH": "quiet",
    # MLflow's own defaults retry an unreachable server for minutes before they say so.
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "2",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
}
Status = Literal["FINISHED", "FAILED", "KILLED"]


class Tracker:
    def __init__(self, client: Any, run_id: str, folder: Path, stage: str) -> None:
        self.run_id = run_id
        self.num_failures = 0
        self._client = client
        self._stage = stage
        self._file = (folder / "metrics.jsonl").open("a", buffering=1)
        self._queue: queue.Queue[Callable[[], None] | list[Any] | None] = queue.Queue()
        self._steps: list[list[Any]] = []  # taken from the queue and not written yet
        self._thread = threading.Thread(target=self._work, name="tracking", daemon=True)
        self._thread.start()

    @classmethod
    def start(
        cls,
        config: TrackingConfig,
        *,
        run_name: str,
        folder: Path,
        stage: str,
        parent_run_id: str | None = None,
    ) -> Tracker:
        """Open a run (a child of `parent_run_id` if given). Raises ConfigError without a store."""
        for name, value in ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        from mlflow.tracking import MlflowClient

        try:
            client = MlflowClient(tracking_uri=config.uri)
            experiment_id = _experiment_id(client, config.experiment)
            tags = {"mlflow.parentRunId": parent_run_id} if parent_run_id else {}
            run = client.create_run(experiment_id, run_name=run_name, tags=tags)
        except Exception as error:
            why = " ".join(str(error).split())[:SHOWN_CHARS]
            raise ConfigError(
                f"tracking.uri: expected a reachable MLflow store, found {config.uri!r} "
                f"({why}); start the server or use sqlite:///mlflow.db"
            ) from error
        folder.mkdir(parents=True, exist_ok=True)
        return cls(client, run.info.run_id, folder, stage)

    def log_step(self, step: int, metrics: dict[str, float]) -> None:
        from mlflow.entities import Metric

        values = {name: float(value) for name, value in metrics.items()}
        self._file.write(json.dumps({"stage": self._stage, "step": step, **values}) + "\n")
        now = int(time.time() * 1000)
        self._queue.put([Metric(_key(k), v, now, step) for k, v in values.items()])

    def log_params(self, params: dict[str, Any]) -> None:
        """Nested settings as `section.field`."""
        self._queue.put(lambda: self._log_params(_flatten(params)))

    def log_table(self, name: str, rows: list[dict[str, Any]]) -> None:
        keys = dict.fromkeys(key for row in rows for key in row)
        columns = {key: [row.get(key) for row in rows] for key in keys}
        self._queue.put(lambda: self._client.log_table(self.run_id, columns, f"{name}.json"))

    def log_artifact(self, path: Path, *, under: str | None = None) -> None:
        self._queue.put(lambda: self._client.log_artifact(self.run_id, str(path), under))

    def set_tag(self, name: str, value: str) -> None:
        self._queue.put(lambda: self._client.set_tag(self.run_id, name, value))

    def end_left_open(self, status: Status, *, earlier: str | None = None) -> None:
        """Close what killed processes left RUNNING: this run's children, or the run `earlier` (of
        a command before this one, which may be gone from the store) and its children."""
        queries = [f"tags.`mlflow.parentRunId` = '{earlier or self.run_id}'"]
        if earlier is not None:
            queries.append(f"attributes.run_id = '{earlier}'")
        self._queue.put(lambda: self._end_running(queries, status))

    def end(self, status: Status) -> None:
        """Write what is queued, under a deadline, and close the run; the status goes last.

        A store too slow for the backlog loses metrics (metrics.jsonl has them), not the status.
        """
        self._close_run(status)
        self._thread.join(FLUSH_DEADLINE_S)
        if self._thread.is_alive():
            dropped = self._drop_queued()
            self._close_run(status)
            self._thread.join(CLOSE_DEADLINE_S)
            logger.warning(
                "MLflow did not take everything within %g s: %d entries are in metrics.jsonl only",
                FLUSH_DEADLINE_S,
                dropped,
            )
        if self.num_failures:
            logger.warning("MLflow refused %d entries in all", self.num_failures)
        self._file.close()

    def _end_running(self, queries: list[str], status: Status) -> None:
        experiment_id = self._client.get_run(self.run_id).info.experiment_id
        for query in queries:
            for run in self._client.search_runs([experiment_id], query):
                if run.info.status == "RUNNING":
                    self._client.set_terminated(run.info.run_id, status)

    def _close_run(self, status: Status) -> None:
        self._queue.put(lambda: self._client.set_terminated(self.run_id, status))
        self._queue.put(None)

    def _drop_queued(self) -> int:
        dropped, self._steps = len(self._steps), []
        try:
            while True:
                self._queue.get_nowait()
                dropped += 1
        except queue.Empty:
            return max(dropped - 2, 0)  # without the status and the end mark

    def _work(self) -> None:
        due = 0.0
        while True:
            try:
                left_s = max(due - time.monotonic(), 0) if self._steps else None
                task = self._queue.get(timeout=left_s)
            except queue.Empty:
                self._write_steps()
                continue
            if isinstance(task, list):
                if sum(map(len, self._steps)) + len(task) > MOST_TOGETHER:
                    self._write_steps(followed_by=[task])
                else:
                    self._steps.append(task)
                if len(self._steps) == 1:
                    due = time.monotonic() + TOGETHER_S
                continue
            self._write_steps()  # what came before it is written before it
            if task is None:
                return
            self._write(task, 1)

    def _write_steps(self, *, followed_by: Sequence[list[Any]] = ()) -> None:
        steps, self._steps = self._steps, list(followed_by)
        if steps:
            metrics = [metric for step in steps for metric in step]
            self._write(lambda: self._client.log_batch(self.run_id, metrics=metrics), len(steps))

    def _write(self, task: Callable[[], None], entries: int) -> None:
        try:
            task()
        except Exception as error:
            if self.num_failures == 0:
                logger.warning("MLflow logging failed (the run goes on): %s", error)
            self.num_failures += entries

    def _log_params(self, params: dict[str, str]) -> None:
        from mlflow.entities import Param

        entries = [Param(_key(k), v[:500]) for k, v in params.items()]
        for start in range(0, len(entries), 100):
            self._client.log_batch(self.run_id, params=entries[start : start + 100])


def _experiment_id(client: Any, name: str) -> str:
    """The experiment's id, made if need be; two runs may start at once."""
    experiment = client.get_experiment_by_name(name)
    if experiment is not None:
        return experiment.experiment_id
    try:
        return client.create_experiment(name)
    except Exception:
        experiment = client.get_experiment_by_name(name)
        if experiment is None:
            raise
        return experiment.experiment_id


def _key(name: str) -> str:
    """MLflow takes letters, digits, _ - . / space and :."""
    return re.sub(r"[^\w\-./ :]", "_", name)


def _flatten(params: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in params.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = str(value)
    return flat
