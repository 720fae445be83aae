"""The failure matrix's cases in the middle of a transfer with three real vLLM engines: one process
of an engine is stopped, another engine killed, at last the sender. Pool, conversation, sender and
receivers are the real ones, and so are the model and the log-probabilities of whoever is left."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from h1r_rl.errors import RunFailed
from h1r_rl.interfaces import Sampling

sys.path.insert(0, str(Path(__file__).parent))
DEADLINE_S = 20.0
BUCKET_S = 0.2  # a transfer of some seconds


async def serves(w, names: set[str], version: int) -> None:
    """These engines and no other hold the version, and sample from its weights."""
    facts = await w.pool.facts()
    assert set(facts) == names and {f["version"] for f in facts.values()} == {str(version)}
    folder = w.folders[version % 2]
    for seed in range(2 * len(names)):  # routed by load: each gets its share
        asked = w.wire.prompt(seed)
        (sampled,) = await w.wire.sample(w.pool, asked, 1, Sampling(1.0, 24))
        assert [span.version for span in sampled.version_spans] == [str(version)]
        expected = w.wire.reference(folder, asked, sampled, 1.0)
        np.testing.assert_allclose(sampled.logprobs, expected, atol=1e-4)


async def publish(w, version: int) -> None:
    await asyncio.wait_for(w.sender.update.remote(version), 120)
    w.sync.publish(version, then=_nothing)


async def outcome(w) -> None:
    sent = asyncio.create_task(w.sync.sent())
    await asyncio.wait({sent, w.serving}, return_when=asyncio.FIRST_COMPLETED, timeout=200)
    sent.cancel()
    if w.serving.done():
        w.serving.result()
    w.sync.unchanged()


@pytest.mark.proof
@pytest.mark.timeout(1500)
async def test_stopped_and_killed_in_a_transfer_of_three_engines(
    ray_cluster, wire, tiny_model_folder, shake_model, rollout_config, tmp_path, monkeypatch
):
    import matrix_services as parts
    import ray

    from actors.rollout_pool import RolloutPool
    from cluster.weight_sync import WeightSync
    from h1r_rl.config.schema import WeightsConfig
    from learners.learner_group import LearnerGroup

    shake_model(tiny_model_folder, tmp_path / "next", seed=7)
    folders = (str(tiny_model_folder), str(tmp_path / "next"))
    sender = parts.Handle(parts.PlainLearner, DEADLINE_S, BUCKET_S, folders, 1 << 18)
    kill = ray.kill
    monkeypatch.setattr("ray.kill", lambda a: a.kill() if isinstance(a, parts.Handle) else kill(a))
    config = rollout_config.model_copy(
        update={"actors": 3, "max_replacements": 0, "kv_cache_gib": 0.1, "num_cpus": 0.5}
    )
    pool = await RolloutPool.start(
        config, WeightsConfig(deadline_s=DEADLINE_S, bucket_mib=1),
        model_folder=str(tiny_model_folder), seed=0, initial_version="0", run_name="m",
        start_timeout_s=900,
    )  # fmt: skip
    manifest = await asyncio.wait_for(sender.weight_manifest.remote(), 120)
    sync = WeightSync(LearnerGroup([sender], 0, DEADLINE_S), pool, manifest)
    w = SimpleNamespace(pool=pool, sync=sync, sender=sender, wire=wire, folders=folders)
    w.serving = asyncio.create_task(sync.serve())
    try:
        facts = await pool.facts()
        await publish(w, 1)
        await outcome(w)
        await serves(w, set(facts), 1)

        for version, victim, how in (
            (2, "rollout-1", signal.SIGSTOP), (3, "rollout-2", signal.SIGKILL),
        ):  # fmt: skip
            pid = facts[victim]["engine_pids"][0]
            started = time.monotonic()
            await publish(w, version)
            await asyncio.sleep(3 * BUCKET_S)
            os.kill(pid, how)
            await outcome(w)
            assert time.monotonic() - started < 6 * DEADLINE_S
            assert victim in pool.lost()
            await serves(w, set(facts) - set(pool.lost()), version)
            assert await _gone(pid) and await _gone(facts[victim]["pid"])

        await publish(w, 4)
        await asyncio.sleep(3 * BUCKET_S)
        os.kill(sender.pid, signal.SIGKILL)
        with pytest.raises(RunFailed, match=r"learner rank 0 died.*lost the learner \(rank 0\) at"):
            await outcome(w)
        await serves(w, {"rollout-0"}, 3)
    finally:
        w.serving.cancel()
        await asyncio.gather(w.serving, return_exceptions=True)
        sender.kill()
        await pool.close()


async def _nothing() -> None: ...


async def _gone(pid: int) -> bool:
    for _ in range(400):
        if not _alive(pid):
            return True
        await asyncio.sleep(0.05)
    return False


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
