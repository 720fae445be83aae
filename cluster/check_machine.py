"""What can be said about this machine before an embedded Ray is started on it."""

from __future__ import annotations

import errno
import os
import socket

from h1r_rl.config.checks import most_engines
from h1r_rl.config.schema import RunConfig
from h1r_rl.errors import ConfigError


def check_machine(config: RunConfig) -> None:
    """The port asked for is free and the GPUs are there; a remote cluster is its own judge."""
    if config.cluster.address != "local":
        return
    check_port(config.cluster.dashboard_port)
    _check_gpus(config)


def check_port(port: int) -> None:
    """ConfigError for a port that cannot be listened on; 0 is any."""
    with socket.socket() as probe:
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            in_use = error.errno == errno.EADDRINUSE
            why = "is in use" if in_use else f"cannot be had ({os.strerror(error.errno or 0)})"
            raise ConfigError(
                f"cluster.dashboard_port: expected a free port, but {port} {why}; set 0 for any "
                "free one"
            ) from None


def _check_gpus(config: RunConfig) -> None:
    """A service that no GPU is left for would wait for its start until the deadline."""
    engines, most = most_engines(config)
    asked = {
        engines: most * config.rollout.num_gpus,
        "learner.ranks": config.learner.ranks * config.learner.num_gpus,
    }
    if not any(asked.values()):
        return
    import torch

    there = torch.cuda.device_count()
    # SFT's learner is alone on the cluster; GRPO's stands beside the engines.
    needed = sum(asked.values()) if config.grpo else max(asked.values())
    if needed > there:
        parts = " and ".join(f"{name} {gpus:g}" for name, gpus in asked.items())
        raise ConfigError(
            f"num_gpus: {parts} are asked for, but this machine has {there} GPUs; lower "
            "rollout.num_gpus and learner.num_gpus, or set cluster.address to a cluster that has "
            "them"
        )
