"""Entry point of a stage's Ray job: `python -m cluster.stage_main STAGE RUN_FOLDER [PARENT]`.

Exit codes: 0 done; 1 failed; 2 the user's mistake; 130 stopped. The reason of a 1 or 2 is left in
`error.json` for the launcher to print.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import traceback
from functools import partial
from pathlib import Path

from h1r_rl.errors import UserError


def main(arguments: list[str]) -> int:
    stage, path, parent = arguments[0], Path(arguments[1]), (arguments[2:] or [None])[0]
    from cluster.run_folder import write_json

    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("cluster").setLevel(logging.INFO)  # a line a step
    try:
        asyncio.run(_run(stage, path, parent))
    except (KeyboardInterrupt, asyncio.CancelledError):
        return 130
    except BaseException as error:
        root = _root(error)
        user = isinstance(root, UserError)
        if not user:
            traceback.print_exception(error)
        message = str(root) if user else f"{type(root).__name__}: {root}"
        write_json(path / "error.json", {"code": 2 if user else 1, "message": message})
        return 2 if user else 1
    return 0


async def _run(stage: str, path: Path, parent: str | None) -> None:
    import ray

    from cluster import stages
    from cluster.run_folder import RunFolder

    _cancel_on_signals()
    config, folder = RunFolder.config_of(path), RunFolder(path)
    kind, _, model = stage.partition("-")
    run = {
        "sft": stages.run_sft,
        "grpo": stages.run_grpo,
        "evaluate": partial(stages.run_evaluation, name=model),
    }[kind]
    # The launcher names an embedded cluster; else Ray says "auto": a node belongs to one cluster.
    ray.init(os.environ["RAY_ADDRESS"], log_to_driver=False, logging_level="warning")
    _cancel_on_signals()  # again: Ray's own SIGTERM handler kills the process at once
    try:
        await run(config, folder, parent)
    finally:
        ray.shutdown()


def _cancel_on_signals() -> None:
    """A stopped stage closes its services and its MLflow run in order."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)


def _root(error: BaseException) -> BaseException:
    """The first cause inside exception groups."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads of libraries must not hold a finished stage open
