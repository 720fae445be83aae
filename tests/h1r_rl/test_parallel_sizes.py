"""Tensor-parallel sizes against the shapes of real hybrids, and `check` on a model folder."""

import json

import pytest
import yaml

from h1r_rl.config.load import build_run
from h1r_rl.config.parallel_sizes import Heads
from h1r_rl.errors import ConfigError


@pytest.mark.parametrize(
    "heads, sizes",
    [
        (Heads(8, 2, 24, 1, 2048), [1, 2, 4, 8]),  # Falcon-H1 0.5B
        (Heads(6, 2, 24, 1, 3072), [1, 2, 6]),  # 1.5B-Deep: 4 does not divide 6 heads
        (Heads(10, 2, 32, 1, 6144), [1, 2]),  # 3B: 5 splits no pair of KV heads
        (Heads(12, 2, 24, 1, 12288), [1, 2, 4, 6, 12]),  # 7B: 8 is impossible
        (Heads(20, 4, 32, 2, 21504), [1, 2]),  # 34B: two groups
    ],
)
def test_sizes_of_the_family(heads, sizes):
    assert heads.sizes() == sizes


RUN = """
name: t
data: {generate: {}}
rollout: {max_response_tokens: 32, max_model_len: 96}
"""
SEVEN_B = {
    "num_attention_heads": 12, "num_key_value_heads": 2, "mamba_n_heads": 24,
    "mamba_n_groups": 1, "intermediate_size": 12288,
}  # fmt: skip
NEMOTRON = {
    "num_attention_heads": 8, "num_key_value_heads": 8, "mamba_num_heads": 8, "n_groups": 4,
    "intermediate_size": 64,
}  # fmt: skip


def check(folder, shape, **rollout):
    (folder / "config.json").write_text(json.dumps(shape))
    raw = yaml.safe_load(RUN) | {"model": {"path": str(folder)}}
    raw["rollout"] |= rollout
    return build_run(raw, source="t")


def test_a_folder_is_checked_by_its_own_heads(tmp_path):
    for size in (1, 2, 4, 6, 12):
        check(tmp_path, SEVEN_B, tensor_parallel=size)
    for size in (3, 5, 8, 16):
        with pytest.raises(ConfigError, match=rf"\({size}\).*\[1, 2, 4, 6, 12\]"):
            check(tmp_path, SEVEN_B, tensor_parallel=size)
    with pytest.raises(ConfigError, match=r"\[1, 2, 4\]"):
        check(tmp_path, NEMOTRON, tensor_parallel=8)
    with pytest.raises(ConfigError, match="mamba_n_heads or mamba_num_heads"):
        check(tmp_path, {"num_attention_heads": 4}, tensor_parallel=2)


def test_a_rank_needs_a_gpu(tmp_path):
    with pytest.raises(ConfigError, match="found rollout.num_gpus = 1; set it to 2"):
        check(tmp_path, SEVEN_B, tensor_parallel=2, num_gpus=1)
    check(tmp_path, SEVEN_B, tensor_parallel=2, num_gpus=2)
