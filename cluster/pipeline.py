"""A run from its configuration to its closing table.

Invariant: stages run in order, each once; what is finished is never repeated; every way out leaves
MLflow's parent run with the true outcome and no process of ours behind.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from cluster.check_data import check_files, check_problems
from cluster.check_machine import check_machine
from cluster.code_share import notes_of, without_refused_code
from cluster.embedded_ray import ray_cluster
from cluster.launch import resolved_path, run_stage
from cluster.progress import Progress
from cluster.run_folder import RunFolder
from cluster.scale import ControlFolder
from cluster.splits import SPLITS, warn_of_left_out
from h1r_rl.config.schema import RunConfig
from h1r_rl.errors import ConfigError, UserError
from h1r_rl.evaluation.report import (
    closing_table,
    markdown_table,
    read_metrics,
    stage_entry,
    terminal_plot,
    write_result,
)


def execute(config: RunConfig, *, resume: bool, only: str | None) -> None:
    """Run the stages that `only` selects (None: all); see `plan_stages`."""
    from h1r_rl.tracking import Tracker

    started = time.monotonic()
    config = with_absolute_paths(config)
    check_files(config)
    check_machine(config)
    _refuse_stage_without_its_part(config, only)
    folder = RunFolder.claim(config, resume=resume)
    ControlFolder(folder.path).clear()
    tracker, mistaken = None, False
    status: Any = "FAILED"
    progress = Progress(config, folder)
    stack = ExitStack()
    try:
        config = _prepare(config, folder)
        with progress, timed(folder, "start"):
            tracker = Tracker.start(
                config.tracking, run_name=config.name, folder=folder.path, stage="run"
            )
            if earlier := folder.state().get("tracked_as"):
                tracker.end_left_open("FAILED", earlier=earlier)
            folder.update_state(tracked_as=tracker.run_id)
            tracker.log_params(config.model_dump(mode="json"))
            tracker.log_artifact(folder.path / "resolved.yaml")
            cluster = stack.enter_context(ray_cluster(config.cluster))
        stages = plan_stages(config, folder, only)
        folder.drop_records(stages)
        with progress:
            for stage in stages:
                progress.begin(stage)
                folder.note_origin(stage)
                with timed(folder, stage):
                    run_stage(cluster, stage, folder, tracker.run_id, on_poll=progress.refresh)
                folder.update_state(done=[*folder.state().get("done", []), stage])
        stack.close()
        _close(config, folder, tracker, started)
        status = "FINISHED"
    except KeyboardInterrupt:
        status = "KILLED"
        raise
    except UserError:
        mistaken = True
        raise
    finally:
        stack.close()
        if tracker is not None:
            tracker.end_left_open(status)
            tracker.end(status)
        if mistaken:
            folder.forget_if_new()
        folder.release()


def _refuse_stage_without_its_part(config: RunConfig, only: str | None) -> None:
    """A stage asked for alone has its section, and the model that it starts from."""
    if (only == "sft" and config.sft is None) or (only == "grpo" and config.grpo is None):
        raise ConfigError(f"expected a section '{only}' in the run, found none; add {only}.steps")
    source = RunFolder(config.folder).sft_model
    if only == "grpo" and config.sft is not None and not source.exists():
        raise ConfigError(
            f"expected the run's SFT model, found none in {source}; run `h1r sft` first and this "
            "with --resume, or set sft=null to start from the base model"
        )


def plan_stages(config: RunConfig, folder: RunFolder, only: str | None) -> list[str]:
    """The stages still to run, in order. `evaluate-X` needs X's model, which is there by then."""
    order = ["evaluate-base"]
    if config.sft:
        order += ["sft", "evaluate-sft"]
    if config.grpo:
        order += ["grpo", "evaluate-grpo"]
    done = set(folder.state().get("done", []))
    if only == "evaluate":
        models = {"sft": folder.sft_model, "grpo": folder.model}
        return [
            stage
            for stage in order
            if stage.startswith("evaluate-")
            and (stage == "evaluate-base" or models[stage.removeprefix("evaluate-")].exists())
        ]
    if only is not None:
        order = [stage for stage in order if stage == only]
    return [stage for stage in order if stage not in done]


