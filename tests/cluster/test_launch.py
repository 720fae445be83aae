"""An embedded cluster takes jobs whatever else runs on the machine."""

import socket
import subprocess
import sys

import pytest

AGENT_PORT = 52365  # Ray's fixed choice for the agent that runs jobs

SUBMIT = """
import sys, time
from cluster.launch import _submit, ray_cluster
from h1r_rl.config.schema import ClusterConfig
from ray.job_submission import JobSubmissionClient
with ray_cluster(ClusterConfig(num_cpus=1)) as cluster:
    client = JobSubmissionClient(cluster.jobs_address)
    job = _submit(client, f"{sys.executable} -c 'print(40 + 2)'")
    while not client.get_job_status(job).is_terminal():
        time.sleep(0.2)
    print(client.get_job_status(job).value, "42" in client.get_job_logs(job))
"""


@pytest.mark.timeout(200)
def test_a_taken_agent_port_does_not_matter():
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("0.0.0.0", AGENT_PORT))
            taken.listen()
        except OSError:
            pass  # another cluster has it already
        done = subprocess.run(
            [sys.executable, "-c", SUBMIT], capture_output=True, text=True, timeout=180
        )
    assert done.stdout.split() == ["SUCCEEDED", "True"], done.stderr
