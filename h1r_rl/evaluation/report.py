"""What a run leaves to look at: result.json, the closing table, curves.

`result.json`: {"evaluation": {"base" | "sft" | "grpo": {"greedy" | "t0.6" | "t1": {"pass@1",
"se", ...}, "pass@8", "mean_length", ...}}, "minutes": {stage: ...}, "model": path}; scores are
fractions. A run with code problems has "evaluation_code" of the same shape; one that has something
to say about itself has "notes".
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

STAGES = ("base", "sft", "grpo")


def stage_entry(settings: dict[str, dict[str, float]]) -> dict[str, Any]:
    """One stage of `result.json` from its settings' summaries; pass@k rises to the stage."""
    entry: dict[str, Any] = dict(settings)
    for summary in settings.values():
        for key, value in summary.items():
            if key.startswith("pass@") and key != "pass@1":
                entry[key] = value
    entry["mean_length"] = list(settings.values())[-1]["mean_length"]
    return entry


def write_result(
    folder: Path,
    evaluation: dict[str, Any],
    minutes: dict[str, float],
    model: Path,
    *,
    evaluation_code: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
) -> dict[str, Any]:
    """The result, written whole or not at all: other programs wait for this file."""
    result: dict[str, Any] = {"evaluation": evaluation, "minutes": minutes, "model": str(model)}
    result |= {"evaluation_code": evaluation_code} if evaluation_code else {}
    result |= {"notes": list(notes)} if notes else {}
    draft = folder / "result.json.draft"
    draft.write_text(json.dumps(result, indent=2) + "\n")
    draft.replace(folder / "result.json")
    return result


def closing_table(result: dict[str, Any]) -> Any:
    """Stages by settings, as a rich table."""
    from rich.table import Table

    header, *rows = table_rows(result)
    notes = "\n".join(result.get("notes", ()))
    table = Table(title="held-out accuracy (%, standard error)", caption=notes or None)
    for column in header:
        table.add_column(column, justify="left" if column == "stage" else "right")
    for row in rows:
        table.add_row(*(cell.replace(" ± ", "±") for cell in row))  # fits 80 columns
    return table


def markdown_table(result: dict[str, Any]) -> str:
    header, *rows = table_rows(result)
    lines = [header, ["---"] * len(header), *rows]
    table = "\n".join("| " + " | ".join(line) + " |" for line in lines)
    return "\n\n".join([table, *result.get("notes", ())])


def table_rows(result: dict[str, Any]) -> list[list[str]]:
    """Header and one row a stage that was evaluated, on code problems in a row of its own."""
    evaluation = {s: result["evaluation"][s] for s in STAGES if s in result["evaluation"]}
    code = result.get("evaluation_code", {})
    evaluation |= {f"{stage}, code": code[stage] for stage in STAGES if stage in code}
    settings = list(dict.fromkeys(k for e in evaluation.values() for k in e if _is_setting(e, k)))
    extra = list(dict.fromkeys(k for e in evaluation.values() for k in e if k.startswith("pass@")))
    rows = [["stage", *settings, *extra, "length", "minutes"]]
    for stage, entry in evaluation.items():
        row = [stage]
        for name in settings:
            cell = entry.get(name)
            row.append(f"{100 * cell['pass@1']:.1f} ± {100 * cell['se']:.1f}" if cell else "")
        row += [f"{100 * entry[k]:.1f}" if k in entry else "" for k in extra]
        minutes = result["minutes"].get(stage)
        row += [f"{entry['mean_length']:.1f}", f"{minutes:.1f}" if minutes is not None else ""]
        rows.append(row)
    return rows


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """metrics.jsonl, one record a logged step; a torn last line (a killed run) is left out."""
    records = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def plot_grpo(records: list[dict[str, Any]], file: Path) -> None:
    """Reward, accuracy, response length and entropy over GRPO steps, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    curves = (
        ("reward/mean", "reward"),
        ("reward/accuracy", "accuracy of rollouts"),
        ("rollout/length_mean", "response tokens"),
        ("learner/entropy", "entropy (nats)"),
    )
    figure, axes = plt.subplots(2, 2, figsize=(10, 6), sharex=True)
    for axis, (key, title) in zip(axes.flat, curves, strict=True):
        points = [(r["step"], r[key]) for r in records if key in r]
        if points:
            axis.plot(*zip(*points, strict=True))
        axis.set_title(title)
        axis.grid(alpha=0.3)
    for axis in axes[1]:
        axis.set_xlabel("step")
    figure.tight_layout()
    figure.savefig(file, dpi=110)
    plt.close(figure)


def terminal_plot(steps: list[int], values: list[float], title: str) -> str:
    """A curve in characters, for the end of a run."""
    import plotext

    plotext.clear_figure()
    plotext.plot_size(72, 14)
    plotext.theme("clear")
    plotext.plot(steps, values)
    plotext.title(title)
    return plotext.uncolorize(plotext.build())


def _is_setting(entry: dict[str, Any], key: str) -> bool:
    return isinstance(entry[key], dict)
