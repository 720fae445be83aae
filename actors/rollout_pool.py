"""Engines behind one address: routing, loss of an engine, weight transfers to all that live.

Invariants: a group's samples are yielded exactly once or its engine's loss is raised; an engine
that is lost takes no further request; nothing is awaited without a deadline. A transfer that fails
before the commit leaves an engine whole under its old label; one that fails inside it is killed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from actors.engine_args import engine_env
from h1r_rl.config.schema import RolloutConfig, WeightsConfig
from h1r_rl.deadlines import within
from h1r_rl.errors import DataError, RolloutLost, RunFailed, WeightTransferError
from h1r_rl.interfaces import Sampling
from h1r_rl.records import GroupPart, Prompt
from h1r_rl.weight_manifest import TransferEpoch, WeightManifest

CALL_DEADLINE_S = 30.0
CLOSE_DEADLINE_S = 15.0


@dataclass
class Member:
    actor: Any
    idle: asyncio.Event
    in_flight: int = 0  # samples asked for and not delivered
    behind: bool = False  # others hold newer weights: asked only when no other engine is left
    leaving: bool = False  # drains, takes no new group

    def owe(self, samples: int) -> None:
        """`samples` more (or fewer) to deliver."""
        self.in_flight += samples
        if self.in_flight:
            self.idle.clear()
        else:
            self.idle.set()


@dataclass(frozen=True)
class EngineStart:
    """What every engine of a pool starts from."""

    model_folder: str
    seed: int
    initial_version: str
    run_name: str
    start_timeout_s: float
    trust_remote_code: bool


class RolloutPool:
    def __init__(self, config: RolloutConfig, weights: WeightsConfig, start: EngineStart) -> None:
        self._config = config
        self._weights = weights
        self._start = start
        self._members: dict[str, Member] = {}
        self._lost: dict[str, str] = {}
        self._in_epoch: tuple[str, ...] = ()  # who met the learner
        self._started = 0  # engines ever started: names and seeds are never used twice

    @classmethod
    async def start(
        cls,
        config: RolloutConfig,
        weights: WeightsConfig,
        *,
        model_folder: str,
        seed: int,
        initial_version: str,
        run_name: str,
        start_timeout_s: float,
        trust_remote_code: bool = False,
    ) -> RolloutPool:
        """`config.actors` engines, all ready. Each samples under a seed of its own."""
        start = EngineStart(
            model_folder, seed, initial_version, run_name, start_timeout_s, trust_remote_code
        )
        pool = cls(config, weights, start)
        try:
            await pool._add(config.actors, behind=False)
        except BaseException as error:
            await pool.close()
            if isinstance(error, Exception):
                raise RunFailed(f"a rollout engine did not start: {_cause(error)}") from error
            raise
        return pool

    def members(self) -> dict[str, int]:
        """Live engines and how many communicator ranks each needs."""
        return {name: self._config.tensor_parallel for name in self._members}

    async def generate(
        self, prompt: Prompt, sample_indices: Sequence[int], sampling: Sampling
    ) -> AsyncIterator[GroupPart]:
        """Parts of one group as samples finish, all from the least loaded engine."""
        name, member = self._least_loaded()
        waiting = set(sample_indices)
        member.owe(len(waiting))
        stream = member.actor.generate.options(num_returns="streaming").remote(
            prompt, tuple(sample_indices), sampling
        )
        refs = stream.__aiter__()
        timeout_s = self._config.request_timeout_s
        what = f"{name}: the next sample of {prompt.key}"
        try:
            while waiting:
                part = await within(await within(anext(refs), timeout_s, what), timeout_s, what)
                bulk = await within(anext(refs), timeout_s, what)  # the reference, not the tokens
                waiting -= set(part.sample_indices)
                member.owe(-len(part.sample_indices))
                yield replace(part, completions_ref=bulk)
        except DataError:
            raise  # the prompt's fault, not the engine's
        except (StopAsyncIteration, TimeoutError, *_ray_errors()) as error:
            raise self._lose(name, error) from error
        finally:
            member.owe(-len(waiting))
            if waiting:
                _cancel(stream)  # nobody waits for these samples any more

    async def join_epoch(self, epoch: TransferEpoch) -> None:
        """All live engines meet the learner. Raises WeightTransferError naming who did not."""
        self._in_epoch = tuple(epoch.rank_offsets)
        joined = await self._ask("join_epoch", epoch, deadline_s=epoch.deadline_s + 10)
        self._raise_failed("join_epoch", joined)

    async def begin_receive(self, manifest: WeightManifest) -> None:
        begun = await self._ask("begin_receive", manifest, deadline_s=self._weights.deadline_s + 10)
        self._raise_failed("begin_receive", begun)

    async def commit(self, version: str) -> float:
        """Engines that received the transfer hold `version`; the longest pause in seconds.

        An engine that did not receive it goes on under its old label, and the error names it; once
        others have committed it is behind, until a full re-send succeeds.
        """
        deadline_s = self._weights.deadline_s + 10
        staged = await self._ask("staged", deadline_s=deadline_s)
        ready = tuple(n for n, answer in staged.items() if not isinstance(answer, BaseException))
        pauses = await self._ask("commit", version, among=ready, deadline_s=deadline_s)
        held = {n: p for n, p in pauses.items() if not isinstance(p, BaseException)}
        if held:
            for name, member in self._members.items():
                member.behind = name not in held
        self._raise_failed(f"sending version {version}", staged | pauses)
        return max(held.values())

    async def scale(self, engines: int) -> None:
        """Start or drain engines until `engines` live; joiners are behind until the next commit.

        Leavers get their deadline to finish; what they still hold then is lost and re-issued.
        """
        alive = [name for name, member in self._members.items() if not member.leaving]
        if engines > len(alive):
            await self._add(engines - len(alive), behind=True)
        for name in alive[engines:]:
            self._members[name].leaving = True
        await asyncio.gather(*(self._drain(name) for name in alive[engines:]))

    async def stats(self) -> dict[str, float]:
        """Sums over the live engines (`kv_usage`: the fullest)."""
        answers = list((await self.engine_stats()).values())
        totals = {key: sum(answer[key] for answer in answers) for key in answers[0]}
        totals["kv_usage"] = max(answer["kv_usage"] for answer in answers)
        return totals | {"engines": float(len(answers)), "engines_lost": float(len(self._lost))}

    async def engine_stats(self) -> dict[str, dict[str, float]]:
        """Each live engine's own numbers."""
        answers = await self._ask("stats", among=tuple(self._members), deadline_s=CALL_DEADLINE_S)
        alive = {n: a for n, a in answers.items() if not isinstance(a, BaseException)}
        if not alive:
            self._least_loaded()  # raises with the causes
        return alive

    def lost(self) -> dict[str, str]:
        """Engines that died or were given up, and why."""
        return dict(self._lost)

    async def close(self) -> None:
        """Shut engines down under one deadline, then make sure."""
        await self._close(list(self._members))

    async def _add(self, count: int, *, behind: bool) -> None:
        from actors.rollout_actor import RolloutActor

        start = self._start
        starts = []
        for index in range(self._started, self._started + count):
            name = f"rollout-{index}"
            actor = RolloutActor.options(
                num_cpus=self._config.num_cpus,
                num_gpus=self._config.num_gpus,
                runtime_env={"env_vars": engine_env(self._config)},
                max_restarts=0,
            ).remote(name, self._config, self._weights, start.run_name)
            member = Member(actor, asyncio.Event(), behind=behind, leaving=True)  # until ready
            member.owe(0)
            self._members[name] = member
            ready = actor.start.remote(
                start.model_folder,
                seed=start.seed + index,
                version=start.initial_version,
                trust_remote_code=start.trust_remote_code,
            )
            starts.append(self._open(name, ready))
        self._started += count
        await asyncio.gather(*starts)

    async def _open(self, name: str, ready: Any) -> None:
        await within(ready, self._start.start_timeout_s, f"starting {name}")
        self._members[name].leaving = False

    async def _drain(self, name: str) -> None:
        try:
            await within(
                self._members[name].idle.wait(), self._config.request_timeout_s, f"draining {name}"
            )
        except TimeoutError:
            pass  # its groups see the loss and are issued again
        await self._close([name])

    async def _close(self, names: list[str]) -> None:
        import ray

        members = [self._members.pop(name) for name in names if name in self._members]
        closing = [within(m.actor.close.remote(), CLOSE_DEADLINE_S, "closing") for m in members]
        await asyncio.gather(*closing, return_exceptions=True)
        for member in members:
            ray.kill(member.actor)

    def _least_loaded(self) -> tuple[str, Member]:
        open_members = [item for item in self._members.items() if not item[1].leaving]
        if not open_members:
            causes = "; ".join(f"{name}: {cause}" for name, cause in self._lost.items())
            raise RunFailed(f"no rollout engine is left ({causes})")
        return min(open_members, key=lambda item: (item[1].behind, item[1].in_flight, item[0]))

    def _lose(self, name: str, error: BaseException) -> RolloutLost:
        import ray

        member = self._members.pop(name, None)
        if member is not None:
            self._lost[name] = _cause(error)
            ray.kill(member.actor)
        return RolloutLost(name, self._lost.get(name) or _cause(error))

    async def _ask(
        self, method: str, *args: Any, deadline_s: float, among: tuple[str, ...] | None = None
    ) -> dict[str, Any]:
        """Call live engines (`among` these; default: the epoch's) at once: answers or errors.

        An engine that says WeightTransferError is alive and whole; one that fails otherwise, or
        says nothing, is lost.
        """
        among = self._in_epoch if among is None else among
        names = [name for name in self._members if name in among]
        calls = (
            within(
                getattr(self._members[name].actor, method).remote(*args),
                deadline_s,
                f"{name}: {method}",
            )
            for name in names
        )
        answers = await asyncio.gather(*calls, return_exceptions=True)
        for name, answer in zip(names, answers, strict=True):
            failed = isinstance(answer, BaseException)
            if failed and not isinstance(answer, WeightTransferError):
                self._lose(name, answer)
        return dict(zip(names, answers, strict=True))

    def _raise_failed(self, what: str, answers: dict[str, Any]) -> None:
        failed = {n: _cause(a) for n, a in answers.items() if isinstance(a, BaseException)}
        if failed:
            causes = "; ".join(f"{name}: {cause}" for name, cause in failed.items())
            raise WeightTransferError(f"{what} failed on {causes}", tuple(failed))
        if not answers:
            self._least_loaded()  # raises with the causes


def _cause(error: BaseException) -> str:
    """One line: the error that an actor raised rather than its traceback."""
    return " ".join(str(getattr(error, "cause", None) or error or repr(error)).split())[:1500]


def _cancel(stream: Any) -> None:
    import ray

    if isinstance(stream, ray.ObjectRefGenerator):
        ray.cancel(stream)


def _ray_errors() -> tuple[type[BaseException], ...]:
    from ray.exceptions import RayError

    return (RayError,)
