"""A learner's side of the wire in plain torch, and references for what an engine reports."""

from __future__ import annotations

import asyncio
import runpy
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from h1r_rl.broadcast import Communicator, open_store
from h1r_rl.interfaces import Sampling
from h1r_rl.records import Completion, Prompt
from h1r_rl.weight_manifest import ParameterSpec, TransferEpoch, WeightManifest, checksum

FORMATS = runpy.run_path(str(Path(__file__).parents[1] / "hybrid_formats.py"))


class PlainSender:
    """Rank 0 without a learner: state dict in, bytes out."""

    def __init__(self, folder: Path, bucket_bytes: int = 1 << 18) -> None:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        self.tensors = {name: p.detach().clone() for name, p in model.named_parameters()}
        self.manifest = WeightManifest(
            tuple(ParameterSpec(n, tuple(t.shape), "float32") for n, t in self.tensors.items()),
            bucket_bytes,
        )
        self._number = int(time.time() * 1000) % 1_000_000

    def open_epoch(self, members: dict[str, int], deadline_s: float) -> TransferEpoch:
        self._store = open_store()
        offsets, size = {}, 1
        for name, ranks in members.items():
            offsets[name] = size
            size += ranks
        self._number += 1
        return TransferEpoch(
            self._number, "gloo", "127.0.0.1", self._store.port, size, offsets, deadline_s
        )

    async def join(self, epoch: TransferEpoch) -> None:
        self._communicator = await asyncio.to_thread(Communicator, epoch, 0)

    async def send(
        self, *, stop_after: int | None = None, close: bool = True, lie_about: str | None = None
    ) -> None:
        await asyncio.to_thread(self._send, stop_after, close, lie_about)

    def _send(self, stop_after: int | None, close: bool, lie_about: str | None) -> None:
        for index, bucket in enumerate(self.manifest.buckets()):
            if index == stop_after:
                if close:  # the sockets go with the group, as with a killed process
                    self._communicator.close()
                return
            parts = [
                self.tensors[p.name].contiguous().view(torch.uint8).flatten()[p.start : p.stop]
                for p in bucket
            ]
            self._communicator.broadcast(torch.cat(parts))
        sums = [
            checksum(self.tensors[s.name].contiguous().view(torch.uint8).flatten().numpy())
            + (s.name == lie_about)
            for s in self.manifest.parameters
        ]
        self._communicator.broadcast(torch.tensor(sums, dtype=torch.int64))


async def push(pool, sender: PlainSender, version: str, deadline_s: float = 10.0) -> float:
    """A whole conversation: epoch, transfer, commit."""
    epoch = sender.open_epoch(pool.members(), deadline_s)
    await asyncio.gather(sender.join(epoch), pool.join_epoch(epoch))
    await pool.begin_receive(sender.manifest)
    await sender.send()
    return await pool.commit(version)


def prompt(seed: int, length: int = 15) -> Prompt:
    ids = np.random.default_rng(seed).integers(0, 250, length).astype(np.int32)
    return Prompt(f"p{seed:04d}", 0, ids, "q", "math", "1")


async def sample(pool, asked: Prompt, count: int, sampling: Sampling) -> list[Completion]:
    """Whole completions of one group, by sample index."""
    found: list[Completion] = []
    async for part in pool.generate(asked, range(count), sampling):
        bulk = await asyncio.wait_for(part.completions_ref, 10)
        assert tuple(c.sample_index for c in bulk) == part.sample_indices
        assert tuple(len(c.token_ids) for c in bulk) == part.lengths
        found += bulk
    assert sorted(c.sample_index for c in found) == list(range(count))
    return sorted(found, key=lambda c: c.sample_index)


def reference_logprobs(
    folder: Path, asked: Prompt, completion: Completion, temperature: float
) -> np.ndarray:
    """transformers' own model, one plain forward pass."""
    model = FORMATS["transformers_model"](folder)
    ids = np.concatenate([asked.token_ids, completion.token_ids]).astype(np.int64)
    with torch.no_grad():
        logits = model(torch.from_numpy(ids)[None], use_cache=False).logits[0].double()
    logprobs = torch.log_softmax(logits / temperature, dim=-1)
    first = len(asked.token_ids) - 1
    return np.array([logprobs[first + i, t].item() for i, t in enumerate(completion.token_ids)])


@pytest.fixture(scope="session")
def wire() -> SimpleNamespace:
    return SimpleNamespace(
        Sender=PlainSender, push=push, prompt=prompt, sample=sample, reference=reference_logprobs
    )