class timed:  # noqa: N801 - reads as a statement
    """Adds the wall time of a block to the run's minutes, whatever way it ends."""

    def __init__(self, folder: RunFolder, stage: str) -> None:
        self._folder, self._stage, self._started = folder, stage, 0.0

    def __enter__(self) -> None:
        self._started = time.monotonic()

    def __exit__(self, *_: object) -> None:
        minutes = self._folder.state().get("minutes", {})
        spent = minutes.get(self._stage, 0.0) + (time.monotonic() - self._started) / 60
        self._folder.update_state(minutes=minutes | {self._stage: spent})


def _prepare(config: RunConfig, folder: RunFolder) -> RunConfig:
    """Generated data and the tiny model, where the run asks for them; splits checked."""
    from h1r_rl.data.generate import generate_into
    from h1r_rl.hybrid.tiny import build_tiny_model

    with timed(folder, "prepare"):
        config = without_refused_code(config, folder)
        config = config.model_copy(
            update={"data": generate_into(config.data, folder.data, seed=config.seed)}
        )
        folder.write_stage_config(config)
        if "checked" not in folder.state():
            folder.note_origin("prepare")
            warn_of_left_out(check_problems(config, folder.data), folder.data)
            folder.update_state(checked=True)
        if config.model.tiny is not None and not folder.base_model.exists():
            build_tiny_model(config.model.tiny, folder.base_model, seed=config.seed)
    return config


def _close(config: RunConfig, folder: RunFolder, tracker: Any, started: float) -> None:
    """result.json, the closing table and where things are."""
    import json

    from rich.console import Console

    evaluation, evaluation_code = (
        {
            name: stage_entry(json.loads(folder.evaluation(name, split).read_text()))
            for name in ("base", "sft", "grpo")
            if folder.evaluation(name, split).exists()
        }
        for split in ("evaluation", "evaluation_code")
    )
    minutes = dict(folder.state().get("minutes", {}))
    other = (time.monotonic() - started) / 60 - sum(minutes.values())
    minutes["other"] = max(other, 0.0)
    model = folder.last_model or config.model.path or folder.base_model
    result = write_result(
        folder.path,
        evaluation,
        minutes,
        model,
        evaluation_code=evaluation_code,
        notes=notes_of(folder),
    )
    tracker.log_artifact(folder.path / "result.json")
    console = Console()
    curve = [
        (r["step"], r["reward/mean"])
        for r in read_metrics(folder.metrics)
        if r["stage"] == "grpo" and "reward/mean" in r
    ]
    if curve:
        steps, rewards = zip(*curve, strict=True)
        console.print(terminal_plot(list(steps), list(rewards), "GRPO: mean reward"))
    if evaluation:
        console.print(closing_table(result))
    (folder.path / "report.md").write_text(markdown_table(result) + "\n")
    console.print("minutes: " + ", ".join(f"{k} {v:.1f}" for k, v in minutes.items()))
    console.print(f"model    {_relative(model)}")
    beside = [name for name in ("result.json", "grpo.png") if (folder.path / name).exists()]
    console.print(f"report   {', '.join([str(_relative(folder.path / 'report.md')), *beside])}")
    console.print(f"MLflow   make ui   (tracking store {config.tracking.uri})")


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """A stage's process has another working folder than the command line."""
    uri = config.tracking.uri
    prefix = "sqlite:///"
    if uri.startswith(prefix) and not uri.startswith(prefix + "/"):
        uri = prefix + str(resolved_path(Path(uri.removeprefix(prefix))))
    data = config.data
    splits = {s: tuple(resolved_path(p) for p in getattr(data, s)) for s in SPLITS}
    model = config.model
    return config.model_copy(
        update={
            "output": resolved_path(config.output),
            "tracking": config.tracking.model_copy(update={"uri": uri}),
            "data": data.model_copy(update=splits),
            "model": model.model_copy(update={"path": model.path and resolved_path(model.path)}),
        }
    )


def _relative(path: Path) -> Path:
    try:
        return path.relative_to(Path.cwd())
    except ValueError:
        return path
