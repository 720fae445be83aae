"""The pool against a real embedded Ray: every part comes back whole, whatever dies."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from h1r_rl.config.schema import RewardConfig
from h1r_rl.errors import ConfigError, RolloutLost, RunFailed
from h1r_rl.records import Completion, GroupPart, Prompt, VersionSpan
from rewards.pool import QUEUE_PER_WORKER, RewardPool

pytestmark = pytest.mark.usefixtures("ray_cluster")

IDS = np.arange(3, dtype=np.int32)
SPANS = (VersionSpan("0", 0, 3),)
HANG = r"\boxed{9^{9^{9^9}}}"


def prompt(truth: str, verifier: str = "math") -> Prompt:
    return Prompt("p", 0, IDS, "q", verifier, truth)


def completions(texts: list[str]) -> list[Completion]:
    zeros = np.zeros(3, np.float32)
    return [
        Completion(i, IDS, zeros, SPANS, "stop", text, "rollout-0") for i, text in enumerate(texts)
    ]


def part_of(reference, n: int) -> GroupPart:
    return GroupPart(
        sample_indices=tuple(range(n)),
        lengths=(3,) * n,
        finish_reasons=("stop",) * n,
        version_spans=(SPANS,) * n,
        engine="rollout-0",
        seconds=0.1,
        surprise=(0.0,) * n,
        completions_ref=reference,
    )


def part(texts: list[str]) -> GroupPart:
    return part_of(ray.put(completions(texts)), len(texts))


async def start(workers: int = 1, timeout_s: float = 5.0) -> RewardPool:
    config = RewardConfig(workers=workers, num_cpus=0.5, timeout_s=timeout_s)
    return await RewardPool.start(config, max_response_tokens=100)


async def pid_of(pool: RewardPool, worker: int = 0) -> int:
    return await asyncio.wait_for(pool._workers[worker].handle.ready.remote(), 30)


def children_of(pid: int) -> list[int]:
    """Of whatever thread started them."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return [int(p) for task in tasks for p in (task / "children").read_text().split()]


