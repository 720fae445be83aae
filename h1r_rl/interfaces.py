"""What the rooms promise each other, as protocols.

The run loop talks to these alone; it does not know whether an actor, a stub or a simulation
answers. Every call has a deadline inside the implementation; none waits for ever.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from h1r_rl.grpo.build_batch import TrainPlan
from h1r_rl.records import GroupPart, Prompt, StepResult, Verdict
from h1r_rl.weight_manifest import TransferEpoch, WeightManifest


@dataclass(frozen=True, slots=True)
class Sampling:
    """How to sample. RL rollouts use temperature alone: other settings break the ratio."""

    temperature: float  # 0: greedy (evaluation only)
    max_tokens: int
    top_p: float = 1.0  # evaluation only


class RolloutPool(Protocol):
    """Engines behind one address."""

    def generate(
        self, prompt: Prompt, sample_indices: Sequence[int], sampling: Sampling
    ) -> AsyncIterator[GroupPart]:
        """Parts of one group as its samples finish.

        Raises RolloutLost when the engine dies; what was not yielded is to be issued again.
        """
        ...

    def members(self) -> dict[str, int]:
        """Live engines and how many communicator ranks each needs."""
        ...

    async def join_epoch(self, epoch: TransferEpoch) -> None: ...

    async def begin_receive(self, manifest: WeightManifest) -> None:
        """Stage one transfer beside running generations; returns at once."""
        ...

    async def commit(self, version: str) -> float:
        """Every live engine loads what it staged while paused and reads its label back.

        Returns the longest pause in seconds. Raises WeightTransferError naming who failed.
        """
        ...

    async def close(self) -> None: ...


class RewardPool(Protocol):
    """Verifier workers."""

    async def score(self, prompt: Prompt, part: GroupPart) -> list[Verdict]:
        """One verdict for each of `part.sample_indices`, in that order."""
        ...

    async def resize(self, workers: int) -> None:
        """Grow or shrink to `workers`."""
        ...

    def num_workers(self) -> int: ...

    def stats(self) -> dict[str, float]: ...

    async def close(self) -> None: ...


class LearnerGroup(Protocol):
    """Data-parallel ranks that hold the policy and its optimizer."""

    async def forward_backward(self, plan: TrainPlan) -> dict[str, float]: ...

    async def score(self, ids: NDArray[np.int32]) -> NDArray[np.float32]:
        """[T - 1] log-probabilities at temperature 1 of a document's own tokens, ids [T]."""
        ...

    async def computed_values(self) -> dict[str, NDArray[np.float32]]:
        """What the ranks compute their state-space layers with, flat, by name."""
        ...

    async def optimizer_step(self) -> StepResult: ...

    async def weight_manifest(self) -> WeightManifest: ...

    async def open_epoch(self, world_size: int, rank_offsets: dict[str, int]) -> TransferEpoch: ...

    async def join_epoch(self, epoch: TransferEpoch) -> None: ...

    async def send(self) -> dict[str, float]:
        """Broadcast the current parameters; returns when rank 0 has sent everything."""
        ...

    async def export(self, folder: str) -> None: ...

    async def close(self) -> None: ...
