"""One data-parallel rank: the policy, its optimizer, its share of every plan.

Invariant: gradients and optimizer live on the `compute` thread alone; the `weights` thread only
reads parameters, and the run loop awaits it before the next optimizer step mutates them.
"""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path
from typing import Any

import ray

from h1r_rl.config.schema import (
    AlgorithmConfig,
    LearnerConfig,
    LoraConfig,
    OptimizerConfig,
    WeightsConfig,
)
from h1r_rl.grpo.build_batch import TrainPlan
from h1r_rl.records import StepResult
from h1r_rl.weight_manifest import IN_FLIGHT, TransferEpoch, WeightManifest
from learners.schedule import learning_rate

FETCH_TIMEOUT_S = 300.0


@ray.remote(concurrency_groups={"compute": 1, "weights": 1, "control": 1})
class LearnerActor:
    def __init__(self, rank: int, learner: LearnerConfig, optimizer: OptimizerConfig) -> None:
        self._rank = rank
        self._learner = learner
        self._optimizer = optimizer
        self._version = 0
        self._communicator: Any = None
        self._store: Any = None

    @ray.method(concurrency_group="control")
    def address(self) -> tuple[str, int]:
        """This node's address and a port that was free a moment ago, for the ranks to meet."""
        with socket.socket() as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    @ray.method(concurrency_group="compute")
    def load(
        self,
        meeting_point: tuple[str, int],
        model_folder: str,
        *,
        algorithm: AlgorithmConfig | None,
        temperature: float,
        max_response_tokens: int,
        total_steps: int,
        weights: WeightsConfig,
        seed: int,
        initial_version: int,
        trust_remote_code: bool,
        engine_dtype: str,
        lora: LoraConfig | None = None,
    ) -> None:
        """Join the other ranks and load the policy into a DeepSpeed engine. It computes with the
        values that rollout engines of `engine_dtype` hold. `lora`: adapters alone are trained."""
        on_gpu = self._learner.num_gpus > 0
        os.environ.update(
            MASTER_ADDR=meeting_point[0],
            MASTER_PORT=str(meeting_point[1]),
            RANK=str(self._rank),
            WORLD_SIZE=str(self._learner.ranks),
            LOCAL_RANK="0",
        )
        import deepspeed
        import torch

        from h1r_rl.hybrid.load import load_policy
        from h1r_rl.hybrid.lora import add_adapters
        from learners.deepspeed_engine import PolicyLogprobs, build_engine
        from learners.frozen_reference import FrozenReference

        torch.manual_seed(seed + self._rank)
        if not on_gpu:
            torch.set_num_threads(self._learner.threads)
            # Else DeepSpeed compiles collectives of its own at the first start; gloo's serve.
            deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(
            "nccl" if on_gpu else "gloo", verbose=False, auto_mpi_discovery=False
        )

        def policy() -> PolicyLogprobs:
            model = load_policy(
                model_folder,
                trust_remote_code=trust_remote_code,
                device="cuda" if on_gpu else "cpu",
            )
            return PolicyLogprobs(
                model,
                temperature=temperature,
                chunk_tokens=self._learner.logprob_chunk_tokens,
                engine_dtype=engine_dtype,
            )

        trained = policy()
        if lora is not None:
            add_adapters(trained.model, lora, seed)
        self._engine = build_engine(trained, self._learner, self._optimizer)
        self._reference = None
        if algorithm is not None and algorithm.kl.coefficient:
            self._reference = (
                FrozenReference(policy(), self._learner)
                if lora is None
                else FrozenReference(trained, self._learner, beneath_adapters=True)
            )
        self._algorithm = algorithm
        self._max_response_tokens = max_response_tokens
        self._total_steps = total_steps
        self._model_folder = Path(model_folder)
        self._bucket_bytes = weights.bucket_mib * 2**20 // IN_FLIGHT
        self._deadline_s = weights.deadline_s
        self._backend = weights.backend
        self._version = initial_version
        self._first_version = initial_version

    @ray.method(concurrency_group="compute")
    def forward_backward(self, plan: TrainPlan) -> dict[str, float]:
        from learners.train_step import run_plan

        started = time.monotonic()
        metrics = run_plan(
            self._engine,
            plan,
            self._fetch(plan),
            algorithm=self._algorithm,
            reference=self._reference,
            max_response_tokens=self._max_response_tokens,
        )
        seconds = time.monotonic() - started
        metrics["forward_backward_s"] = seconds
        metrics["target_tokens_per_s"] = plan.num_target_tokens / max(seconds, 1e-9)
        return metrics

    @ray.method(concurrency_group="compute")
    def score(self, ids: Any) -> Any:
        """[T - 1] float32 log-probabilities at temperature 1 of a document's own tokens [T]."""
        import torch

        tokens = torch.from_numpy(ids).long().to(self._engine.device)
        starts = torch.tensor([0, len(ids)], device=tokens.device)
        positions = torch.arange(1, len(ids), device=tokens.device)
        with torch.no_grad():
            logprobs, _ = self._engine(tokens, starts, positions, temperature=1.0)
        return logprobs.float().cpu().numpy()

    @ray.method(concurrency_group="compute")
    def computed_values(self) -> Any:
        """float32 arrays of what a forward pass computes its state-space layers with, by the names
        of `h1r_rl.hybrid.computed_values`."""
        import numpy as np

        from h1r_rl.hybrid.computed_values import computed_values

        values = computed_values(
            self._engine.module.model, lambda: self.score(np.arange(8, dtype=np.int32))
        )
        return {name: value.numpy() for name, value in values.items()}

    @ray.method(concurrency_group="compute")
    def optimizer_step(self) -> StepResult:
        """Apply the accumulated gradients, or skip the step on every rank if any is not finite."""
        from learners.deepspeed_engine import apply_gradients

        rate = learning_rate(
            self._version - self._first_version, self._optimizer, self._total_steps
        )
        for group in self._engine.optimizer.param_groups:
            group["lr"] = rate
        norm, skipped = apply_gradients(self._engine)
        if not skipped:
            self._version += 1
        return StepResult(
            version=self._version,
            skipped=skipped,
            metrics={"grad_norm": norm, "learning_rate": rate, "skipped": float(skipped)},
        )

    @ray.method(concurrency_group="weights")
    def weight_manifest(self) -> WeightManifest:
        from learners.weight_sender import manifest_of

        self._manifest = manifest_of(self._engine.module.model, self._bucket_bytes)
        return self._manifest

    @ray.method(concurrency_group="weights")
    def open_epoch(self, number: int, rank_offsets: dict[str, int], size: int) -> TransferEpoch:
        """Rank 0 offers a fresh meeting point; the previous epoch's communicator is closed."""
        from h1r_rl.broadcast import open_store

        self._close_communicator()
        self._store = open_store()
        return TransferEpoch(
            number=number,
            backend=self._backend,
            address=ray.util.get_node_ip_address(),
            port=self._store.port,
            world_size=size,
            rank_offsets=rank_offsets,
            deadline_s=self._deadline_s,
        )

    @ray.method(concurrency_group="weights")
    def join_epoch(self, epoch: TransferEpoch) -> None:
        from h1r_rl.broadcast import Communicator

        self._communicator = Communicator(epoch, rank=0)

    @ray.method(concurrency_group="weights")
    def send(self) -> dict[str, float]:
        """Broadcast the current parameters. On ZeRO-3 the group calls this on every rank's
        `compute` thread: the gathers are collectives, as those of a forward pass are."""
        from learners.weight_sender import send_weights

        return send_weights(
            self._engine.module.model,
            self._manifest,
            self._communicator,
            sharded=self._learner.zero_stage == 3,
        )

    @ray.method(concurrency_group="compute")
    def export(self, folder: str) -> None:
        from learners.export import export_folder

        export_folder(
            self._engine.module.model,
            self._model_folder,
            Path(folder),
            sharded=self._learner.zero_stage == 3,
        )

    @ray.method(concurrency_group="compute")
    def save_checkpoint(self, folder: str) -> str:
        from learners.checkpoint import save

        progress = {"version": self._version, "first_version": self._first_version}
        return str(save(self._engine, Path(folder), self._version, progress))

    @ray.method(concurrency_group="compute")
    def load_checkpoint(self, folder: str) -> int:
        """Continue from the newest checkpoint in `folder`; returns its version."""
        from learners.checkpoint import load

        progress = load(self._engine, Path(folder))
        self._version = progress["version"]
        self._first_version = progress["first_version"]
        return self._version

    @ray.method(concurrency_group="weights")
    def close(self) -> None:
        self._close_communicator()

    def _close_communicator(self) -> None:
        if self._communicator is not None:
            self._communicator.close()
            self._communicator = None

    def _fetch(self, plan: TrainPlan) -> dict[tuple[int, int], Any]:
        """This rank's completions, straight from the object store."""
        documents = [d for micro_batch in plan.ranks[self._rank] for d in micro_batch]
        samples = {(d.group, d.sample): plan.groups[d.group].samples[d.sample] for d in documents}
        refs = list({s.completions_ref: None for s in samples.values()})
        parts = dict(zip(refs, ray.get(refs, timeout=FETCH_TIMEOUT_S), strict=True))
        return {key: parts[s.completions_ref][s.position] for key, s in samples.items()}
