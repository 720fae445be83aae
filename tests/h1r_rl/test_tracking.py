"""Logging never blocks, never ends a run, and loses nothing that metrics.jsonl does not have."""

import json
import multiprocessing
import threading
import time

import numpy as np
import pytest

import h1r_rl.tracking as tracking
from h1r_rl.config.schema import TrackingConfig
from h1r_rl.errors import ConfigError
from h1r_rl.tracking import Tracker


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """One SQLite store for the module: creating its tables takes seconds."""
    return TrackingConfig(uri=f"sqlite:///{tmp_path_factory.mktemp('store') / 'mlflow.db'}")


@pytest.fixture()
def start(store, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # artifacts of a SQLite store go to the working folder

    def make(**changes):
        return Tracker.start(
            store, **({"run_name": "r", "folder": tmp_path, "stage": "grpo"} | changes)
        )

    return make


def client_of(store):
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=store.uri)


def test_what_a_killed_process_left_open_is_ended(start, store):
    """A stage's own run after its process was killed; a whole command's at the next one. What has
    ended keeps its outcome, and nobody else's run is touched."""
    client = client_of(store)

    def status(tracker):
        return client.get_run(tracker.run_id).info.status

    earlier, stranger = start(), start()
    its_stage = start(parent_run_id=earlier.run_id)
    parent = start()
    killed, done = (start(parent_run_id=parent.run_id) for _ in range(2))
    done.end("FINISHED")
    parent.end_left_open("FAILED", earlier=earlier.run_id)
    parent.end_left_open("FAILED", earlier="0" * 32)  # gone with its store
    parent.end_left_open("KILLED")
    parent.end("KILLED")
    assert parent.num_failures == 0
    assert [status(t) for t in (killed, done, parent)] == ["KILLED", "FINISHED", "KILLED"]
    assert [status(t) for t in (earlier, its_stage, stranger)] == ["FAILED", "FAILED", "RUNNING"]


def test_everything_arrives(start, store, tmp_path):
    tracker = start()
    for step in range(3):
        tracker.log_step(step, {"reward/mean": step / 2, "odd key@1": np.float32(step)})
    tracker.log_params(
        {"grpo": {"steps": 3, "optimizer": {"betas": [0.9, 0.95]}}, "long": "x" * 999}
    )
    tracker.log_table("samples", [{"prompt": "1+1", "score": 1.0}, {"prompt": "2", "extra": "e"}])
    (tmp_path / "report.md").write_text("hello")
    tracker.log_artifact(tmp_path / "report.md")
    tracker.set_tag("model", "/somewhere/model")
    tracker.end("FINISHED")
    client = client_of(store)
    run = client.get_run(tracker.run_id)
    assert tracker.num_failures == 0 and run.info.status == "FINISHED"
    history = client.get_metric_history(tracker.run_id, "reward/mean")
    assert sorted((m.step, m.value) for m in history) == [(0, 0.0), (1, 0.5), (2, 1.0)]
    assert run.data.metrics["odd key_1"] == 2
    assert run.data.params["grpo.optimizer.betas"] == "[0.9, 0.95]"
    assert len(run.data.params["long"]) == 500 and run.data.tags["model"] == "/somewhere/model"
    assert {f.path for f in client.list_artifacts(tracker.run_id)} == {"report.md", "samples.json"}
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines[2] == {"stage": "grpo", "step": 2, "reward/mean": 1.0, "odd key@1": 2.0}


@pytest.mark.parametrize("status", ["FAILED", "KILLED"])
def test_a_run_ends_with_its_own_status(start, store, status):
    tracker = start()
    tracker.log_step(0, {"a": 1.0})
    tracker.end(status)
    run = client_of(store).get_run(tracker.run_id)
    assert run.info.status == status and run.data.metrics == {"a": 1.0}


