"""The learner's side of `h1r selftest`: the policy of a training run, in this process.

Invariant: the same loading, packing, log-probabilities and autocast as a learner rank; DeepSpeed
would add its optimizer and nothing to a forward pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from h1r_rl.hybrid.engine_values import compute_as_engine
from h1r_rl.hybrid.load import load_policy
from learners.deepspeed_engine import PolicyLogprobs


class LocalLearner:
    def __init__(
        self,
        folder: Path,
        *,
        engine_dtype: str,
        autocast: str,
        device: str,
        trust_remote_code: bool,
    ) -> None:
        self.model: Any = load_policy(folder, trust_remote_code=trust_remote_code, device=device)
        self.policy = PolicyLogprobs(
            self.model, temperature=1.0, chunk_tokens=1024, engine_dtype=engine_dtype
        ).train()
        compute_as_engine(self.model, engine_dtype, autocast=autocast == engine_dtype)
        self._autocast = autocast == "bfloat16"
        self._device_type = torch.device(device).type
        self._before: dict[str, torch.Tensor] = {}
        self.device = device
        self.trust_remote_code = trust_remote_code

    @property
    def is_exact(self) -> bool:
        """Whether it computes in float32 on the CPU, where nothing is left to a kernel's order."""
        return self._device_type == "cpu" and not self._autocast

    @property
    def on_cuda(self) -> bool:
        return self._device_type == "cuda"

    @property
    def vocabulary(self) -> int:
        """Ids that a document may be made of."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def context(self) -> int:
        """Tokens that the model was made for."""
        return int(self.model.config.get_text_config().max_position_embeddings)

    @torch.no_grad()
    def logprobs(
        self, documents: Sequence[NDArray[np.int32]], temperature: float = 1.0
    ) -> list[NDArray[np.float32]]:
        """[length - 1] of each document's tokens but its first, all documents in one row."""
        lengths = [len(document) for document in documents]
        starts = torch.tensor([0, *lengths]).cumsum(0)
        ids = torch.from_numpy(np.concatenate(documents).astype(np.int64))
        inner = torch.ones(len(ids), dtype=torch.bool)
        inner[starts[:-1]] = False
        self.policy.temperature = temperature
        with torch.autocast(self._device_type, torch.bfloat16, self._autocast):
            found, _ = self.policy(
                *(t.to(self.device) for t in (ids, starts, inner.nonzero().flatten()))
            )
        return np.split(found.cpu().numpy(), np.cumsum([n - 1 for n in lengths])[:-1])

    @torch.no_grad()
    def hidden(self, documents: Sequence[NDArray[np.int32]]) -> list[torch.Tensor]:
        """[length, hidden] of each document, all documents in one row."""
        from h1r_rl.hybrid.packed_forward import hidden_states

        lengths = [len(document) for document in documents]
        starts = torch.tensor([0, *lengths], device=self.device).cumsum(0)
        ids = torch.from_numpy(np.concatenate(documents).astype(np.int64)).to(self.device)
        with torch.autocast(self._device_type, torch.bfloat16, self._autocast):
            return list(hidden_states(self.model, ids, starts).split(lengths))

    def export(self, source: Path, folder: Path) -> None:
        """As a run ends: the function of a learner rank, in a group of one."""
        from learners.export import export_folder

        dist: Any = torch.distributed
        if dist.is_initialized():
            export_folder(self.model, source, folder, sharded=False)
            return
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            export_folder(self.model, source, folder, sharded=False)
        finally:
            dist.destroy_process_group()

    @torch.no_grad()
    def shake(self, seed: int, size: float = 0.1) -> None:
        """Move every parameter away from where it is, by this share of its value."""
        generator = torch.Generator().manual_seed(seed)
        self._before = {name: p.cpu().clone() for name, p in self.model.named_parameters()}
        for parameter in self.model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            parameter.mul_(1 + size * noise)

    @torch.no_grad()
    def shake_back(self) -> None:
        """The parameters from before `shake`."""
        for name, parameter in self.model.named_parameters():
            parameter.copy_(self._before[name])
