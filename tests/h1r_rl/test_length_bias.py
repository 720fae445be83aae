"""The lengths trained on are the lengths issued, in virtual time, whatever the staleness; a buffer
that lets any finished group overtake and drops what comes too late fails the same test."""

import asyncio
import heapq
import itertools

import numpy as np
import pytest

from h1r_rl.grpo.group_buffer import GroupBuffer
from h1r_rl.records import Group, Prompt

PER_STEP = 8
GROUPS = 3000
GENERATION_S = 1.0  # of a group of ordinary length; the learner takes as long for its step
LONG = 1 / 16
LOOP_TURNS = 6  # a waiter that was told needs a few to look again


class DropWhenLate:
    """Finished groups in any order; too old ones are thrown away. What must be rejected."""

    def __init__(self, *, prompts_per_step: int, max_staleness: int, max_backfill: int) -> None:
        self.per_step, self.staleness = prompts_per_step, max_staleness
        self.num_slots = (max_staleness + 1) * prompts_per_step
        self.rolling, self.ready, self.training = {}, [], set()
        self.dropped = {"stale": 0}

    def room(self) -> bool:
        return len(self.rolling) + len(self.ready) + len(self.training) < self.num_slots

    async def admit(self, key, version) -> None:
        self.rolling[key] = version()

    async def add(self, group) -> None:
        self.ready.append((self.rolling.pop(group.key), group))

    async def cut(self, version):
        fresh = [(a, g) for a, g in self.ready if a + self.staleness >= version]
        self.dropped["stale"] += len(self.ready) - len(fresh)
        self.ready = fresh
        if len(fresh) < self.per_step:
            return None
        self.ready, chosen = fresh[self.per_step :], [g for _, g in fresh[: self.per_step]]
        self.training |= {g.key for g in chosen}
        return chosen

    async def release(self, keys) -> None:
        self.training -= set(keys)


class Deadline(GroupBuffer):
    """The real buffer under the simulation's clock: its own `take_step` waits beside the events,
    and is looked at after each."""

    def __init__(self, **settings) -> None:
        super().__init__(**settings)
        self.step: asyncio.Task | None = None

    def room(self) -> bool:
        return self._has_room()

    async def cut(self, version):
        self.step = self.step or asyncio.create_task(self.take_step(version))
        for _ in range(LOOP_TURNS):
            await asyncio.sleep(0)
        if not self.step.done():
            return None
        chosen, self.step = self.step.result(), None
        return chosen


def group(key: str) -> Group:
    return Group(Prompt(key, 0, np.zeros(1, np.int32), "", "math", "1"), (), 0)


async def simulate(buffer, lengths):
    """(order of admission of each trained group, staleness of each, admissions in all)."""
    clock, version, learner_free = 0.0, 0, True
    events, order, admitted, trained, staleness = [], itertools.count(), {}, [], []
    supply = iter(range(len(lengths)))
    open_supply = True
    while True:
        while open_supply and buffer.room():
            index = next(supply, None)
            open_supply = index is not None
            if open_supply:
                await buffer.admit(f"g{index}/0", lambda v=version: v)
                admitted[f"g{index}/0"] = version
                done = clock + GENERATION_S * lengths[index]
                heapq.heappush(events, (done, next(order), "done", [f"g{index}"]))
        if learner_free and (chosen := await buffer.cut(version)):
            keys = [g.key for g in chosen]
            trained += [int(key[1:].split("/")[0]) for key in keys]
            staleness += [version - admitted[key] for key in keys]
            learner_free = False
            heapq.heappush(events, (clock + GENERATION_S, next(order), "step", keys))
        if not events:
            if getattr(buffer, "step", None):  # the supply has ended: nothing more can come
                buffer.step.cancel()
            return np.array(trained), np.array(staleness)
        clock, _, kind, names = heapq.heappop(events)
        if kind == "done":
            await buffer.add(group(names[0]))
        else:
            version, learner_free = version + 1, True
            await buffer.release(names)


def ks_distance(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sample Kolmogorov-Smirnov statistic."""
    points = np.unique(np.concatenate([a, b]))
    left = np.searchsorted(np.sort(a), points, side="right") / len(a)
    right = np.searchsorted(np.sort(b), points, side="right") / len(b)
    return float(np.abs(left - right).max())


def lengths_of(seed: int = 0) -> np.ndarray:
    """Bimodal: one group in 16 eight times as long; noise, so that every length is its own."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random(GROUPS) < LONG, 8.0, 1.0) * rng.lognormal(0, 0.1, GROUPS)


def compare(buffer_class, staleness: int):
    """(KS distance of lengths trained and issued, its 5% bound, staleness seen, buffer)."""
    lengths = lengths_of()
    buffer = buffer_class(prompts_per_step=PER_STEP, max_staleness=staleness, max_backfill=8)
    trained, ages = asyncio.run(simulate(buffer, lengths))
    # In flight at the end: excluded by time of admission, trained or not.
    counted = GROUPS - 4 * buffer.num_slots
    trained = trained[trained < counted]
    assert counted >= 2000
    bound = 1.358 * np.sqrt((len(trained) + counted) / (len(trained) * counted))
    return ks_distance(lengths[trained], lengths[:counted]), bound, ages, trained, buffer


@pytest.mark.parametrize("staleness", [0, 1, 4])
def test_lengths_trained_are_lengths_issued(staleness):
    distance, bound, ages, trained, buffer = compare(Deadline, staleness)
    assert distance < bound
    assert ages.max() <= staleness
    assert buffer.dropped == {"stale": 0}
    counted = GROUPS - 4 * buffer.num_slots
    assert sorted(trained) == list(range(counted))  # every one of them, once


@pytest.mark.parametrize("staleness", [1, 4])
def test_a_buffer_that_drops_what_is_late_is_rejected(staleness):
    """At staleness 0 it cannot be told apart: a step waits for all its groups."""
    distance, bound, _, _, buffer = compare(DropWhenLate, staleness)
    assert buffer.dropped["stale"] > 0
    assert distance > bound
