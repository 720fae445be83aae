"""All ranks of the learner behind one address.

Invariant: every rank gets every call, in one order; a rank that dies ends the run with its cause
rather than leaving the others in a collective.
"""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
from numpy.typing import NDArray

from h1r_rl.config.schema import (
    AlgorithmConfig,
    LearnerConfig,
    LoraConfig,
    OptimizerConfig,
    WeightsConfig,
)
from h1r_rl.deadlines import within
from h1r_rl.errors import RunFailed, WeightTransferError
from h1r_rl.grpo.build_batch import TrainPlan
from h1r_rl.records import StepResult
from h1r_rl.weight_manifest import TransferEpoch, WeightManifest

STEP_DEADLINE_S = 3600.0
CLOSE_DEADLINE_S = 10.0
GRACE_S = 10.0  # past its own deadline in a transfer


# Freed memory is kept: a step's large temporaries would be given back to the kernel and faulted in
# again each time.
CPU_ENV = {
    "DS_ACCELERATOR": "cpu",
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),  # the most that glibc takes
    "MALLOC_TRIM_THRESHOLD_": str(8 << 30),
}


def rank_env(learner: LearnerConfig, *, beside_engines: bool) -> dict[str, str]:
    """Environment of a rank's process."""
    env = {"OMP_NUM_THREADS": str(learner.threads)}
    if learner.num_gpus:
        return env
    # Threads that wait spin, which is faster, unless it would take the cores of an engine.
    return env | CPU_ENV | ({"OMP_WAIT_POLICY": "passive"} if beside_engines else {})


