"""Slots and the deadline rule: nothing late, nothing thrown away, no bias against long groups."""

import asyncio
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


def test_a_cut_is_made_exactly_when_some_choice_is_in_time():
    """Oldest first is as good as any choice: brute force over all choices of finished groups."""
    rng = random.Random(0)
    made = 0
    for _ in range(2000):
        per_step, staleness, version = rng.randint(1, 2), rng.randint(0, 3), 3
        pool = buffer(per_step, staleness)
        pool._version = version
        for i in range(rng.randint(per_step, 6)):
            slot = _Slot(version - rng.randint(0, staleness))
            slot.group = group(f"g{i}") if rng.random() < 0.6 else None
            pool._slots[f"g{i}/0"] = slot
        ready = [key for key, slot in pool._slots.items() if slot.group is not None]
        possible = any(
            feasible_by_search(
                [s.admitted_version + staleness for k, s in pool._slots.items() if k not in chosen],
                per_step,
                version,
            )
            for chosen in itertools.combinations(ready, per_step)
        )
        assert (len(pool._choose()) == per_step) == possible
        made += possible
    assert 200 < made < 1800


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
    assert pool.dropped == {"stale": 0, "skipped_step": 1}


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
    await asyncio.sleep(0.01)
    assert not blocked.done()  # the slot that the step did not fill is free with its weights
    await pool.release(["good/0"])
    await asyncio.wait_for(blocked, 1)  # the next step has its own allowance


@pytest.mark.parametrize("staleness", [0, 1, 2, 4])
@pytest.mark.parametrize(("backfill", "flat_share"), [(0, 0.3), (2, 0.9), (8, 0.95)])
async def test_short_steps_neither_hang_nor_make_anything_stale(staleness, backfill, flat_share):
    """Most groups are without signal, so that steps are cut short of prompts_per_step."""
    pool = buffer(prompts_per_step=4, max_staleness=staleness, max_backfill=backfill)
    rng = np.random.default_rng(0)
    version, short = 0, 0

    async def produce():
        for n in itertools.count():
            await pool.admit(f"g{n}/0", lambda: version)
            await asyncio.sleep(0)
            if rng.random() < flat_share:
                await pool.drop([f"g{n}/0"], "no_signal")
            else:
                await pool.add(group(f"g{n}", pool.admitted_version(f"g{n}/0")))

    producer = asyncio.create_task(produce())
    for _ in range(60):
        groups = await asyncio.wait_for(pool.take_step(version), 5)
        assert all(g.admitted_version >= version - staleness for g in groups)
        short += 0 < len(groups) < 4
        await asyncio.sleep(0.001)  # others go on while the step is trained
        if groups:
            version += 1
            await pool.release([g.key for g in groups])
    producer.cancel()
    assert short and pool.dropped["stale"] == 0


async def test_what_a_fault_made_too_old_is_dropped_at_the_cut_and_holds_nobody_up():
    pool = buffer(prompts_per_step=1, max_staleness=1)
    await pool.admit("done/0", lambda: 0)
    await pool.add(group("done"))
    await pool.admit("long/0", lambda: 0)
    cut = asyncio.create_task(pool.take_step(5))  # a restored learner is far ahead
    await asyncio.sleep(0.01)
    assert pool.dropped == {"stale": 1} and not cut.done()
    await pool.admit("new/0", lambda: 5)
    await pool.add(group("new", 5))
    assert [g.key for g in await asyncio.wait_for(cut, 1)] == ["new/0"]
    await pool.add(group("long"))
    assert pool.dropped == {"stale": 2}
    assert pool.admitted == pool.trained + 2
