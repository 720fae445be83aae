"""One vLLM engine behind one Ray actor.

Invariants: token ids, logprobs and version spans are the engine's own; an abort never becomes a
Completion; weights change only in `commit`, while the engine is paused, and the label is read back
from the engine afterwards. An engine that fails inside a commit is never resumed.
"""

from __future__ import annotations

import asyncio
import dataclasses
import multiprocessing
import os
import time
import zlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray

from actors.completions import stop_ids, to_completion
from actors.engine_args import engine_args, forks_engine
from actors.engine_fork import begin_imports, fork_engines
from actors.engine_log import log_tail
from actors.engine_request import sampling_request
from actors.owner_watch import own_engine_processes
from h1r_rl.config.schema import RolloutConfig, WeightsConfig
from h1r_rl.deadlines import within
from h1r_rl.errors import DataError, RunFailed, WeightTransferError
from h1r_rl.interfaces import Sampling
from h1r_rl.records import Completion, GroupPart, Prompt
from h1r_rl.weight_manifest import TransferEpoch, WeightManifest

MAX_CALLS = 100_000  # groups generate in calls of their own: none may keep a commit waiting
CHUNK_S = 0.3  # siblings that finish this close together share a message


@ray.remote(max_concurrency=MAX_CALLS)
class RolloutActor:
    def __init__(self, name: str, config: RolloutConfig, weights: WeightsConfig, run: str) -> None:
        self._name = name
        self._run = run
        self._run_seed = 0
        self._config = config
        self._weights = weights
        self._engine: Any = None
        self._processes: list[Any] = []
        self._stats: dict[str, float] = {}
        self._totals = {"completions": 0.0, "pause_s": 0.0, "updates": 0.0, "recalled": 0.0}
        self._unpaused = asyncio.Event()
        self._unpaused.set()
        self._asked: set[str] = set()  # requests for samples that the engine has
        self._recalled: set[str] = set()  # of them, those that a commit took back

    async def start(
        self,
        model_folder: str,
        *,
        seed: int,
        run_seed: int,
        version: str,
        trust_remote_code: bool,
    ) -> None:
        """Build the engine, which samples under `seed`, and label its weights."""
        own_engine_processes()
        if forks_engine(self._config):
            begin_imports()
        from transformers import AutoTokenizer
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from actors.engine_stats import stats_recorder
        from actors.sampling_guard import refuse_foreign_logits_processors

        refuse_foreign_logits_processors()
        if forks_engine(self._config):
            fork_engines()
        self._stats, recorder = stats_recorder()
        args = engine_args(
            self._config,
            self._weights,
            model_folder=model_folder,
            seed=seed,
            trust_remote_code=trust_remote_code,
        )
        try:
            self._engine = AsyncLLM.from_engine_args(
                AsyncEngineArgs(**args), stat_loggers=[recorder]
            )
        except Exception as error:
            raise RunFailed(f"{self._name}: {error} ({log_tail()})") from error
        self._processes = multiprocessing.active_children()
        await self._engine.update_weight_version(version)
        self._version = await self._engine.get_weight_version()
        self._run_seed = run_seed
        self._tokenizer = AutoTokenizer.from_pretrained(
            model_folder, trust_remote_code=trust_remote_code
        )
        self._stop_ids = stop_ids(model_folder, self._tokenizer)

    async def facts(self) -> dict[str, Any]:
        """Where it runs, for supervision and the log."""
        return {
            "node": ray.util.get_node_ip_address(),
            "pid": os.getpid(),
            "engine_pids": [process.pid for process in self._processes],
            "version": self._version,
        }

    async def generate(
        self, prompt: Prompt, sample_indices: Sequence[int], sampling: Sampling
    ) -> AsyncIterator[Any]:
        """Yields, for each chunk of finished samples, a GroupPart and then its completions."""
        room = self._config.max_model_len - len(prompt.token_ids)
        if sampling.max_tokens > room:
            raise DataError(
                f"prompt {prompt.key} of {len(prompt.token_ids)} tokens leaves {room} of "
                f"rollout.max_model_len ({self._config.max_model_len}), expected room for "
                f"{sampling.max_tokens}; drop the prompt or raise the limit"
            )
        started = time.monotonic()
        tasks = [
            asyncio.create_task(self._sample(prompt, index, sampling)) for index in sample_indices
        ]
        pending = set(tasks)
        try:
            while pending:
                done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                if pending:
                    more, pending = await asyncio.wait(pending, timeout=CHUNK_S)
                    done |= more
                finished = [task.result() for task in tasks if task in done]
                yield GroupPart(
                    sample_indices=tuple(c.sample_index for c in finished),
                    lengths=tuple(len(c.token_ids) for c in finished),
                    finish_reasons=tuple(c.finish_reason for c in finished),
                    version_spans=tuple(c.version_spans for c in finished),
                    surprise=tuple(-float(c.logprobs.mean()) for c in finished),
                    engine=self._name,
                    seconds=time.monotonic() - started,
                )
                yield finished
        finally:
            for task in tasks:
                task.cancel()

    async def _sample(self, prompt: Prompt, index: int, sampling: Sampling) -> Completion:
        final = None
        while final is None:
            final = await self._answer(prompt, index, sampling)
        completion = to_completion(final.outputs[0], index, self._name, self._tokenizer)
        self._totals["completions"] += 1
        return completion

    async def _answer(self, prompt: Prompt, index: int, sampling: Sampling) -> Any:
        """vLLM's final output; None where a commit took the request back before its first token."""
        from vllm.v1.engine.exceptions import EngineDeadError

        # A request that came in during a commit would be salted with the version that it leaves.
        await within(self._unpaused.wait(), self._config.request_timeout_s, "a weight update")
        inputs, parameters = sampling_request(
            prompt,
            sampling,
            stop_ids=self._stop_ids,
            seed=self._request_seed(prompt, index),
            cache_salt=self._version if self._config.prefix_caching else None,
        )
        request_id = f"{self._run}/{prompt.key}/{index}/{time.monotonic_ns()}"
        final = None
        self._asked.add(request_id)
        try:
            async for output in self._engine.generate(inputs, parameters, request_id):
                final = output
        except EngineDeadError as error:
            raise RuntimeError(await self._death_notice()) from error
        finally:
            self._asked.discard(request_id)
            recalled = request_id in self._recalled
            self._recalled.discard(request_id)
        if final is None or final.outputs[0].finish_reason not in ("stop", "length"):
            if recalled:
                return None
            raise RuntimeError(f"the engine aborted request {request_id}")
        return final

    def _request_seed(self, prompt: Prompt, index: int) -> int | None:
        if not self._config.request_seeds:
            return None
        return zlib.crc32(f"{self._run_seed}/{prompt.key}/{index}".encode())

    async def score(self, prompt: Prompt) -> NDArray[np.float32]:
        """[prompt tokens - 1] log-probabilities of the prompt's own tokens under the weights held
        now, from one prefill that reads no cache."""
        from vllm import SamplingParams
        from vllm.inputs import TokensPrompt

        await within(self._unpaused.wait(), self._config.request_timeout_s, "a weight update")
        final = None
        async for output in self._engine.generate(
            TokensPrompt(prompt_token_ids=prompt.token_ids.tolist()),
            SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0),
            f"{self._run}/{prompt.key}/score/{time.monotonic_ns()}",
        ):
            final = output
        if final is None or final.prompt_logprobs is None:
            raise RuntimeError("the engine aborted a scoring request")
        pairs = zip(final.prompt_logprobs[1:], prompt.token_ids[1:].tolist(), strict=True)
        return np.array([entry[token].logprob for entry, token in pairs], dtype=np.float32)

    async def join_epoch(self, epoch: TransferEpoch) -> None:
        """Meet the learner and the other engines; returns when this engine has."""
        await self._command(
            action="join",
            epoch=dataclasses.asdict(epoch),
            rank_offset=epoch.rank_offsets[self._name],
        )
        await self._settled(epoch.deadline_s, f"joining epoch {epoch.number}")

    async def begin_receive(self, manifest: WeightManifest) -> None:
        """Stage a transfer on the workers' own threads; returns at once."""
        await self._command(
            action="receive",
            parameters=[(p.name, list(p.shape), p.dtype) for p in manifest.parameters],
            bucket_bytes=manifest.bucket_bytes,
        )

    async def staged(self) -> None:
        """Returns when every worker holds a whole, checked transfer beside its model."""
        await self._settled(self._weights.deadline_s, "receiving weights")

    async def commit(self, version: str) -> float:
        """Load what was staged while generation is paused; returns seconds of pause."""
        started = time.monotonic()
        self._unpaused.clear()
        await within(self._swap(version), self._weights.deadline_s, f"committing {version!r}")
        self._version = version
        self._unpaused.set()
        pause_s = time.monotonic() - started
        self._totals["pause_s"] += pause_s
        self._totals["updates"] += 1
        return pause_s

    async def _swap(self, version: str) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferUpdateRequest

        recompute = self._config.running_state == "recompute"
        await self._engine.pause_generation(mode="keep", clear_cache=recompute)
        await self._engine.start_weight_update()
        await self._engine.update_weights(WeightTransferUpdateRequest(update_info={}))
        await self._engine.finish_weight_update(weight_version=version)
        held = await self._engine.get_weight_version()
        if held != version:
            raise RuntimeError(f"it says that it holds version {held!r} after {version!r} was sent")
        if self._config.prefix_caching and not recompute:
            await self._recall_untouched()
        await self._engine.resume_generation()

    async def _recall_untouched(self) -> None:
        """Requests without a token, queued or part of the way through their prompt, carry the old
        version's salt, by which they would read the old weights' blocks: they are taken back, and
        asked again under the new one."""
        states = self._engine.output_processor.request_states.values()
        untouched = {s.external_req_id for s in states if s.is_prefilling} & self._asked
        self._recalled |= untouched
        self._totals["recalled"] += len(untouched)
        await self._engine.abort(untouched)

    async def version(self) -> str:
        return await self._engine.get_weight_version()

    async def ask_worker(self, method: str) -> Any:
        """The answer of the first worker's `WorkerExtension` method."""
        return (await self._engine.collective_rpc(method))[0]

    async def health(self) -> None:
        """Raises when the engine is dead."""
        from vllm.v1.engine.exceptions import EngineDeadError

        try:
            await self._engine.check_health()
        except EngineDeadError as error:
            raise RuntimeError(await self._death_notice()) from error

    async def stats(self) -> dict[str, float]:
        return self._stats | self._totals

    async def close(self) -> None:
        engine, self._engine = self._engine, None
        if engine is not None:
            await asyncio.to_thread(engine.shutdown)

    async def _command(self, **command: Any) -> None:
        from vllm.distributed.weight_transfer.base import WeightTransferInitRequest

        await within(
            self._engine.init_weight_transfer_engine(WeightTransferInitRequest(command)),
            self._weights.deadline_s,
            f"{self._name}: weight transfer {command['action']}",
        )

    async def _settled(self, deadline_s: float, what: str) -> None:
        """Poll the workers, which go on generating, until what was begun has ended."""
        end = time.monotonic() + deadline_s
        pause_s = 0.005
        while time.monotonic() < end:
            outcomes = await within(
                self._engine.collective_rpc("weight_transfer_outcome"),
                self._weights.deadline_s,
                f"{self._name}: asking about {what}",
            )
            failed = [outcome for outcome in outcomes if outcome not in ("running", "done")]
            if failed:
                raise WeightTransferError(f"{self._name}, {what}: {failed[0]}", (self._name,))
            if "running" not in outcomes:
                return
            await asyncio.sleep(pause_s)
            pause_s = min(1.5 * pause_s, 0.25)
        raise WeightTransferError(
            f"{self._name}, {what}: not complete after its deadline of {deadline_s:g} s",
            (self._name,),
        )

    async def _death_notice(self) -> str:
        await asyncio.sleep(0.5)  # the exit code and the last words may come a moment later
        codes = [process.exitcode for process in self._processes]
        return f"the engine process ended with exit code {codes} ({log_tail()})"
