"""What RL rollouts may sample with: a temperature, and nothing else that moves the distribution.

The learner computes log-probabilities of softmax(logits / temperature). Anything that truncates or
edits the engine's distribution makes the importance ratio against it undefined.
"""

from __future__ import annotations

from importlib.metadata import entry_points

from h1r_rl.config.schema import RolloutConfig
from h1r_rl.errors import ConfigError
from h1r_rl.interfaces import Sampling

LOGITS_PROCESSORS = "vllm.logits_processors"  # entry points that vLLM loads into every engine


def rl_sampling(config: RolloutConfig) -> Sampling:
    """The rollouts' sampling, or a ConfigError that names what breaks the ratio."""
    if config.top_p != 1:
        raise ConfigError(
            f"rollout.top_p: expected 1.0, found {config.top_p}; truncated sampling makes the "
            "importance ratio undefined (evaluation settings may use it)"
        )
    return Sampling(temperature=config.temperature, max_tokens=config.max_response_tokens)


def refuse_foreign_logits_processors() -> None:
    """An installed package may edit every engine's logits without any setting of ours."""
    found = sorted(point.value for point in entry_points(group=LOGITS_PROCESSORS))
    if found:
        raise ConfigError(
            f"expected no logits processors in the environment, found {', '.join(found)} (entry "
            f"points '{LOGITS_PROCESSORS}'); they change what is sampled. Uninstall that package"
        )
