"""A vLLM worker's side of a weight transfer.

Invariant: the model is touched only in a commit, between `start_weight_update` and
`finish_weight_update`, when every byte has arrived and matched its checksum. Until then a transfer
is staged beside running generations; a dead sender costs a deadline, never the engine's main loop.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from actors.complete_load import check_complete, parameter_names
from actors.cpu_convolution import refresh_convolutions
from actors.cpu_prefix_cache import split_prefills_at_blocks
from actors.cpu_tied_head import pack_tied_heads
from actors.engine_tensors import Held, held_tensors
from actors.staged_transfer import StagedTransfer
from h1r_rl.errors import WeightTransferError
from h1r_rl.weight_manifest import ParameterSpec, TransferEpoch, WeightManifest


@dataclass
class ReceiverCommand(WeightTransferInitInfo):
    """What the rollout actor tells the workers outside an update; returns at once.

    join: meet the epoch's members. receive: stage one transfer.
    """

    action: str
    epoch: dict[str, Any] | None = None
    rank_offset: int = 0
    parameters: list[tuple[str, list[int], str]] | None = None
    bucket_bytes: int = 0


@dataclass
class CommitInfo(WeightTransferUpdateInfo):
    """Nothing travels with a commit: the weights are staged already."""


class WeightReceiver(WeightTransferEngine[ReceiverCommand, CommitInfo]):
    init_info_cls = ReceiverCommand
    update_info_cls = CommitInfo
    supports_draft_weight_update = False

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        split_prefills_at_blocks()  # built with the model, before the cache is laid out
        self._transfer: StagedTransfer | None = None
        self._staged: dict[str, Tensor] = {}
        self._expected: frozenset[str] = frozenset()

    def init_transfer_engine(self, init_info: ReceiverCommand) -> None:
        if init_info.action == "join":
            self._leave()
            self._transfer = StagedTransfer(
                TransferEpoch(**(init_info.epoch or {})),
                init_info.rank_offset + self.parallel_config.rank,
                self.device,
            )
        elif init_info.action == "receive":
            self._epoch().begin(
                WeightManifest(
                    tuple(ParameterSpec(n, tuple(s), d) for n, s, d in init_info.parameters or []),
                    init_info.bucket_bytes,
                )
            )
        else:
            raise ValueError(f"unknown receiver action {init_info.action!r}")

    def outcome(self) -> str:
        return self._epoch().outcome()

    def start_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload

        self._staged = self._epoch().take()  # raises while the model is still whole
        self._expected = parameter_names(self.model)
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict[str, Any]) -> None:
        # Not the base class's: it would synchronise an accelerator that a CPU does not have.
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def receive_weights(self, update_info: CommitInfo) -> None:
        self.model.load_weights(iter(self._staged.items()))
        check_complete(self.model, self._expected)

    def finish_weight_update(self) -> None:
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        finalize_layerwise_reload(self.model, self.model_config)
        if self.device.type == "cpu":
            pack_tied_heads(self.model)
            refresh_convolutions(self.model)
        self._staged = {}

    def shutdown(self) -> None:
        self._leave()

    def _epoch(self) -> StagedTransfer:
        if self._transfer is None:
            raise WeightTransferError("this engine has joined no transfer epoch")
        return self._transfer

    def _leave(self) -> None:
        if self._transfer is not None:
            self._transfer.close()
            self._transfer = None


class WorkerExtension:
    """Mixed into vLLM's worker, so that the actor can ask it beside its main loop."""

    weight_transfer_engine: WeightReceiver
    model_runner: Any
    vllm_config: Any

    def weight_transfer_outcome(self) -> str:
        return self.weight_transfer_engine.outcome()

    def held_tensors(self) -> Held:
        """What the model computes with now (see `engine_tensors`)."""
        return held_tensors(self.model_runner.model)

    def block_tokens(self) -> int:
        """Tokens of a block of the prefix cache."""
        cache = self.vllm_config.cache_config
        return int(max(cache.block_size, cache.mamba_block_size or 0))
