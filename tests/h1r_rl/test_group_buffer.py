"""Slots and the deadline rule: nothing late, nothing thrown away, no bias against long groups."""

import asyncio
import heapq
import itertools
import random

import numpy as np
import pytest

from h1r_rl.grpo.group_buffer import GroupBuffer, _Slot
from h1r_rl.records import Group, Prompt


def group(key: str, version: int = 0) -> Group:
    return Group(Prompt(key, 0, np.zeros(1, np.int32), "", "math", "1"), (), version)


def buffer(prompts_per_step=2, max_staleness=1, max_backfill=8) -> GroupBuffer:
    return GroupBuffer(
        prompts_per_step=prompts_per_step, max_staleness=max_staleness, max_backfill=max_backfill
    )


async def simulate(prompts_per_step, staleness, durations, learner_time=1.0):
    """Event simulation in virtual time; returns [(admitted, trained at version, duration)]."""
    pool = buffer(prompts_per_step, staleness)
    clock = version = engine_version = 0
    events: list = []
    admitted: dict[str, tuple[int, float]] = {}
    trained = []
    supply = iter(enumerate(durations))
    tick = itertools.count()
    exhausted = False
    learner_free = True
    while True:
        while not exhausted and pool._has_room():
            item = next(supply, None)
            if item is None:
                exhausted = True
                break
            key = f"g{item[0]}/0"
            await pool.admit(key, lambda v=engine_version: v)
            admitted[key] = (engine_version, item[1])
            heapq.heappush(events, (clock + item[1], next(tick), "done", key))
        if learner_free:
            pool._version = version
            if pool._can_cut():
                chosen = await pool.take_step(version)
                for g in chosen:
                    trained.append((admitted[g.key][0], version, admitted[g.key][1]))
                learner_free = False
                keys = [g.key for g in chosen]
                heapq.heappush(events, (clock + learner_time, next(tick), "step", keys))
        if not events:
            return trained
        clock, _, kind, what = heapq.heappop(events)
        if kind == "done":
            await pool.add(group(what.split("/")[0]))
        else:
            version += 1
            engine_version = version
            learner_free = True
            await pool.release(what)


@pytest.mark.parametrize("staleness", [0, 1, 4])
async def test_no_group_is_late_or_lost_and_long_ones_are_kept(staleness):
    rng = random.Random(0)
    durations = [8.0 if rng.random() < 1 / 16 else 1.0 for _ in range(2400)]
    trained = await simulate(8, staleness, durations)
    assert all(at - admitted <= staleness for admitted, at, _ in trained)
    # All but what was in flight at the end, in order of admission, long groups in their share.
    assert len(trained) >= len(durations) - (staleness + 1) * 8
    long_share = np.mean([d > 1 for *_, d in trained])
    assert long_share == pytest.approx(np.mean([d > 1 for d in durations]), abs=0.01)


def feasible_by_search(deadlines, per_step, version):
    """Brute force: can the groups be put into steps version+1, ... before their deadlines?"""
    if not deadlines:
        return True
    if min(deadlines) <= version:
        return False
    chosen = sorted(deadlines)
    for subset in itertools.combinations(range(len(chosen)), min(per_step, len(chosen))):
        rest = [d for i, d in enumerate(chosen) if i not in subset]
        if all(chosen[i] >= version + 1 for i in subset) and feasible_by_search(
            rest, per_step, version + 1
        ):
            return True
    return False


def test_the_deadline_rule_against_brute_force():
    for per_step, staleness in itertools.product((1, 2), (0, 1, 2)):
        for admitted in itertools.product(range(3), repeat=4):
            pool = buffer(per_step, staleness)
            pool._version = 2
            pool._slots = {str(i): _Slot(a) for i, a in enumerate(admitted)}
            deadlines = [a + staleness for a in admitted]
            assert pool._in_time_without([]) == feasible_by_search(deadlines, per_step, 2)


async def test_slots_bound_admission_and_a_release_frees_one():
    pool = buffer(prompts_per_step=1, max_staleness=0)
    await pool.admit("a/0", lambda: 0)
    waiting = asyncio.create_task(pool.admit("b/0", lambda: 1))
    await asyncio.sleep(0.01)
    assert not waiting.done()
    await pool.add(group("a"))
    assert [g.key for g in await pool.take_step(0)] == ["a/0"]
    await asyncio.sleep(0.01)
    assert not waiting.done()  # trained, but the engines do not hold the weights yet
    await pool.release(["a/0"])
    await asyncio.wait_for(waiting, 1)
    assert pool.admitted_version("b/0") == 1


async def test_a_skipped_step_at_staleness_zero_does_not_stall():
    pool = buffer(prompts_per_step=1, max_staleness=0)
    await pool.admit("a/0", lambda: 0)
    await pool.add(group("a"))
    await pool.take_step(0)
    await pool.drop(["a/0"], "skipped_step")
    await asyncio.wait_for(pool.admit("b/0", lambda: 0), 1)
    assert pool.dropped == {"skipped_step": 1}


async def test_backfill_ends_and_the_step_trains_on_what_has_signal():
    pool = buffer(prompts_per_step=2, max_staleness=0, max_backfill=1)
    await pool.admit("good/0", lambda: 0)
    await pool.add(group("good"))
    for i in range(3):
        await asyncio.wait_for(pool.admit(f"flat{i}/0", lambda: 0), 1)
        await pool.drop([f"flat{i}/0"], "no_signal")
    blocked = asyncio.create_task(pool.admit("more/0", lambda: 0))
    chosen = await asyncio.wait_for(pool.take_step(0), 1)
    assert [g.key for g in chosen] == ["good/0"]
    await asyncio.wait_for(blocked, 1)  # the next step has its own allowance
