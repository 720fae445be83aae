import pytest

from h1r_rl.config.schema import AlgorithmConfig
from h1r_rl.errors import ConfigError
from h1r_rl.grpo.presets import PRESETS, apply_preset


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_is_a_valid_algorithm(name):
    AlgorithmConfig(**apply_preset({"preset": name})["algorithm"])


def test_explicit_settings_win_and_leave_the_rest_of_their_section():
    raw = {"preset": "grpo", "algorithm": {"clip_high": 0.3, "kl": {"estimator": "k2"}}}
    algorithm = AlgorithmConfig(**apply_preset(raw)["algorithm"])
    assert (algorithm.clip_low, algorithm.clip_high) == (0.2, 0.3)
    assert (algorithm.kl.coefficient, algorithm.kl.estimator) == (0.04, "k2")


def test_unknown_preset_names_the_known():
    with pytest.raises(ConfigError, match="falcon-h1r"):
        apply_preset({"preset": "ppo"})
