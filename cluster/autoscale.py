"""How many engines a run wants, from who waits for whom.

Invariant: one engine at a time, within [min, max], only for what `patience` steps in a row ask for
(and as many more as a wave has beyond one), and never within `cool_down` steps of a change. What
the rule added for a steady load it does not take away again: an engine leaves only if those left
would idle more than the learner waits, which is false of the number that it added one to.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from h1r_rl.config.schema import AutoscaleConfig


@dataclass(frozen=True)
class Waits:
    """Waits(2.5, 0.4, 0.1): of 2.5 s the learner waited 40%, the engines idled 10%."""

    seconds: float
    learner: float
    engines: float


@dataclass(frozen=True)
class RuleState:
    """RuleState((Waits(2.5, 0.4, 0.1),), 3): the last three steps asked for an engine more;
    negative: for one fewer."""

    last: tuple[Waits, ...] = ()
    streak: int = 0
    cool_down: int = 0  # steps left that do not count


def wanted_engines(
    settings: AutoscaleConfig, state: RuleState, engines: int, step: Waits, wave: int = 1
) -> tuple[int, RuleState]:
    """(engines wanted, state after `step`) of `engines` that served it.

    Groups that were admitted together are done together: the learner then waits once in a `wave`
    of steps, as many as there are batches of slots. So every step is judged with those before it
    in its wave, and one that stands out of its wave, which colours as many, is not enough.
    """
    if state.cool_down:
        return engines, RuleState(cool_down=state.cool_down - 1)
    last = (*state.last, step)[-wave:]
    vote = _vote(settings, engines, together(last))
    streak = state.streak + vote if vote * state.streak > 0 else vote
    if abs(streak) < settings.patience + wave - 1:
        return engines, RuleState(last, streak)
    return engines + vote, RuleState(cool_down=settings.cool_down)


def together(steps: tuple[Waits, ...]) -> Waits:
    """Several steps as one."""
    seconds = sum(step.seconds for step in steps)
    return Waits(
        seconds,
        sum(step.seconds * step.learner for step in steps) / seconds,
        sum(step.seconds * step.engines for step in steps) / seconds,
    )


def _vote(settings: AutoscaleConfig, engines: int, waits: Waits) -> int:
    """1: an engine more, -1: one fewer. Where both wait, at staleness 0 in turns or for verdicts,
    the difference says who is short."""
    if engines < settings.max and waits.learner - waits.engines > settings.dead_band:
        return 1
    if engines <= settings.min:
        return 0
    idle_without_one = 1 - (1 - waits.engines) * engines / (engines - 1)
    return -1 if idle_without_one - waits.learner > settings.dead_band else 0


class Autoscaler:
    """The rule beside a pool. A step counts only if the same engines served all of it, as many as
    are meant to: one that is starting, leaving or lost says nothing of the load."""

    def __init__(self, settings: AutoscaleConfig, rollouts: Any, wave: int = 1) -> None:
        self._settings = settings
        self._rollouts = rollouts
        self._wave = wave
        self._served: set[str] = set()
        self._wanted: tuple[int, str] | None = None
        self.settle()  # the first steps fill the slots

    def settle(self) -> None:
        """Something was changed: begin again after the cool-down."""
        self._state = RuleState(cool_down=self._settings.cool_down)
        self._wanted = None

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """Take in what the step measured."""
        before, self._served = self._served, set(self._rollouts.members())
        self._wanted = None
        if not self._rollouts.settled() or self._served != before:
            self._state = RuleState(cool_down=self._state.cool_down)
            return
        seconds = metrics["time/step_s"]
        # What it waits for a transfer more engines would not shorten.
        step = Waits(seconds, metrics["time/wait_s"] / seconds, metrics["engine/bubble"])
        shown = together((*self._state.last, step)[-self._wave :])
        engines = len(before)
        wanted, self._state = wanted_engines(self._settings, self._state, engines, step, self._wave)
        if wanted != engines:
            self._wanted = (
                wanted,
                f"autoscale: the learner waits {shown.learner:.0%}, {engines} engines idle "
                f"{shown.engines:.0%}",
            )

    def take(self) -> tuple[int, str] | None:
        """(engines wanted instead, why), once; None: as many as there are."""
        wanted, self._wanted = self._wanted, None
        return wanted
