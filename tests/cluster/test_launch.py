"""An embedded cluster takes jobs whatever else runs on the machine; a Jobs endpoint that says
nothing holds nobody for ever."""

import socket
import subprocess
import sys

import pytest
from ray.job_submission import JobStatus

from cluster import launch
from h1r_rl.errors import ConfigError, RunFailed

AGENT_PORT = 52365  # Ray's fixed choice for the agent that runs jobs

SUBMIT = """
import os, signal, sys, time
from cluster.embedded_ray import ray_cluster
from cluster.launch import _submit, jobs_client
from h1r_rl.config.schema import ClusterConfig
with ray_cluster(ClusterConfig(num_cpus=1)) as cluster:
    client = jobs_client(cluster.jobs_address)
    signal.signal(signal.SIGINT, lambda *_: None)
    os.killpg(0, signal.SIGINT)  # as a terminal's Ctrl-C, which this process takes calmly
    time.sleep(1)
    job = _submit(client, f"{sys.executable} -c 'print(40 + 2)'")
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.2)
    print(client.get_job_status(job).value, "42" in client.get_job_logs(job))
"""


@pytest.mark.timeout(200)
def test_a_taken_agent_port_and_a_terminals_ctrl_c_do_not_matter():
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("0.0.0.0", AGENT_PORT))
            taken.listen()
        except OSError:
            pass  # another cluster has it already
        done = subprocess.run(
            [sys.executable, "-c", SUBMIT],
            capture_output=True,
            text=True,
            timeout=180,
            start_new_session=True,
        )
    assert done.stdout.split() == ["SUCCEEDED", "True"], done.stderr


def test_an_endpoint_that_never_answers_is_refused(monkeypatch):
    monkeypatch.setattr(launch, "REQUEST_DEADLINE_S", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        with pytest.raises(ConfigError, match="expected a Ray Jobs endpoint"):
            launch.jobs_client(f"http://127.0.0.1:{silent.getsockname()[1]}")


class Client:
    """Answers with these statuses, and fails where one is an exception."""

    def __init__(self, *statuses):
        self.statuses = list(statuses)

    def get_job_status(self, job):
        status = self.statuses.pop(0) if len(self.statuses) > 1 else self.statuses[0]
        if isinstance(status, Exception):
            raise status
        return status

    def stop_job(self, job):
        raise TimeoutError("silent")


def test_a_short_silence_costs_nothing_and_a_long_one_ends_the_run(monkeypatch, caplog):
    monkeypatch.setattr(launch, "POLL_S", 0.001)
    monkeypatch.setattr(launch, "SILENCE_DEADLINE_S", 0.2)
    lost, going = ConnectionError("no route"), JobStatus.RUNNING
    client = Client(going, lost, RuntimeError("busy"), going, lost, JobStatus.SUCCEEDED)
    polls = []
    assert launch._wait(client, "j", lambda: polls.append(1)) is JobStatus.SUCCEEDED
    assert len(polls) == 5
    with pytest.raises(RunFailed, match="job j is .no route.*ray job status j"):
        launch._wait(Client(going, lost), "j", lambda: None)
    launch._stop(Client(going), "j")
    assert "ray job stop j" in caplog.text
