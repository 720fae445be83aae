"""A cluster that runs already (`ray start`): the same stages, by its Jobs address alone."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from live_runs import Live, alive, call, h1r, records, statuses, tree_of  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def jobs_address(tmp_path):
    """The dashboard of a head node of its own; the cluster ends with the test."""
    dashboard, ray = free_port(), Path(sys.executable).with_name("ray")
    ports = ("dashboard-agent-listen-port", "dashboard-agent-grpc-port", "ray-client-server-port")
    head = subprocess.Popen(
        [
            ray, "start", "--head", "--block", "--num-cpus=4", "--disable-usage-stats", "--port=0",
            "--include-dashboard=true", f"--dashboard-port={dashboard}",
            *(f"--{name}={free_port()}" for name in ports),
        ],
        stdout=(tmp_path / "head.log").open("w"), stderr=subprocess.STDOUT,
        env=os.environ | {"PATH": f"{ray.parent}:{os.environ['PATH']}"},
    )  # fmt: skip
    address = f"http://127.0.0.1:{dashboard}"
    started = {}
    try:
        end = time.monotonic() + 120
        while not answers(address):
            assert head.poll() is None and time.monotonic() < end, (
                tmp_path / "head.log"
            ).read_text()
            time.sleep(0.5)
        yield address
        started = tree_of(head.pid)
    finally:
        head.terminate()
        head.wait(60)
    assert not alive(started)


def answers(address: str) -> bool:
    try:
        urllib.request.urlopen(f"{address}/api/version", timeout=2)
    except urllib.error.HTTPError:
        return True  # it wants Ray's token
    except OSError:
        return False
    return True


def test_sft_on_a_cluster_that_runs_already(jobs_address, tmp_path):
    """Submitted, watched and stopped there; the cluster outlives the run either way."""
    remote = f"cluster.address={jobs_address}"
    done = call(h1r(tmp_path, "sft", remote, "sft.steps=3"))
    assert done.returncode == 0, done.stderr
    assert len(records(tmp_path, "sft")) == 3
    assert (tmp_path / "tiny-cpu" / "sft-model" / "model.safetensors").exists()

    live = Live(h1r(tmp_path, "sft", remote, "sft.steps=5000", "name=longer"))
    live.wait_for(lambda: len(records(tmp_path, "sft", run="longer")) >= 2)
    live.interrupt(like_a_terminal=True)
    code, stderr = live.end()
    assert code == 130, stderr
    found = statuses(tmp_path)
    assert {found["tiny-cpu"], found["tiny-cpu/sft"]} == {"FINISHED"}
    assert {found["longer"], found["longer/sft"]} == {"KILLED"}
    assert answers(jobs_address)
