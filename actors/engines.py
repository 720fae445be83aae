"""The engines of a pool: who lives, who is lost and replaced, who leaves.

Invariants: a name and a seed are never used twice; an engine that fails or does not answer is
killed and gone from `members`; one that was asked to leave is not replaced, and whoever waits for
its samples is told that the loss was planned.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Any

from actors.engine_process import (
    EngineStart,
    Member,
    cause_of,
    close_actors,
    kill_actor,
    start_actor,
)
from actors.notice import Notice
from h1r_rl.config.schema import RolloutConfig, WeightsConfig
from h1r_rl.deadlines import within
from h1r_rl.errors import RolloutLost, RunFailed, WeightTransferError

logger = logging.getLogger(__name__)

LOOK_AGAIN_S = 30.0


class Engines:
    def __init__(self, config: RolloutConfig, weights: WeightsConfig, start: EngineStart) -> None:
        self._config = config
        self._weights = weights
        self._start = start
        self.members: dict[str, Member] = {}
        self.lost: dict[str, str] = {}
        self.version = start.initial_version  # newest label that an engine holds
        self.in_transfer = False  # nobody leaves between begin_receive and commit
        self.changed = Notice()
        self._left: set[str] = set()
        self._num_started = 0
        self._target = config.actors
        self._replacements_left = config.max_replacements
        self._replacing: set[asyncio.Task[None]] = set()

    def ready(self) -> list[str]:
        return [name for name, member in self.members.items() if member.ready]

    def behind(self) -> list[str]:
        """Ready engines without the newest weights."""
        return [name for name in self.ready() if self.members[name].version != self.version]

    def settled(self) -> bool:
        """See `RolloutPool.settled`."""
        members = self.members.values()
        return len(self.members) == self._target and all(
            m.ready and not m.leaving and m.version == self.version for m in members
        )

    async def serving(self) -> tuple[str, Member]:
        """The least loaded engine that serves; waits while one may yet come."""
        while True:
            staying = {n: m for n, m in self.members.items() if not m.leaving}
            serving = [(n, m) for n, m in staying.items() if m.ready and m.version == self.version]
            if serving:
                return min(serving, key=lambda item: (item[1].in_flight, item[0]))
            self.check_hope()
            await self.changed.next(LOOK_AGAIN_S)

    def check_hope(self) -> None:
        """Raise when no engine lives and none is being started."""
        if not any(not member.leaving for member in self.members.values()):
            causes = "; ".join(f"{name}: {cause}" for name, cause in self.lost.items())
            raise RunFailed(f"no rollout engine is left ({causes})")

    def owe(self, member: Member, samples: int) -> None:
        """`samples` more (or fewer) to deliver."""
        member.in_flight += samples
        self.changed.give()

    def add(self, count: int) -> list[Any]:
        """Begin to start `count` engines; awaitables that end when each is ready."""
        opening = []
        for index in range(self._num_started, self._num_started + max(count, 0)):
            name = f"rollout-{index}"
            actor, ready = start_actor(name, index, self._config, self._weights, self._start)
            self.members[name] = Member(actor, self._start.initial_version)
            opening.append(self._open(name, ready))
        self._num_started += len(opening)
        return opening

    async def scale(self, engines: int) -> None:
        """See `RolloutPool.scale`."""
        self._target = engines
        staying = [name for name, member in self.members.items() if not member.leaving]
        opening = self.add(engines - len(staying))
        leavers = staying[engines:]
        for name in leavers:
            self.members[name].leaving = True
            self._left.add(name)
        outcomes = await asyncio.gather(*opening, return_exceptions=True)
        await asyncio.gather(*(self._drain(name) for name in leavers))
        failed = [cause_of(outcome) for outcome in outcomes if isinstance(outcome, Exception)]
        if failed:
            self._target = len([m for m in self.members.values() if not m.leaving])
            raise RunFailed(f"{len(failed)} of {len(opening)} engines did not start: {failed[0]}")

    async def restart(self) -> None:
        """Lose every engine; each is replaced outside the allowance for faults. Returns when the
        replacements are there; raises RunFailed when fewer are."""
        staying = [name for name, member in self.members.items() if not member.leaving]
        self._replacements_left += len(staying)
        for name in staying:
            self._left.add(name)
            self.lose(name, RuntimeError("restarted on request"))
        while self._replacing:
            await asyncio.wait(set(self._replacing))
        lacking = self._target - sum(not member.leaving for member in self.members.values())
        if lacking > 0:
            raise RunFailed(
                f"{lacking} of {len(staying)} engines did not come back: "
                f"{list(self.lost.values())[-1]}"
            )

    def lose(self, name: str, error: BaseException, *, replace: bool = True) -> RolloutLost:
        """Kill the engine, start another in its place; returns what its requests are to raise."""
        member = self.members.pop(name, None)
        if member is not None:
            kill_actor(member.actor)
            if not member.leaving:
                self.lost[name] = cause_of(error)
                logger.warning("%s was lost: %s", name, self.lost[name])
                if replace:
                    self._replace()
            self.changed.give()
        cause = self.lost.get(name) or cause_of(error)
        return RolloutLost(name, cause, planned=name in self._left)

    async def ask(
        self, method: str, *args: Any, deadline_s: float, among: list[str]
    ) -> dict[str, Any]:
        """Call engines at once: answers or errors by name.

        An engine that says WeightTransferError is alive and whole; one that fails otherwise, or
        says nothing, is lost.
        """
        names = [name for name in self.members if name in among]
        calls = (
            within(
                getattr(self.members[name].actor, method).remote(*args),
                deadline_s,
                f"{name}: {method}",
            )
            for name in names
        )
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for name, answer in zip(names, answers, strict=True):
            if isinstance(answer, BaseException) and not isinstance(answer, WeightTransferError):
                self.lose(name, answer)
        return dict(zip(names, answers, strict=True))

    async def close(self) -> None:
        for task in self._replacing:
            task.cancel()
        members, self.members = self.members, {}
        await close_actors([member.actor for member in members.values()])

    async def _open(self, name: str, ready: Any) -> None:
        try:
            await within(ready, self._start.start_timeout_s, f"starting {name}")
        except Exception as error:
            self.lose(name, error, replace=False)
            raise
        if name in self.members:
            self.members[name].ready = True
            self.changed.give()

    async def _drain(self, name: str) -> None:
        member, deadline_s = self.members[name], self._config.drain_timeout_s
        try:
            await self.changed.until(lambda: not member.in_flight, deadline_s, f"draining {name}")
        except TimeoutError:
            logger.warning("%s left samples unfinished: other engines get them", name)
        await self.changed.until(
            lambda: not self.in_transfer, 4 * self._weights.deadline_s, "the transfer under way"
        )
        if self.members.pop(name, None) is not None:
            await close_actors([member.actor])
        self.changed.give()

    def _replace(self) -> None:
        """Start an engine in place of a lost one, while the allowance lasts."""
        staying = [member for member in self.members.values() if not member.leaving]
        if len(staying) >= self._target or not self._replacements_left:
            return
        self._replacements_left -= 1
        (opening,) = self.add(1)
        task = asyncio.create_task(self._replacement(opening))
        self._replacing.add(task)
        task.add_done_callback(self._replacing.discard)
        task.add_done_callback(lambda _: opening.close())  # where the pool closed before it began

    async def _replacement(self, opening: Any) -> None:
        try:
            await opening
        except Exception:
            self._replace()  # `lose` has told why
