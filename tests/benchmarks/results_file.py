"""The format of a benchmark's results, and where they stand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cluster.origin import commit_of, machine, origin

ROOT = Path(__file__).parents[2]
RESULTS = Path(__file__).parent / "results"


def metric(
    name: str, value: float, unit: str, target: str, meets: bool | None, note: str
) -> dict[str, Any]:
    """`meets` None: reported without a target."""
    return {
        "name": name,
        "value": round(float(value), 4) if abs(value) >= 0.01 else float(f"{float(value):.4g}"),
        "unit": unit,
        "target": target,
        "meets": None if meets is None else bool(meets),
        "note": note,
    }


def write_results(
    benchmark: str,
    metrics: list[dict[str, Any]],
    *,
    made_by: dict[str, Any] | None = None,
    **more: Any,
) -> None:
    """`made_by`: the origin of runs that were made before (`origin_of_runs`), else what is here
    now. `more`: what the metrics were made of, for tests and readers of the file."""
    made_by = made_by or origin()
    result = {
        "benchmark": benchmark,
        "commit": made_by["commit"],
        "machine": made_by["machine"],
        "metrics": metrics,
        **more,
    }
    RESULTS.mkdir(exist_ok=True)
    file = RESULTS / f"{benchmark}.json"
    file.write_text(json.dumps(result, indent=1) + "\n")
    print(file.read_text())


def refuse_other_commits(folders: Iterable[Path]) -> None:
    """Before runs are added: those that are there were made by the code that is here."""
    here = {"commit": commit_of(ROOT), "machine": machine()}
    _common({"the code that is here": [here]} | _origins(f for f in folders if f.exists()))


def origin_of_runs(folders: Iterable[Path]) -> dict[str, Any]:
    """The commit and machine that made every stage of these runs; SystemExit, with the folders by
    commit, where they are not of one."""
    return _common(_origins(folders))


def _origins(folders: Iterable[Path]) -> dict[str, list[dict[str, Any]]]:
    """By folder the origin of each stage; an empty one where the code that ran noted none."""
    found = {}
    for folder in folders:
        noted = _read(folder / "origin.json")
        stages = {*noted, *_read(folder / "state.json").get("done", [])}
        found[str(folder)] = [noted.get(stage, {}) for stage in sorted(stages)] or [{}]
    return found


def _read(file: Path) -> dict[str, Any]:
    return json.loads(file.read_text()) if file.exists() else {}


def _common(origins: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    places: dict[str | None, list[str]] = {}
    for place, stages in origins.items():
        for commit in dict.fromkeys(stage.get("commit") for stage in stages):
            places.setdefault(commit, []).append(place)
    if len(places) == 1 and None not in places:
        return next(iter(origins.values()))[0]
    found = "".join(
        f"\n  {commit or 'no commit noted'}: {', '.join(where)}" for commit, where in places.items()
    )
    raise SystemExit(
        f"expected runs of one commit, found{found}\nRemove the run folders of every commit but "
        "the one to be measured, and start this again from its checkout"
    )
