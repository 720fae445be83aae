"""Processes stopped and killed around a weight transfer on gloo: three engines and a sender, each a
process; pool, conversation, sender and receiver are the real ones, only the model is plain tensors.

Whoever is left serves the new version, bit for bit; nothing outlives its deadline; errors name both
sides and the parameter. A stopped process costs its deadlines, so those cases are slow."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from h1r_rl.config.schema import RolloutConfig, WeightsConfig
from h1r_rl.errors import RunFailed

sys.path.insert(0, str(Path(__file__).parent))
DEADLINE_S = 6.0  # generous: a machine under load must not be what fails
GRACE_S = 4.0
BUCKET_S = 0.05  # a transfer of some 20 buckets takes a second
# A transfer that fails, the look for who is silent, and one that succeeds; twice, for the load.
BOUND_S = 2 * (2 * DEADLINE_S + 3 * GRACE_S)


@pytest.fixture(scope="module")
def services():
    """Processes by kind, kept over the cases; a lost one is replaced."""
    kept = SimpleNamespace(pool=None, sender=None, made=[], version=0)
    yield kept
    for handle in kept.made:
        handle.kill()


@pytest.fixture
def world(services, monkeypatch):
    import matrix_services as parts

    def start_process(kind, *args):
        services.made.append(parts.Handle(kind, *args))
        return services.made[-1]

    def start_actor(name, *_):
        actor = start_process(parts.PlainEngine, name)
        return actor, actor.start.remote()

    for module in ("actors.rollout_pool", "learners.learner_group"):
        monkeypatch.setattr(f"{module}.GRACE_S", GRACE_S)
    monkeypatch.setattr("actors.rollout_pool.CALL_DEADLINE_S", GRACE_S)
    monkeypatch.setattr("actors.engines.start_actor", start_actor)
    monkeypatch.setattr("ray.kill", lambda handle: handle.kill())

    async def build() -> SimpleNamespace:
        from actors.rollout_pool import RolloutPool
        from cluster.weight_sync import WeightSync
        from learners.learner_group import LearnerGroup

        if services.sender is None:
            services.sender = start_process(parts.PlainLearner, DEADLINE_S, BUCKET_S)
        if services.pool is None:
            config = RolloutConfig(
                max_response_tokens=8, max_model_len=16, actors=3, max_replacements=99
            )
            services.pool = await RolloutPool.start(
                config, WeightsConfig(deadline_s=DEADLINE_S), model_folder="", seed=0,
                initial_version="0", run_name="m", start_timeout_s=120,
            )  # fmt: skip
        pool, sender = services.pool, services.sender
        sync = WeightSync(
            LearnerGroup([sender], 0, DEADLINE_S), pool,
            await asyncio.wait_for(sender.weight_manifest.remote(), 120),
        )  # fmt: skip
        w = SimpleNamespace(
            pool=pool, sync=sync, sender=sender, services=services,
            serving=asyncio.create_task(sync.serve()), sender_pid=sender.pid,
        )  # fmt: skip
        await push(w)
        await all_three(w)
        w.pids = {n: f["pid"] for n, f in (await pool.facts()).items()}
        w.victim = list(w.pids)[1]
        return w

    return build


async def all_three(w) -> None:
    """The replacement of whoever was lost holds what the others hold."""
    end = time.monotonic() + 120
    while len(w.pool.members()) < 3 or w.pool.behind():
        assert time.monotonic() < end, "no replacement came"
        await asyncio.sleep(0.05)


async def push(w) -> dict[str, int]:
    """Send the next version; what its parameters are. Raises what ended the conversation."""
    expected = await begin(w)
    await outcome(w)
    return expected


async def begin(w) -> dict[str, int]:
    w.services.version += 1
    expected = await asyncio.wait_for(w.sender.update.remote(w.services.version), 30)
    w.sync.publish(w.services.version, then=_nothing)
    return expected


async def outcome(w) -> None:
    sent = asyncio.create_task(w.sync.sent())
    done, _ = await asyncio.wait(
        {sent, w.serving}, return_when=asyncio.FIRST_COMPLETED, timeout=120
    )
    sent.cancel()
    assert done, "the transfer hangs"
    if w.serving in done:
        w.serving.result()
    w.sync.unchanged()


async def close(w, *, sender_lost: bool = False) -> None:
    w.serving.cancel()
    await asyncio.gather(w.serving, return_exceptions=True)
    w.pool.end_transfer()
    if sender_lost:
        w.services.sender = None


async def held(w, version: int, expected: dict[str, int], names: set[str]) -> None:
    """These engines serve that version, bit for bit."""
    facts = {n: f for n, f in (await w.pool.facts()).items() if n in names}
    assert set(facts) == names and not names & set(w.pool.behind())
    assert {f["version"] for f in facts.values()} == {str(version)}
    assert all(f["held"] == expected for f in facts.values())


STOPPED = pytest.param(signal.SIGSTOP, id="stopped", marks=pytest.mark.slow)
KILLED = pytest.param(signal.SIGKILL, id="killed")


def in_call(w, method: str) -> asyncio.Event:
    """Set once the engines have been called with it."""
    ask, called = w.pool._engines.ask, asyncio.Event()

    async def noted(name, *args, **settings):
        answering = asyncio.create_task(ask(name, *args, **settings))
        if name == method:
            await asyncio.sleep(0.05)  # the call is with them
            called.set()
        return await answering

    w.pool._engines.ask = noted
    return called


IN_CALLS = {"joining": "join_epoch", "committing": "commit"}


@pytest.mark.parametrize("when", ["before", "joining", "during", "committing", "after"])
@pytest.mark.parametrize("how", [KILLED, STOPPED])
async def test_an_engine_is_lost_and_the_others_serve_the_new_version(world, when, how, caplog):
    w = await world()
    ask = w.pool._engines.ask
    try:
        pid, lost_before = w.pids[w.victim], len(w.pool.lost())
        called = in_call(w, IN_CALLS.get(when, ""))
        if when == "joining":
            w.sync.new_epoch()
        if when in ("before", "after"):  # after the last transfer, before the next one
            os.kill(pid, how)
        if when == "after":
            await asyncio.sleep(0.5)  # long enough that the kill is noticed first
        started = time.monotonic()
        with caplog.at_level(logging.WARNING):
            expected = await begin(w)
            if when == "during":
                await asyncio.sleep(6 * BUCKET_S)
                os.kill(pid, how)
            if when in IN_CALLS:
                await asyncio.wait_for(called.wait(), 60)
                os.kill(pid, how)
            await outcome(w)
        assert time.monotonic() - started < BOUND_S
        await held(w, w.services.version, expected, set(w.pids) - {w.victim})
        assert len(w.pool.lost()) == lost_before + 1 and w.victim in w.pool.lost()
        told = [m for m in caplog.messages if m.startswith("version ")]  # both sides, and where
        assert all("learner (rank 0)" in m and w.victim in m for m in told)
        assert all(".weight" in m or "joining epoch" in m for m in told)
        assert told and (when != "during" or "learner (rank 0) could not send" in told[0])
        assert await _gone(pid), "the lost engine's process is still there"
        await all_three(w)  # nothing was published for the joiner
        await held(w, w.services.version, expected, set(w.pool.members()))
    finally:
        w.pool._engines.ask = ask
        await close(w)


@pytest.mark.parametrize("when", ["before", "during", "after"])
@pytest.mark.parametrize("how", [KILLED, STOPPED])
async def test_a_lost_sender_ends_the_run_and_leaves_the_engines_whole(world, when, how):
    """Lost before its next transfer begins; in it; or right after the last one, whose weights the
    engines then serve until it is missed."""
    w = await world()
    try:
        served = await push(w)
        version = w.services.version
        if when == "before":
            await asyncio.wait_for(w.sender.update.remote(version + 1), 30)
        if when != "during":
            os.kill(w.sender_pid, how)
        if when == "after":
            await asyncio.sleep(0.5)
            await held(w, version, served, set(w.pids))
            assert not w.serving.done()
        started = time.monotonic()
        if when == "during":
            await begin(w)
            await asyncio.sleep(6 * BUCKET_S)
            os.kill(w.sender_pid, how)
        else:
            w.sync.publish(version + 1, then=_nothing)
        with pytest.raises(RunFailed, match="learner rank 0 (died|was killed)") as caught:
            await outcome(w)
        assert time.monotonic() - started < BOUND_S
        text = str(caught.value)
        assert all(name in text for name in w.pool.members())
        assert "lost the learner (rank 0) at" in text or "from the learner (rank 0)" in text
        assert ".weight" in text or ".bias" in text
        assert len(w.pool.members()) == 3
        await held(w, version, served, set(w.pids))
        assert await _gone(w.sender_pid), "the lost sender's process is still there"
    finally:
        await close(w, sender_lost=True)


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