class LearnerGroup:
    def __init__(self, actors: list[Any], zero_stage: int, transfer_deadline_s: float) -> None:
        self._actors = actors
        self._zero_stage = zero_stage
        self._transfer_deadline_s = transfer_deadline_s
        self._epochs = 0

    @classmethod
    async def start(
        cls,
        learner: LearnerConfig,
        optimizer: OptimizerConfig,
        *,
        total_steps: int,
        model_folder: str,
        algorithm: AlgorithmConfig | None,
        temperature: float,
        max_response_tokens: int,
        weights: WeightsConfig,
        seed: int,
        start_timeout_s: float,
        initial_version: int = 0,
        trust_remote_code: bool = False,
        engine_dtype: str = "float32",
        lora: LoraConfig | None = None,
    ) -> LearnerGroup:
        """Actors up, policy loaded on every rank. `algorithm` None: supervised fine-tuning.
        `engine_dtype`: of the rollout engines whose values are computed with. `lora` None: every
        parameter is trained."""
        from ray.exceptions import RayActorError

        from learners.learner_actor import LearnerActor

        env = rank_env(learner, beside_engines=algorithm is not None)
        actors = [
            LearnerActor.options(
                num_cpus=learner.num_cpus,
                num_gpus=learner.num_gpus,
                runtime_env={"env_vars": env},
                max_restarts=0,
            ).remote(rank, learner, optimizer)
            for rank in range(learner.ranks)
        ]
        group = cls(actors, learner.zero_stage, weights.deadline_s)
        try:
            meeting_point = await within(
                actors[0].address.remote(), start_timeout_s, "starting the learner's first rank"
            )
            await group._all(
                "load",
                meeting_point,
                model_folder,
                algorithm=algorithm,
                temperature=temperature,
                max_response_tokens=max_response_tokens,
                total_steps=total_steps,
                weights=weights,
                seed=seed,
                initial_version=initial_version,
                trust_remote_code=trust_remote_code,
                engine_dtype=engine_dtype,
                lora=lora,
                deadline_s=start_timeout_s,
            )
        except BaseException as error:
            group._kill()
            if isinstance(error, RayActorError):
                raise RunFailed(f"a learner rank died while starting: {error}") from error
            raise
        return group

    async def forward_backward(self, plan: TrainPlan) -> dict[str, float]:
        """Gradients of one plan accumulated on every rank; metrics are global means."""
        return (await self._all("forward_backward", plan))[0]

    async def optimizer_step(self) -> StepResult:
        return (await self._all("optimizer_step"))[0]

    async def weight_manifest(self) -> WeightManifest:
        return (await self._all("weight_manifest"))[0]

    async def open_epoch(self, world_size: int, rank_offsets: dict[str, int]) -> TransferEpoch:
        self._epochs += 1
        return await self._rank_zero("open_epoch", self._epochs, rank_offsets, world_size)

    async def join_epoch(self, epoch: TransferEpoch) -> None:
        await self._rank_zero("join_epoch", epoch)

    async def send(self) -> dict[str, float]:
        """Returns when rank 0 has sent everything. On ZeRO-3 it is a step of all ranks' compute
        threads, in line with forward passes; else it runs beside them on rank 0."""
        from ray.exceptions import RayTaskError

        if self._zero_stage < 3:
            return await self._rank_zero("send")
        try:
            deadline_s = self._transfer_deadline_s + GRACE_S
            return (await self._all("send", deadline_s=deadline_s, concurrency_group="compute"))[0]
        except RayTaskError as error:
            if isinstance(error.cause, WeightTransferError):
                raise WeightTransferError(str(error)) from error
            # The ranks may be at different buckets: another attempt could mix them.
            self._kill()
            raise RunFailed(f"a learner rank failed in send: {error.cause}") from error

    async def score(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """[T - 1] log-probabilities at temperature 1 of a document's own tokens, ids [T]."""
        return (await self._all("score", ids))[0]

    async def computed_values(self) -> dict[str, NDArray[np.float32]]:
        """What the ranks compute their state-space layers with, flat, by name."""
        return (await self._all("computed_values"))[0]

    async def save_checkpoint(self, folder: str) -> str:
        """Weights, optimizer and version into `folder`; returns the new checkpoint's path."""
        return (await self._all("save_checkpoint", folder))[0]

    async def load_checkpoint(self, folder: str) -> int:
        """All ranks continue from the newest checkpoint in `folder`; returns its version."""
        return (await self._all("load_checkpoint", folder))[0]

    async def export(self, folder: str) -> None:
        await self._all("export", folder)

    async def close(self) -> None:
        try:
            await self._all("close", deadline_s=CLOSE_DEADLINE_S)
        except RunFailed:
            pass  # they are killed next, whatever they answered
        self._kill()

    def _kill(self) -> None:
        import ray

        for actor in self._actors:
            ray.kill(actor)

    async def _rank_zero(self, method: str, *args: Any) -> Any:
        from ray.exceptions import RayActorError, RayTaskError

        try:
            return await within(
                getattr(self._actors[0], method).remote(*args),
                self._transfer_deadline_s + GRACE_S,
                f"learner rank 0: {method}",
            )
        except RayActorError as error:
            raise RunFailed(f"learner rank 0 died in {method}: {error}") from error
        except RayTaskError as error:
            cause = getattr(error, "cause", None) or error
            raise WeightTransferError(f"learner rank 0 failed in {method}: {cause}") from error
        except TimeoutError as error:  # it keeps its own deadlines: it does not answer at all
            self._kill()
            raise RunFailed(f"learner rank 0 was killed, it gave no answer: {error}") from error

    async def _all(
        self,
        method: str,
        *args: Any,
        deadline_s: float = STEP_DEADLINE_S,
        concurrency_group: str | None = None,
        **kwargs: Any,
    ) -> list[Any]:
        from ray.exceptions import RayActorError

        options = {"concurrency_group": concurrency_group} if concurrency_group else {}
        # All ranks are called before anything is awaited: collectives meet in one order everywhere.
        calls = [
            within(
                getattr(actor, method).options(**options).remote(*args, **kwargs),
                deadline_s,
                f"learner rank {rank}: {method}",
            )
            for rank, actor in enumerate(self._actors)
        ]
        try:
            return await asyncio.gather(*calls)
        except (RayActorError, TimeoutError) as error:
            raise RunFailed(f"a learner rank was lost in {method}: {error}") from error
