"""Live progress of a run, read from its metrics file: works the same for a remote job."""

from __future__ import annotations

from typing import Any

from cluster.run_folder import RunFolder
from h1r_rl.config.schema import RunConfig

SHOWN = {
    "sft": (("learner/loss", "loss"),),
    "grpo": (
        ("reward/mean", "reward"),
        ("rollout/length_mean", "length"),
        ("learner/kl_behaviour", "KL"),
        ("rollout/staleness_max", "stale"),
    ),
}


class Progress:
    """A bar a stage; entered around whatever should be shown."""

    def __init__(self, config: RunConfig, folder: RunFolder) -> None:
        from rich.progress import BarColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as RichProgress

        self._config = config
        self._folder = folder
        self._bars = RichProgress(
            TextColumn("{task.description:<14}"),
            BarColumn(bar_width=30),
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._stage = ""
        self._task: Any = None
        self._offset = 0

    def __enter__(self) -> Progress:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        self._bars.stop()

    def begin(self, stage: str) -> None:
        self.refresh()
        if self._task is not None:
            self._bars.stop_task(self._task)
        totals = {
            "sft": self._config.sft.steps if self._config.sft else 1,
            "grpo": self._config.grpo.steps if self._config.grpo else 1,
        }
        model = stage.removeprefix("evaluate-")
        total = totals.get(stage) or len(self._config.evaluation_settings(model))
        self._stage = stage
        self._task = self._bars.add_task(stage, total=total, note="")

    def refresh(self) -> None:
        """Take up what the stage has logged since the last look."""
        import json

        if self._task is None or not self._folder.metrics.exists():
            return
        with self._folder.metrics.open("rb") as file:
            file.seek(self._offset)
            chunk = file.read()
        whole = chunk[: chunk.rfind(b"\n") + 1]
        self._offset += len(whole)
        records = [json.loads(line) for line in whole.splitlines()]
        records = [r for r in records if r["stage"] == self._stage]
        if records:
            last = records[-1]
            shown = SHOWN.get(self._stage, ())
            note = "  ".join(f"{name} {last[key]:.3g}" for key, name in shown if key in last)
            self._bars.update(self._task, advance=len(records), note=note)
