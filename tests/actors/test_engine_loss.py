"""Engines that die: the cause is told, the others serve on, no process is left."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from h1r_rl.errors import RolloutLost, RunFailed
from h1r_rl.interfaces import Sampling
from h1r_rl.records import Prompt


def _children(pid: int) -> list[int]:
    """Every process below `pid`."""
    below: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if fields[0] != "Z":
            below.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, todo = [], [pid]
    while todo:
        new = below.get(todo.pop(), [])
        found += new
        todo += new
    return found


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def _all_gone(pids: list[int], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while any(map(_alive, pids)):
        if time.monotonic() > end:
            return False
        await asyncio.sleep(0.1)
    return True


async def _ask(pool, samples: int = 512) -> None:
    """A group long enough to be killed in the middle of, on a fast machine too."""
    prompt = Prompt("p", 0, np.arange(10, dtype=np.int32), "q", "math", "1")
    async for _ in pool.generate(prompt, range(samples), Sampling(1.0, 64)):
        pass


async def test_a_killed_engine_and_a_killed_actor(
    ray_cluster, tiny_model_folder, rollout_config, weights_config
):
    from actors.rollout_pool import RolloutPool

    pool = await RolloutPool.start(
        rollout_config.model_copy(update={"actors": 2, "max_replacements": 0}),
        weights_config,
        model_folder=str(tiny_model_folder),
        seed=0,
        initial_version="0",
        run_name="loss",
        start_timeout_s=200,
    )
    try:
        facts = await pool.facts()
        trees = {n: _children(f["pid"]) for n, f in facts.items()}
        assert all(set(f["engine_pids"]) <= set(trees[n]) for n, f in facts.items())

        asking = asyncio.create_task(_ask(pool))  # goes to rollout-0
        await asyncio.sleep(0.3)
        os.kill(facts["rollout-0"]["engine_pids"][0], signal.SIGKILL)
        with pytest.raises(RolloutLost, match=r"rollout-0.*exit code \[-9\]"):
            await asking
        assert list(pool.members()) == ["rollout-1"]
        await _ask(pool, samples=2)  # the other serves on
        assert (await pool.stats())["engines_lost"] == 1

        asking = asyncio.create_task(_ask(pool))
        await asyncio.sleep(0.15)
        os.kill(facts["rollout-1"]["pid"], signal.SIGKILL)
        with pytest.raises(RolloutLost, match="rollout-1"):
            await asking
        with pytest.raises(RunFailed, match="no rollout engine is left.*rollout-0.*rollout-1"):
            await _ask(pool)
        everyone = [pid for tree in trees.values() for pid in tree]
        assert await _all_gone(everyone), "an engine outlived its actor"
    finally:
        await pool.close()
