"""The learning rate is a pure function of the step; checkpoints are checked before use."""

import json

import pytest

from h1r_rl.config.schema import LearnerConfig, OptimizerConfig
from h1r_rl.errors import DataError
from learners.checkpoint import newest, verify
from learners.deepspeed_engine import deepspeed_config
from learners.schedule import learning_rate


def rates(schedule: str, *, total: int = 10, **kwargs) -> list[float]:
    config = OptimizerConfig(learning_rate=2.0, schedule=schedule, warmup_steps=4, **kwargs)
    return [learning_rate(step, config, total) for step in range(total)]


def test_warm_up_is_linear_and_never_zero():
    assert rates("constant") == [0.5, 1.0, 1.5, 2.0] + [2.0] * 6


def test_linear_falls_to_the_final_ratio():
    values = rates("linear", final_lr_ratio=0.1)
    assert values[4] == 2.0 and values[7] == pytest.approx(2.0 * (0.1 + 0.9 * 0.5))
    config = OptimizerConfig(
        learning_rate=2.0, schedule="linear", warmup_steps=4, final_lr_ratio=0.1
    )
    assert learning_rate(10, config, 10) == learning_rate(50, config, 10) == pytest.approx(0.2)


def test_cosine_is_halfway_at_half_time():
    assert rates("cosine")[7] == pytest.approx(1.0)


def test_parameters_are_never_cast():
    config = deepspeed_config(
        LearnerConfig(autocast="bfloat16", zero_stage=2, offload_optimizer=True),
        OptimizerConfig(learning_rate=1e-3),
    )
    assert "bf16" not in config and config["torch_autocast"]["dtype"] == "bfloat16"
    assert config["managed_gradient_accumulation"] is False
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


def test_damaged_checkpoint_is_refused(tmp_path):
    with pytest.raises(DataError, match="latest"):
        newest(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"abc")
    digest = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "manifest.json").write_text(json.dumps({"weights.pt": digest}))
    verify(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"abd")
    with pytest.raises(DataError, match="weights.pt"):
        verify(tmp_path)
    (tmp_path / "weights.pt").write_bytes(b"abc")
    (tmp_path / "extra.pt").write_bytes(b"")
    with pytest.raises(DataError, match="extra.pt"):
        verify(tmp_path)
