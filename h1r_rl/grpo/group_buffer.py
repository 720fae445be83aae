"""Slots and the deadline rule: bounded staleness without throwing finished work away.

Invariants: a group holds a slot from admission until the engines hold the weights trained on it;
slots <= (max_staleness + 1) x prompts_per_step; a group admitted at version a is trained in a step
that starts at version <= a + max_staleness. A finished group may overtake an older one only if all
older ones can still be trained in time. At max_staleness 0 this is the synchronous loop. A step
cut short for lack of signal holds the slots that it did not fill until its weights have arrived:
groups admitted there any earlier would crowd a later step's deadline.

A generation cache of C groups is C slots more: that many groups beyond what the steps need are
generated ahead and kept, at the price of ceil(C / prompts_per_step) versions more of staleness.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from h1r_rl.records import Group


@dataclass
class _Slot:
    admitted_version: int
    group: Group | None = None  # None while it is being rolled out
    taken: bool = False  # in a training step, or trained and waiting for its weights to arrive
    late: bool = False  # a fault carried the version past its deadline while it was rolled out


class GroupBuffer:
    def __init__(
        self,
        *,
        prompts_per_step: int,
        max_staleness: int,
        max_backfill: int,
        generation_cache: int = 0,
    ) -> None:
        self._per_step = prompts_per_step
        self.num_slots = (max_staleness + 1) * prompts_per_step + generation_cache
        self.max_staleness = max_staleness + math.ceil(generation_cache / prompts_per_step)
        self._max_backfill = max_backfill * prompts_per_step
        self._slots: dict[str, _Slot] = {}
        self._unfilled: list[tuple[set[str], int]] = []  # of short steps: its groups, slots held
        self._changed = asyncio.Condition()
        self._version = 0  # version that the next step starts from
        self._backfilled = 0  # admissions in place of signal-less groups, since the last step
        self.admitted = 0  # every admission ends as trained or dropped, or is in flight
        self.trained = 0
        self.dropped: dict[str, int] = {"stale": 0}

    async def admit(self, key: str, engine_version: Callable[[], int]) -> None:
        """Wait for a free slot, then hold it for the group `key`, admitted at the version that
        the engines hold at that moment."""
        async with self._changed:
            await self._changed.wait_for(self._has_room)
            if key in self._slots:
                raise ValueError(f"group {key} holds a slot already")
            self._slots[key] = _Slot(engine_version())
            self.admitted += 1

    def admitted_version(self, key: str) -> int:
        return self._slots[key].admitted_version

    async def add(self, group: Group) -> None:
        """A finished group with signal becomes available to training."""
        async with self._changed:
            self._slots[group.key].group = group
            self._drop_late()
            self._changed.notify_all()

    async def drop(self, keys: Iterable[str], reason: str) -> None:
        """Give slots back without training: no signal, quarantined, skipped step."""
        async with self._changed:
            self._forget_unfilled(keys := list(keys))
            for key in keys:
                self.trained -= self._slots.pop(key).taken
                self.dropped[reason] = self.dropped.get(reason, 0) + 1
                if reason == "no_signal":
                    self._backfilled += 1
            self._changed.notify_all()

    async def release(self, keys: Iterable[str]) -> None:
        """The engines hold the weights trained on these groups."""
        async with self._changed:
            self._forget_unfilled(keys := list(keys))
            for key in keys:
                del self._slots[key]
            self._changed.notify_all()

    async def take_step(self, version: int) -> list[Group]:
        """Groups for the step that starts at `version`: prompts_per_step of them, or fewer when
        backfill for this step is used up and nothing more can come. The bound is checked again
        here: what a fault made too old is dropped and counted."""
        async with self._changed:
            self._version = version
            for slot in self._slots.values():
                if not slot.taken:
                    slot.late = slot.admitted_version + self.max_staleness < version
            self._drop_late()
            self._changed.notify_all()
            await self._changed.wait_for(self._can_cut)
            chosen = self._choose()
            for group in chosen:
                self._slots[group.key].taken = True
            if 0 < len(chosen) < self._per_step:
                self._unfilled.append(
                    ({group.key for group in chosen}, self._per_step - len(chosen))
                )
            self.trained += len(chosen)
            self._backfilled = 0
            self._changed.notify_all()
            return chosen

    def metrics(self) -> dict[str, float]:
        open_slots = [s for s in self._slots.values() if not s.taken]
        return {
            "slots": float(self.num_slots),
            "admitted": float(self.admitted),
            "trained": float(self.trained),
            "slots_used": float(len(self._slots)),
            "taken": float(len(self._slots) - len(open_slots)),
            "ready": float(sum(s.group is not None for s in open_slots)),
            "rolling": float(sum(s.group is None for s in open_slots)),
        } | {f"dropped_{reason}": float(count) for reason, count in self.dropped.items()}

    def _has_room(self) -> bool:
        if len(self._slots) + sum(held for _, held in self._unfilled) >= self.num_slots:
            return False
        return self._backfilled <= self._max_backfill

    def _forget_unfilled(self, keys: list[str]) -> None:
        self._unfilled = [entry for entry in self._unfilled if entry[0].isdisjoint(keys)]

    def _can_cut(self) -> bool:
        open_slots = [s for s in self._slots.values() if not s.taken]
        if self._backfilled > self._max_backfill:  # no more admissions for this step
            return all(s.group is not None for s in open_slots)
        return len(self._choose()) == self._per_step

    def _drop_late(self) -> None:
        """Finished too late to be trained; one still rolled out holds nobody up meanwhile."""
        for key in [k for k, slot in self._slots.items() if slot.late and slot.group is not None]:
            del self._slots[key]
            self.dropped["stale"] += 1

    def _choose(self) -> list[Group]:
        """Finished groups in order of deadline, as many as can go first without making an older
        unfinished one late."""
        ready = [s for s in self._slots.values() if s.group is not None and not s.taken]
        ready.sort(key=lambda s: s.admitted_version)
        chosen = ready[: self._per_step]
        if not self._in_time_without(chosen):
            return []
        return [s.group for s in chosen if s.group is not None]

    def _in_time_without(self, chosen: list[_Slot]) -> bool:
        """After this step, for every deadline d the groups due by d fit the steps left."""
        picked = {id(slot) for slot in chosen}
        deadlines = sorted(
            s.admitted_version + self.max_staleness
            for s in self._slots.values()
            if not s.taken and not s.late and id(s) not in picked
        )
        for position, deadline in enumerate(deadlines):
            steps_left = deadline - self._version  # steps at version + 1 .. deadline
            if position + 1 > steps_left * self._per_step:
                return False
        return True
