"""The engine's side of `h1r selftest`: one rollout actor on an embedded Ray, weights over gloo.

Invariant: everything is a run's own path (RolloutPool, the transfer's epochs and buckets, commit);
only the sender is this process instead of a learner rank.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from actors.rollout_pool import RolloutPool
from cluster.selftest_lines import Ids, Logprobs, Trace
from h1r_rl.broadcast import Communicator, open_store
from h1r_rl.config.schema import RolloutConfig, WeightsConfig
from h1r_rl.deadlines import within
from h1r_rl.interfaces import Sampling
from h1r_rl.records import Completion, Prompt
from h1r_rl.weight_manifest import TransferEpoch, assign_ranks
from learners.weight_sender import manifest_of, send_weights

FETCH_DEADLINE_S = 60.0
BUCKET_BYTES = 2**28


class PoolEngine:
    """`cluster.selftest_lines.Engine` around a pool of one engine."""

    def __init__(self, pool: RolloutPool, weights: WeightsConfig) -> None:
        self._pool = pool
        self._weights = weights
        self._version = 0
        self._asked = 0

    @classmethod
    async def start(
        cls,
        rollout: RolloutConfig,
        *,
        folder: str,
        seed: int,
        start_timeout_s: float,
        trust_remote_code: bool,
    ) -> PoolEngine:
        weights = WeightsConfig(backend="gloo", deadline_s=300)
        pool = await RolloutPool.start(
            rollout,
            weights,
            model_folder=folder,
            seed=seed,
            initial_version="0",
            run_name="selftest",
            start_timeout_s=start_timeout_s,
            trust_remote_code=trust_remote_code,
        )
        return cls(pool, weights)

    async def score(self, ids: Ids) -> Logprobs:
        return self._one(await self._pool.probe(self._prompt(ids)))

    async def sample(
        self, prompt: Ids, samples: int, temperature: float, tokens: int
    ) -> list[Trace]:
        completions: list[Completion] = []
        sampling = Sampling(temperature, tokens)
        async for part in self._pool.generate(self._prompt(prompt), range(samples), sampling):
            completions += await within(part.completions_ref, FETCH_DEADLINE_S, "a selftest answer")
        return [
            Trace(np.concatenate([prompt, c.token_ids]), c.logprobs, temperature)
            for c in sorted(completions, key=lambda c: c.sample_index)
        ]

    async def push(self, model: Any) -> None:
        import ray

        self._version += 1
        manifest = manifest_of(model, BUCKET_BYTES)
        store = open_store()
        offsets, size = assign_ranks(self._pool.members())
        epoch = TransferEpoch(
            self._version,
            self._weights.backend,
            ray.util.get_node_ip_address(),
            store.port,
            size,
            offsets,
            self._weights.deadline_s,
        )
        communicator, _ = await asyncio.gather(
            asyncio.to_thread(Communicator, epoch, 0), self._pool.join_epoch(epoch)
        )
        await self._pool.begin_receive(manifest)
        await asyncio.to_thread(send_weights, model, manifest, communicator, sharded=False)
        await self._pool.commit(str(self._version))
        communicator.close()

    async def cached_tokens(self) -> float:
        return (await self._pool.stats())["cached_tokens"]

    async def block_tokens(self) -> int:
        return self._one(await self._pool.ask_worker("block_tokens"))

    async def held_tensors(self) -> dict[str, tuple[str, list[float]]]:
        return self._one(await self._pool.ask_worker("held_tensors"))

    async def close(self) -> None:
        await self._pool.close()

    def _prompt(self, ids: Ids) -> Prompt:
        self._asked += 1
        return Prompt(f"selftest-{self._asked}", 0, ids, "", "math", "")

    def _one(self, answers: dict[str, Any]) -> Any:
        """The only engine's answer, or the reason why there is none."""
        if not answers:
            raise RuntimeError(f"the engine was lost: {self._pool.lost()}")
        (answer,) = answers.values()
        return answer
