"""Engines behind one address: routing, weight transfers to all that live, scaling.

Invariants: a group's samples are yielded exactly once or its engine's loss is raised; an engine
that is lost, or that holds older weights than its peers, takes no request; nothing is awaited
without a deadline. A transfer that fails before the commit leaves an engine whole under its old
label; one that fails inside it is killed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import replace
from typing import Any

from actors.engine_process import EngineStart, cause_of
from actors.engines import Engines
from h1r_rl.config.schema import RolloutConfig, WeightsConfig
from h1r_rl.deadlines import within
from h1r_rl.errors import DataError, RunFailed, WeightTransferError
from h1r_rl.interfaces import Sampling
from h1r_rl.records import GroupPart, Prompt
from h1r_rl.weight_manifest import TransferEpoch, WeightManifest

CALL_DEADLINE_S = 30.0
GRACE_S = 10.0  # an engine keeps its own deadlines; past this it does not answer at all


class RolloutPool:
    def __init__(self, config: RolloutConfig, weights: WeightsConfig, start: EngineStart) -> None:
        self._config = config
        self._deadline_s = weights.deadline_s + GRACE_S
        self._engines = Engines(config, weights, start)
        self._in_epoch: list[str] = []  # who met the learner
        self._parcel = ("nothing", "nothing")  # first and last parameter of the transfer under way

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
            await asyncio.gather(*pool._engines.add(config.actors))
        except BaseException as error:
            await pool.close()
            if isinstance(error, Exception):
                raise RunFailed(f"a rollout engine did not start: {cause_of(error)}") from error
            raise
        return pool

    def members(self) -> dict[str, int]:
        """Live engines and how many communicator ranks each needs."""
        return dict.fromkeys(self._engines.ready(), self._config.tensor_parallel)

    def num_engines(self) -> int:
        """Engines that stay, those included that are still starting."""
        return sum(not member.leaving for member in self._engines.members.values())

    def settled(self) -> bool:
        """As many engines serve as are wanted: none is starting, leaving, behind or missing."""
        return self._engines.settled()

    def behind(self) -> list[str]:
        """Live engines without the newest weights: they serve nothing until a transfer to them."""
        return self._engines.behind()

    def newest(self) -> str:
        """Label of the newest weights that an engine was given."""
        return self._engines.version

    def on_change(self, listener: Callable[[], None]) -> None:
        """Call `listener` whenever engines come, go or change their load."""
        self._engines.changed.listen(listener)

    async def any_engine(self) -> None:
        """Wait until an engine can be sent weights; raises RunFailed when none will come."""
        while not self._engines.ready():
            self._engines.check_hope()
            await self._engines.changed.next(CALL_DEADLINE_S)

    async def generate(
        self, prompt: Prompt, sample_indices: Sequence[int], sampling: Sampling
    ) -> AsyncIterator[GroupPart]:
        """Parts of one group as samples finish, all from the least loaded engine. Waits while
        engines are starting or being brought up to date."""
        engines = self._engines
        name, member = await engines.serving()
        waiting = set(sample_indices)
        engines.owe(member, len(waiting))
        stream = member.actor.generate.options(num_returns="streaming").remote(
            prompt, tuple(sample_indices), sampling
        )
        refs = stream.__aiter__()
        what = f"{name}: the next sample of {prompt.key}"
        try:
            while waiting:
                timeout_s = self._config.request_timeout_s
                part = await within(await self._next(name, refs, what), timeout_s, what)
                bulk = await within(anext(refs), timeout_s, what)  # the reference, not the tokens
                waiting -= set(part.sample_indices)
                engines.owe(member, -len(part.sample_indices))
                yield replace(part, completions_ref=bulk)
        except DataError:
            raise  # the prompt's fault, not the engine's
        except (StopAsyncIteration, TimeoutError, *_ray_errors()) as error:
            raise engines.lose(name, error) from error
        finally:
            engines.owe(member, -len(waiting))
            if waiting:
                _cancel(stream)  # nobody waits for these samples any more

    async def _next(self, name: str, refs: Any, what: str) -> Any:
        """The stream's next reference, for as long as its engine makes tokens: an answer of tens
        of thousands among others takes longer than any deadline that finds a frozen engine."""
        waiting = asyncio.ensure_future(anext(refs))
        half_s, before = self._config.request_timeout_s / 2, -1.0
        try:
            while not (await asyncio.wait([waiting], timeout=half_s))[0]:
                tokens = (await self._each("stats", [name])).get(name, {}).get("tokens", before)
                if tokens == before:
                    raise TimeoutError(f"{what}: none and no token for {half_s:g} s")
                before = tokens
            return await waiting
        finally:
            waiting.cancel()

    async def join_epoch(self, epoch: TransferEpoch) -> None:
        """All live engines meet the learner. Raises WeightTransferError naming who did not."""
        self._engines.in_transfer = True  # a leaver stays for it
        self._in_epoch = list(epoch.rank_offsets)
        deadline_s = epoch.deadline_s + GRACE_S
        joined = await self._engines.ask(
            "join_epoch", epoch, deadline_s=deadline_s, among=self._in_epoch
        )
        self._raise_failed(f"joining epoch {epoch.number} of the learner (rank 0)", joined)

    async def begin_receive(self, manifest: WeightManifest) -> None:
        """Stage one transfer beside running generations; returns at once."""
        self._engines.in_transfer = True
        names = [spec.name for spec in manifest.parameters]
        self._parcel = (names[0], names[-1])
        begun = await self._engines.ask(
            "begin_receive", manifest, deadline_s=self._deadline_s, among=self._in_epoch
        )
        self._raise_failed(f"receiving from the learner (rank 0), before {names[0]},", begun)

    async def commit(self, version: str) -> float:
        """Engines that received the transfer hold `version`; the longest pause in seconds.

        An engine that did not receive it keeps its old label, serves nothing once a peer has the
        new one, and is named in the error.
        """
        engines = self._engines
        staged = await engines.ask("staged", deadline_s=self._deadline_s, among=self._in_epoch)
        ready = [name for name, answer in staged.items() if not isinstance(answer, BaseException)]
        pauses = await engines.ask("commit", version, deadline_s=self._deadline_s, among=ready)
        held = {n: p for n, p in pauses.items() if not isinstance(p, BaseException)}
        for name in held:
            engines.version = version
            if name in engines.members:  # else it was lost while a peer still committed
                engines.members[name].version = version
        self.end_transfer()
        what = f"version {version} of the learner (rank 0), {self._parcel[0]} to {self._parcel[1]},"
        self._raise_failed(what, staged | pauses)
        if not held:
            raise WeightTransferError(f"{what} failed on every engine: lost before they committed")
        return max(held.values())

    def end_transfer(self) -> None:
        """The transfer under way is over, whatever came of it."""
        self._engines.in_transfer = False
        self._engines.changed.give()

    async def receivers_words(self) -> str:
        """What the engines say went wrong with the last thing they joined or received."""
        answers = await self._engines.ask(
            "staged", deadline_s=self._deadline_s, among=self._in_epoch
        )
        failed = [f"{n}: {cause_of(a)}" for n, a in answers.items() if isinstance(a, BaseException)]
        return "; ".join(failed)

    def give_up(self, names: Sequence[str], cause: BaseException) -> None:
        """Kill engines that cannot be brought up to date."""
        for name in names:
            self._engines.lose(name, cause)

    async def probe(self, prompt: Prompt) -> dict[str, Any]:
        """Log-probabilities that each up-to-date engine gives the prompt's own tokens."""
        current = [name for name in self._engines.ready() if name not in self.behind()]
        return await self._each("score", current, prompt)

    async def ask_worker(self, method: str) -> dict[str, Any]:
        """What the first worker of each live engine says to a method of `WorkerExtension`."""
        return await self._each("ask_worker", self._engines.ready(), method)

    async def scale(self, engines: int) -> None:
        """Start or drain engines until `engines` live; joiners serve after their first commit.

        Leavers get `rollout.drain_timeout_s` to finish; what they still hold then is lost to them
        and issued again elsewhere.
        """
        await self._engines.scale(engines)

    async def restart(self) -> None:
        """Lose every engine at once and wait for what replaces them, outside the allowance for
        faults."""
        await self._engines.restart()

    async def stats(self) -> dict[str, float]:
        """Sums over the live engines (`kv_usage`: the fullest)."""
        answers = list((await self.engine_stats()).values())
        totals = {key: sum(a[key] for a in answers) for key in (answers[0] if answers else ())}
        if answers:
            totals["kv_usage"] = max(answer["kv_usage"] for answer in answers)
        return totals | self.counts()

    def counts(self) -> dict[str, float]:
        """Engines alive, starting, and lost so far."""
        engines = self._engines
        return {
            "engines": float(len(engines.ready())),
            "engines_starting": float(len(engines.members) - len(engines.ready())),
            "engines_lost": float(len(engines.lost)),
        }

    async def engine_stats(self) -> dict[str, dict[str, float]]:
        """Each live engine's own numbers."""
        return await self._each("stats", self._engines.ready())

    async def facts(self) -> dict[str, dict[str, Any]]:
        """Where each live engine runs: node, process ids, the label of its weights."""
        return await self._each("facts", self._engines.ready())

    async def drop_silent(self) -> None:
        """Lose every engine that does not answer."""
        await self._each("version", self._engines.ready())

    def lost(self) -> dict[str, str]:
        """Engines that died or were given up, and why."""
        return dict(self._engines.lost)

    async def close(self) -> None:
        """Shut engines down under one deadline, then make sure."""
        await self._engines.close()

    async def _each(self, method: str, names: list[str], *args: Any) -> dict[str, Any]:
        """The answers of those that answered."""
        answers = await self._engines.ask(method, *args, deadline_s=CALL_DEADLINE_S, among=names)
        return {n: a for n, a in answers.items() if not isinstance(a, BaseException)}

    def _raise_failed(self, what: str, answers: dict[str, Any]) -> None:
        failed = {n: cause_of(a) for n, a in answers.items() if isinstance(a, BaseException)}
        if failed or not answers:
            causes = "; ".join(f"{name}: {cause}" for name, cause in failed.items())
            raise WeightTransferError(f"{what} failed on {causes or 'every engine'}", tuple(failed))


def _cancel(stream: Any) -> None:
    import ray

    if isinstance(stream, ray.ObjectRefGenerator):
        ray.cancel(stream)


def _ray_errors() -> tuple[type[BaseException], ...]:
    from ray.exceptions import RayError

    return (RayError,)
