"""Requests to a live run: more or fewer rollout actors and reward workers, services restarted.

A request is a file in `control/` of the run folder, which the run loop reads between steps; so it
comes from any process that sees the folder, for an embedded cluster and a remote one alike.
Invariants: requests found together are one change (the last word on each number counts); a change
begins at a step boundary and goes on beside the steps; the next one begins after it. None ends the
run, but for a learner that does not come back. What `rollout.autoscale` wants is such a change; it
stands back behind what is asked for, and lets every change stand for its cool-down.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from cluster.autoscale import Autoscaler
from cluster.run_folder import RunFolder, write_json
from h1r_rl.config.schema import RunConfig
from h1r_rl.errors import ConfigError

logger = logging.getLogger(__name__)

ENDED = "the run ended before it was done"


@dataclass(frozen=True)
class Request:
    """None: leave as it is."""

    rollout_actors: int | None = None
    reward_workers: int | None = None
    restart_rollouts: bool = False
    restart_learner: bool = False

    def __post_init__(self) -> None:
        for name in ("rollout_actors", "reward_workers"):
            count = getattr(self, name)
            if count is not None and (type(count) is not int or count < 1):
                raise ValueError(f"{name}: expected a number from 1, found {count!r}")

    def then(self, later: Request) -> Request:
        """Both at once."""
        given = {name: value for name, value in asdict(later).items() if value}
        return replace(self, **given)

    def __str__(self) -> str:
        parts = [f"{n} rollout actors" for n in [self.rollout_actors] if n]
        parts += [f"{n} reward workers" for n in [self.reward_workers] if n]
        parts += ["rollout actors restarted"] if self.restart_rollouts else []
        return ", ".join(parts + (["learner restarted"] if self.restart_learner else []))


class ControlFolder:
    """`control/` of a run folder: requests on their way in, outcomes on their way out."""

    def __init__(self, run_folder: Path) -> None:
        self._path = run_folder / "control"

    def ask(self, request: Request) -> str:
        """Leave a request; returns its id."""
        name = f"{time.time_ns():020d}"
        write_json(self._path / f"request-{name}.json", asdict(request))
        return name

    def take(self) -> tuple[list[str], Request]:
        """(ids, all waiting requests as one)."""
        names, request = [], Request()
        for file in sorted(self._path.glob("request-*.json")):
            name = file.stem.removeprefix("request-")
            try:
                request = request.then(Request(**json.loads(file.read_text())))
                names.append(name)
            except (OSError, TypeError, ValueError) as error:
                self.tell([name], "refused", f"{file.name} is no request: {error}")
            file.unlink(missing_ok=True)
        return names, request

    def clear(self) -> None:
        """Drop what an earlier process of this run was asked and did not take up. Before the run's
        first stage: what this one is asked before its GRPO stage waits for it."""
        for file in self._path.glob("request-*.json"):
            file.unlink(missing_ok=True)

    def tell(self, names: list[str], outcome: str, text: str) -> None:
        """`outcome`: begun, done, refused or failed."""
        for name in names:
            write_json(self._path / f"outcome-{name}.json", {"outcome": outcome, "text": text})

    def outcome(self, name: str) -> tuple[str, str]:
        """("waiting", "") until the run has taken the request up."""
        file = self._path / f"outcome-{name}.json"
        if not file.exists():
            return "waiting", ""
        told = json.loads(file.read_text())
        return told["outcome"], told["text"]


class Scaling:
    """The run's side: takes requests up and carries them out beside the steps."""

    def __init__(
        self,
        config: RunConfig,
        control: ControlFolder,
        *,
        rollouts: Any,
        rewards: Any,
        tracker: Any,
        free: Callable[[], dict[str, float]],
        wave: int,
    ) -> None:
        """`free`: the cluster's resources that nobody holds. `wave`: see `autoscale`."""
        self._config = config
        self._control = control
        self._rollouts = rollouts
        self._rewards = rewards
        self._tracker = tracker
        self._free = free
        bounds = config.rollout.autoscale
        self._autoscaler = Autoscaler(bounds, rollouts, wave) if bounds else None
        self._running: asyncio.Task[None] | None = None

    def after_step(self, metrics: Mapping[str, float]) -> None:
        """What a step measured, for `rollout.autoscale`."""
        if self._autoscaler:
            self._autoscaler.after_step(metrics)

    async def at_boundary(self, step: int, restart_learner: Callable[[], Awaitable[None]]) -> None:
        """Take up what was asked since. Engines and workers come and go beside the next steps; the
        learner is restarted here and now, while engines go on generating."""
        if self._running is not None and not self._running.done():
            return
        names, request = self._control.take()
        why = ""
        if not str(request) and self._autoscaler and (wanted := self._autoscaler.take()):
            request, why = Request(rollout_actors=wanted[0]), f" ({wanted[1]})"
        if not str(request):
            self._control.tell(names, "refused", "nothing was asked for")
            return
        obstacle = self._outside(request) or self._lacking(request)
        if obstacle:
            self._tell(step, names, "refused", f"{request} not possible: {obstacle}{why}")
            return
        if self._autoscaler:
            self._autoscaler.settle()
        started = time.monotonic()
        self._tell(step, names, "begun", f"{request} from step {step}{why}")
        if request.restart_learner:
            try:
                await restart_learner()
            except Exception as error:  # without a learner there is no run
                self._tell(step, names, "failed", f"{request} from step {step}: {error}")
                raise
        self._running = asyncio.create_task(self._carry_out(step, names, request, started))

    async def close(self) -> None:
        """The run ends: whoever still waits for an outcome is told."""
        names, request = self._control.take()
        self._control.tell(names, "failed", f"{request}: {ENDED}")
        if self._running is not None:
            self._running.cancel()
            await asyncio.gather(self._running, return_exceptions=True)

    async def _carry_out(
        self, step: int, names: list[str], request: Request, started: float
    ) -> None:
        try:
            changes: list[Awaitable[None]] = []
            if request.restart_rollouts:
                changes.append(self._rollouts.restart())
            if request.rollout_actors:
                changes.append(self._rollouts.scale(request.rollout_actors))
            if request.reward_workers:
                changes.append(self._rewards.resize(request.reward_workers))
            outcomes = await asyncio.gather(*changes, return_exceptions=True)
        except asyncio.CancelledError:
            self._tell(step, names, "failed", f"{request} asked at step {step}: {ENDED}")
            raise
        failed = [str(outcome) for outcome in outcomes if isinstance(outcome, BaseException)]
        text = f"{request} asked at step {step}, after {time.monotonic() - started:.1f} s"
        if failed:
            self._tell(step, names, "failed", f"{text}: {'; '.join(failed)}")
        else:
            self._tell(step, names, "done", text)

    def _tell(self, step: int, names: list[str], outcome: str, text: str) -> None:
        logger.info("scale: %s: %s", outcome, text)
        self._control.tell(names, outcome, text)
        self._tracker.set_tag(f"scale.{step:05d}.{outcome}", text)

    def _outside(self, request: Request) -> str:
        """What the run file forbids."""
        bounds, asked = self._config.rollout.autoscale, request.rollout_actors
        if bounds is None or asked is None or bounds.min <= asked <= bounds.max:
            return ""
        return f"rollout.autoscale keeps this run between {bounds.min} and {bounds.max} engines"

    def _lacking(self, request: Request) -> str:
        """What the cluster has too little of, or nothing."""
        rollout, reward = self._config.rollout, self._config.reward
        engines = (request.rollout_actors or 0) - self._rollouts.num_engines()
        workers = (request.reward_workers or 0) - self._rewards.num_workers()
        needed = {
            "CPU": max(engines, 0) * rollout.num_cpus + max(workers, 0) * reward.num_cpus,
            "GPU": max(engines, 0) * rollout.num_gpus,
        }
        free = self._free()
        return "; ".join(
            f"it needs {n:g} {kind} more, {free.get(kind, 0):g} are free (nodes, cluster.num_cpus, "
            "rollout.num_cpus and reward.num_cpus decide)"
            for kind, n in needed.items()
            if n > free.get(kind, 0) + 1e-6
        )


def request_of(run_folder: Path, request: Request, wait_s: float) -> tuple[str, str]:
    """Ask a live run and wait up to `wait_s` for the outcome: (outcome, text)."""
    if not (run_folder / "resolved.yaml").is_file():
        raise ConfigError(f"expected a run's folder, found none in {run_folder}; name it by path")
    folder = RunFolder(run_folder)
    if not folder.is_live():
        raise ConfigError(f"expected a live run in {run_folder}, found none; start it first")
    if "grpo" in folder.state().get("done", []):
        raise ConfigError(
            f"expected a run in {run_folder} whose GRPO stage is going on or still to come, found "
            "it done; the other stages keep their services"
        )
    control = ControlFolder(run_folder)
    name = control.ask(request)
    end = time.monotonic() + wait_s
    while (told := control.outcome(name))[0] in ("waiting", "begun") and time.monotonic() < end:
        time.sleep(0.2)
        if not folder.is_live() and control.outcome(name)[0] in ("waiting", "begun"):
            return "failed", f"{request}: {ENDED}"
    return told
