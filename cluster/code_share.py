"""The share of code problems in a generated task, where this machine can judge them.

Invariant: code is never judged with weaker walls than asked for: where the kernel refuses
namespaces the run goes on without that share, and says so at its start and in its closing table.
Decided once a run: a resumed run keeps the data that it began with.
"""

from __future__ import annotations

import sys

from cluster.run_folder import RunFolder
from h1r_rl.config.schema import RunConfig
from h1r_rl.errors import ConfigError

STATE = "code_left_out"


def without_refused_code(config: RunConfig, folder: RunFolder) -> RunConfig:
    """`config`, without data.generate.code_fraction if the sandbox cannot start here."""
    generate = config.data.generate
    if generate is None or not generate.code_fraction:
        return config
    if STATE not in folder.state():
        folder.update_state(**{STATE: _refusal(config)})
    if not folder.state()[STATE]:
        return config
    print("\n".join(notes_of(folder)), file=sys.stderr)
    generate = generate.model_copy(update={"code_fraction": 0.0})
    return config.model_copy(update={"data": config.data.model_copy(update={"generate": generate})})


def notes_of(folder: RunFolder) -> list[str]:
    """What the start and the closing table have to say."""
    refusal = folder.state().get(STATE)
    return [f"without the share of code problems: {refusal}"] if refusal else []


def _refusal(config: RunConfig) -> str:
    """Why code cannot be judged on this machine; empty where it can, or is judged elsewhere."""
    if config.cluster.address != "local" or config.reward.sandbox != "namespaces":
        return ""
    from rewards.sandbox.executor import JailExecutor

    try:
        JailExecutor().close()
    except ConfigError as error:
        return str(error).splitlines()[0].rstrip(".") + "; docs/sandbox.md says what to enable"
    return ""