async def until(condition, timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "condition not met in time"
        await asyncio.sleep(0.02)


async def test_verdicts_in_order_with_parts_and_counts():
    pool = await start()
    try:
        texts = [r"<think>a</think>\boxed{0.5}", r"\boxed{3}", r"\boxed{\frac{\sqrt4}{4}}", "?"]
        verdicts = await pool.score(prompt("1/2"), part(texts))
        assert [v.score for v in verdicts] == [1.0, 0.0, 1.0, 0.0]
        assert [v.reason for v in verdicts] == ["correct", "wrong", "correct", "no_answer"]
        assert [v.parts["format"] for v in verdicts] == [1.0, 0.0, 0.0, 0.0]
        assert [v.parts["accuracy"] for v in verdicts] == [1.0, 0.0, 1.0, 0.0]
        stats = pool.stats()
        assert stats["reward/verdicts"] == stats["reward/latency_le_30s"] == 4
        assert stats["reward/reason/correct"] == 2
        assert stats["reward/in_flight"] == stats["reward/queue_depth"] == 0
    finally:
        await pool.close()


async def test_a_hanging_answer_costs_its_own_verdict_only():
    pool = await start(timeout_s=1.0)
    try:
        slow = r"\boxed{\frac{\sqrt4}{4}}"
        verdicts = await pool.score(prompt("1/2"), part([slow, HANG, slow, HANG, slow]))
        reasons = ["correct", "timeout", "correct", "timeout", "correct"]
        assert [v.reason for v in verdicts] == reasons
        assert [v.score for v in verdicts] == [1.0, 0.0, 1.0, 0.0, 1.0]
    finally:
        await pool.close()


async def test_a_killed_worker_loses_nothing():
    pool = await start(timeout_s=2.0)
    try:
        pid = await pid_of(pool)
        texts = [r"\boxed{1}"] * 3
        task = asyncio.create_task(pool.score(prompt("1"), part([*texts, HANG])))
        await asyncio.sleep(0.7)
        os.kill(pid, signal.SIGKILL)
        verdicts = await asyncio.wait_for(task, 60)
        assert [v.reason for v in verdicts] == ["correct"] * 3 + ["timeout"]
        assert pool.stats()["reward/workers_lost"] == 1
        assert pool.stats()["reward/workers"] == 1
        assert [v.score for v in await pool.score(prompt("1"), part(texts))] == [1.0] * 3
    finally:
        await pool.close()


async def test_lost_twice_has_no_score_and_the_pool_goes_on():
    pool = await start(timeout_s=20.0)
    try:
        task = asyncio.create_task(pool.score(prompt("1"), part([r"\boxed{1}", HANG])))
        for _ in range(2):
            await until(lambda: len(pool._workers) == 1 and pool._workers[0].in_flight == 1)
            handle = pool._workers[0].handle
            ray.kill(handle)
            await until(lambda lost=handle: all(w.handle is not lost for w in pool._workers))
        verdicts = await asyncio.wait_for(task, 60)
        assert [(v.score, v.reason) for v in verdicts] == [(None, "worker_lost")] * 2
        assert pool.stats()["reward/workers_lost"] == 2
        assert [v.score for v in await pool.score(prompt("1"), part([r"\boxed{1}"]))] == [1.0]
    finally:
        await pool.close()


async def test_back_pressure_and_scaling():
    """One worker holds two parts; the others wait in `score` until there are more workers."""
    pool = await start(timeout_s=2.0)
    try:
        parts = [part([HANG]) for _ in range(5)]
        tasks = [asyncio.create_task(pool.score(prompt("1"), p)) for p in parts]
        await until(lambda: pool.stats()["reward/in_flight"] == QUEUE_PER_WORKER)
        assert pool.stats()["reward/queue_depth"] == 5 - QUEUE_PER_WORKER
        await pool.resize(3)
        await until(lambda: pool.stats()["reward/queue_depth"] == 0)
        assert pool.stats()["reward/workers"] == 3
        await pool.resize(1)  # those that leave finish what they hold
        verdicts = [v for judged in await asyncio.gather(*tasks) for v in judged]
        assert [v.reason for v in verdicts] == ["timeout"] * 5
        await until(lambda: len(pool._workers) == 1)
        assert pool.stats()["reward/workers_lost"] == 0
        assert [v.score for v in await pool.score(prompt("1"), part([r"\boxed{1}"]))] == [1.0]
    finally:
        await pool.close()


@ray.remote(num_cpus=0)
class Owner:
    def put(self, bulk):
        return [ray.put(bulk)]


async def test_lost_completions_are_the_rollouts_loss():
    pool = await start()
    try:
        owner = Owner.remote()
        (reference,) = await asyncio.wait_for(owner.put.remote(completions(["?"])), 60)
        ray.kill(owner)
        await asyncio.sleep(1.0)
        with pytest.raises(RolloutLost, match="rollout-0"):
            await asyncio.wait_for(pool.score(prompt("1"), part_of(reference, 1)), 60)
        assert pool.stats()["reward/workers_lost"] == 0
    finally:
        await pool.close()


@pytest.mark.parametrize(
    ("second", "told"),
    [(r"\boxed{1}", 1), (HANG, 1), (r"\boxed{1}", 3)],
    ids=["too many at once", "too many later", "too few"],
)
async def test_another_number_of_completions_is_an_error(second, told):
    pool = await start(timeout_s=1.0)
    try:
        two = ray.put(completions([r"\boxed{1}", second]))
        with pytest.raises(RunFailed, match=f"expected {told} completions"):
            await asyncio.wait_for(pool.score(prompt("1"), part_of(two, told)), 60)
    finally:
        await pool.close()


async def test_a_stuck_worker_is_replaced(monkeypatch):
    """Neither dead nor answering: its part is judged elsewhere once its time is up."""
    pool = await start(timeout_s=1.0)
    try:
        await pool.score(prompt("1"), part([r"\boxed{1}"]))
        os.kill(await pid_of(pool), signal.SIGSTOP)
        monkeypatch.setattr("rewards.pool.PART_OVERHEAD_S", 3.0)
        judged = pool.score(prompt("1"), part([r"\boxed{1}"]))
        assert [v.score for v in await asyncio.wait_for(judged, 60)] == [1.0]
        assert pool.stats()["reward/workers_lost/deadline"] == 1
    finally:
        await pool.close()


async def test_a_pool_that_cannot_start_says_what_is_missing():
    config = RewardConfig(workers=1, num_cpus=1000)
    with pytest.raises(RunFailed, match=r"reward\.num_cpus"):
        await RewardPool.start(config, max_response_tokens=100, start_timeout_s=1.0)


async def test_close_leaves_no_process():
    pool = await start()
    await pool.score(prompt("1"), part([r"\boxed{\sqrt4}"]))  # starts the killable process
    pid = await pid_of(pool)
    family = [pid, *children_of(pid)]
    assert len(family) > 1
    await pool.close()
    await until(lambda: not any(Path(f"/proc/{p}").exists() for p in family))


async def test_verdicts_stream_back_and_survive_their_worker():
    """What a part's first samples got is out while a later one still runs, and is not made again
    when the worker dies on it."""
    pool = await start(timeout_s=6.0)  # the kill below must come within it
    try:
        pid = await pid_of(pool)
        texts = [r"\boxed{1}", HANG, r"\boxed{2}", HANG]
        began, came, killed = time.monotonic(), {}, False
        async for position, verdict, seconds in pool.stream(prompt("1"), part(texts)):
            came[position] = (verdict.reason, time.monotonic() - began)
            assert seconds < 20
            if position == 2 and not killed:
                killed = True
                await asyncio.sleep(0.5)
                os.kill(pid, signal.SIGKILL)
        reasons = [came[position][0] for position in range(4)]
        assert reasons == ["correct", "timeout", "wrong", "timeout"]
        assert came[1][1] < came[3][1] - 1
        stats = pool.stats()
        assert stats["reward/workers_lost/died"] == stats["reward/workers_lost"] == 1
        assert stats["reward/verdicts"] == 4
        assert stats["reward/timeouts/math"] == stats["reward/timeouts"] == 2
        assert stats["reward/kills/deadline"] == stats["reward/kills"] == 2
        assert stats["reward/latency_p99_s"] >= 3
        assert all(type(value) is float for value in stats.values())
    finally:
        await pool.close()


async def test_each_its_own_prompt():
    pool = await start()
    try:
        prompts = [prompt("1"), prompt("2"), prompt("B", "choice"), prompt("1", "nothing")]
        texts = [r"\boxed{1}", r"\boxed{1}", r"\boxed{B}", r"\boxed{1}"]
        judged = [item async for item in pool.stream_each(prompts, completions(texts))]
        assert [position for position, _, _ in judged] == [0, 1, 2, 3]
        assert [v.reason for _, v, _ in judged] == [
            "correct",
            "wrong",
            "correct",
            "unknown_verifier",
        ]
    finally:
        await pool.close()


async def test_a_machine_that_cannot_judge_code_says_so_at_the_start():
    config = RewardConfig(num_cpus=0.5, sandbox={"http": "http://127.0.0.1:9"})
    with pytest.raises((ConfigError, RunFailed), match="127.0.0.1:9"):
        await RewardPool.start(config, 100, 60.0, frozenset({"code"}))
