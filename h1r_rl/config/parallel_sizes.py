"""Which tensor-parallel sizes a hybrid's heads allow.

Invariant: a size is allowed exactly when vLLM can build the model with it: every rank gets whole
attention heads, whole Mamba heads, whole groups (one group alone is copied) and equal MLP slices;
key/value heads are split, or copied where there are fewer of them than ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from h1r_rl.config.schema import TinyModelConfig
from h1r_rl.errors import ConfigError
from h1r_rl.hybrid.model_folder import read_config


@dataclass(frozen=True)
class Heads:
    """Falcon-H1-7B: Heads(12, 2, 24, 1, 12288)."""

    attention: int
    key_value: int
    mamba: int
    mamba_groups: int
    intermediate: int

    def sizes(self) -> list[int]:
        """7B: [1, 2, 4, 6, 12]; 8 is impossible."""
        return [
            n
            for n in range(1, self.attention + 1)
            if self.attention % n == 0
            and (self.key_value % n == 0 or n % self.key_value == 0)
            and self.mamba % n == 0
            and (self.mamba_groups % n == 0 or self.mamba_groups == 1)
            and self.intermediate % n == 0
        ]


def heads_of_tiny(model: TinyModelConfig) -> Heads:
    return Heads(
        model.num_heads,
        model.num_kv_heads,
        model.mamba_heads,
        model.mamba_n_groups,
        model.intermediate_size,
    )


def heads_of_folder(folder: Path) -> Heads:
    """From config.json, under the names of Falcon-H1, GraniteMoeHybrid and Nemotron-H."""
    found = read_config(folder)

    def of(*names: str, default: int | None = None) -> int:
        for name in names:
            value = found.get(name)
            if isinstance(value, int) and value > 0:
                return value
        if default is None:
            raise ConfigError(
                f"model.path: expected {' or '.join(names)} in {folder / 'config.json'}, found "
                "none; give the folder of a hybrid Transformer-Mamba model"
            )
        return default

    attention = of("num_attention_heads")
    return Heads(
        attention,
        of("num_key_value_heads", default=attention),
        of("mamba_n_heads", "mamba_num_heads"),
        of("mamba_n_groups", "n_groups", default=1),
        of("intermediate_size", "shared_intermediate_size"),
    )