def stage_process(config, folder, parent, name):
    tracker = Tracker.start(config, run_name=name, folder=folder, stage=name, parent_run_id=parent)
    for step in range(20):
        tracker.log_step(step, {"value": step})
    tracker.end("FINISHED")
    assert tracker.num_failures == 0


def test_stages_in_other_processes_are_children(start, store, tmp_path):
    parent = start(stage="run")
    context = multiprocessing.get_context("spawn")
    stages = [
        context.Process(target=stage_process, args=(store, tmp_path, parent.run_id, name))
        for name in ("sft", "grpo")
    ]
    for stage in stages:
        stage.start()
    for step in range(20):  # the parent writes meanwhile
        parent.log_step(step, {"value": step})
    for stage in stages:
        stage.join(60)
    parent.end("FINISHED")
    assert [stage.exitcode for stage in stages] == [0, 0] and parent.num_failures == 0
    client = client_of(store)
    experiment = client.get_experiment_by_name(store.experiment)
    children = client.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    )
    assert {run.info.run_name for run in children} == {"sft", "grpo"}
    assert all(run.data.metrics["value"] == 19 for run in children)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 60  # no line of one process tore another's


def test_unreachable_server_is_an_error_at_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
    config = TrackingConfig(uri="http://127.0.0.1:9")
    begun = time.monotonic()
    with pytest.raises(ConfigError, match="expected a reachable MLflow store, found 'http://127"):
        Tracker.start(config, run_name="r", folder=tmp_path / "run", stage="sft")
    assert time.monotonic() - begun < 20 and not (tmp_path / "run").exists()


class StubClient:
    """A store that fails or hangs on metrics."""

    def __init__(self, hang=None):
        self.hang = hang
        self.status = None

    def log_batch(self, *_, **__):
        if self.hang is None:
            raise OSError("store is gone")
        self.hang.wait(10)

    def set_terminated(self, _, status):
        self.status = status


def test_a_store_that_fails_later_is_said_once(tmp_path, caplog):
    tracker = Tracker(StubClient(), "id", tmp_path, "grpo")
    for step in range(5):
        tracker.log_step(step, {"a": 1.0})
    tracker.end("FINISHED")
    assert tracker.num_failures == 5 and tracker._client.status == "FINISHED"
    assert sum("the run goes on" in record.message for record in caplog.records) == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 5


def test_steps_share_a_request_and_stand_before_what_came_after_them(tmp_path, monkeypatch):
    monkeypatch.setattr(tracking, "TOGETHER_S", 0.2)
    client, written = StubClient(), []
    client.log_batch = lambda _, metrics: written.append([(m.key, m.step) for m in metrics])
    client.set_tag = lambda *_: written.append("tag")
    tracker = Tracker(client, "id", tmp_path, "grpo")
    for step in range(3):
        tracker.log_step(step, {"a": 1.0, "b": 2.0})
    tracker.set_tag("after", "them")
    tracker.log_step(3, {"a": 1.0})
    deadline = time.monotonic() + 10
    while len(written) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    together = [(key, step) for step in range(3) for key in "ab"]
    assert written == [together, "tag", [("a", 3)]]  # the last one by itself, in its time
    tracker.end("FINISHED")
    assert len(written) == 3


def test_a_slow_store_neither_blocks_the_loop_nor_costs_the_status(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(tracking, "FLUSH_DEADLINE_S", 0.3)
    hang = threading.Event()
    tracker = Tracker(StubClient(hang), "id", tmp_path, "grpo")
    begun = time.monotonic()
    many = dict.fromkeys(map(str, range(tracking.MOST_TOGETHER)), 1.0)  # a request each
    for step in range(100):
        tracker.log_step(step, many)
    assert time.monotonic() - begun < 2
    threading.Timer(0.6, hang.set).start()  # the call in flight comes back after the deadline
    tracker.end("KILLED")
    assert tracker._client.status == "KILLED" and "99 entries are in metrics.jsonl" in caplog.text
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 100
