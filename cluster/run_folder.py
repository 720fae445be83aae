"""The folder of one run: what was asked, which stages are done, who is writing.

Invariant: one process owns the folder at a time (a lock that dies with it), a folder made from
other settings is never written to, and a stage counts as finished only once its outputs are whole.
"""

from __future__ import annotations

import fcntl
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from cluster.origin import origin
from h1r_rl.config.load import build_run, dump_run
from h1r_rl.config.schema import RunConfig
from h1r_rl.errors import ConfigError
from h1r_rl.evaluation.report import read_metrics


class RunFolder:
    def __init__(self, path: Path) -> None:
        self.path = path
        self._fresh = False
        self._lock: Any = None

    @classmethod
    def claim(cls, config: RunConfig, *, resume: bool) -> RunFolder:
        """Create the folder, or take up an unfinished run of the same settings with `resume`."""
        folder = cls(config.folder)
        known = folder.path / "resolved.yaml"
        if known.exists():
            if not resume:
                raise ConfigError(
                    f"{folder.path} holds a run already; remove it, choose another name=, or add "
                    "--resume to go on with it"
                )
            if _read(known, yaml.safe_load) != yaml.safe_load(dump_run(config)):
                raise ConfigError(
                    f"{folder.path} was made with other settings (see {known}); remove it or "
                    "choose another name="
                )
        else:
            folder._fresh = True
            foreign = [f.name for f in folder.path.glob("*")] if folder.path.exists() else []
            if foreign:
                raise ConfigError(
                    f"expected a new or empty run folder, but {folder.path} holds "
                    f"{', '.join(sorted(foreign)[:3])} and no run; choose another name="
                )
        try:
            folder.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"output: expected a place to write to, but {folder.path} cannot be made ({error})"
            ) from None
        folder._take_lock()
        known.write_text(dump_run(config))
        return folder

    def write_stage_config(self, config: RunConfig) -> None:
        """The settings as the stages see them: generated data named by its files."""
        (self.path / "stages.yaml").write_text(dump_run(config))

    @staticmethod
    def config_of(path: Path) -> RunConfig:
        """The settings that a stage's process runs under."""
        return build_run(yaml.safe_load((path / "stages.yaml").read_text()), source=str(path))

    @property
    def base_model(self) -> Path:
        return self.path / "base"

    @property
    def sft_model(self) -> Path:
        return self.path / "sft-model"

    @property
    def model(self) -> Path:
        """The final model."""
        return self.path / "model"

    @property
    def last_model(self) -> Path | None:
        """What the stages so far have made of the base."""
        return next((m for m in (self.model, self.sft_model) if m.exists()), None)

    @property
    def data(self) -> Path:
        return self.path / "data"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    def drop_records(self, stages: Sequence[str]) -> None:
        """Forget the metrics of stages that did not finish: they start over."""
        kept = [record for record in read_metrics(self.metrics) if record["stage"] not in stages]
        draft = self.metrics.with_suffix(".partial")
        draft.write_text("".join(json.dumps(record) + "\n" for record in kept))
        draft.replace(self.metrics)

    def evaluation(self, name: str, split: str = "evaluation") -> Path:
        return self.path / split / f"{name}.json"

    def outcomes(self, name: str, split: str = "evaluation") -> Path:
        """Every answer of an evaluation, for comparisons problem by problem."""
        return self.path / split / f"{name}.parquet"

    def state(self) -> dict[str, Any]:
        file = self.path / "state.json"
        return _read(file, json.loads) if file.exists() else {}

    def update_state(self, **changes: Any) -> None:
        write_json(self.path / "state.json", self.state() | changes)

    def note_origin(self, stage: str) -> None:
        """What makes this stage's results, in origin.json by stage: see `cluster.origin`."""
        file = self.path / "origin.json"
        known = _read(file, json.loads) if file.exists() else {}
        write_json(file, known | {stage: origin()})

    def forget_if_new(self) -> None:
        """A run that a mistake ended before its first stage leaves the name to a mended one."""
        if self._fresh and not self.state().get("done"):
            shutil.rmtree(self.path)

    def is_live(self) -> bool:
        """Whether a run is going on in this folder."""
        try:
            with (self.path / ".lock").open() as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def release(self) -> None:
        if self._lock is not None:
            self._lock.close()

    def _take_lock(self) -> None:
        self._lock = (self.path / ".lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(
                f"{self.path} is being written by another run; wait for it or choose another name="
            ) from None


def _read(file: Path, parse: Callable[[str], Any]) -> dict[str, Any]:
    """One of our own files, which a full disk or an editor may have torn."""
    try:
        found = parse(file.read_text())
    except (OSError, ValueError, yaml.YAMLError) as error:
        found = str(error).splitlines()[0]
    if not isinstance(found, dict):
        raise ConfigError(
            f"{file}: expected what the run wrote there, found {str(found)[:100]!r}; remove "
            f"{file.parent} or choose another name="
        )
    return found


def write_json(file: Path, value: Any) -> None:
    """Whole or not at all."""
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{file.name}.partial")
    draft.write_text(json.dumps(value, indent=2) + "\n")
    draft.replace(file)
