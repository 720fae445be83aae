"""What GRPO adds on the main job: seeds, controls, and where a step's time goes.

    python tests/benchmarks/bench_main_job.py [--seeds 0 1 2] [--folder runs/proof]

Runs that have finished in the folder are not repeated; runs of different commits never make one
table. The time of a step is that of the last `make demo`. Intervals are 95%: of one run's gain
paired by problem; of the control with shuffled rewards over several runs, because a policy that
follows noise drifts, and how far it drifts shows between runs alone.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
from results_file import metric, origin_of_runs, refuse_other_commits, write_results

from h1r_rl.evaluation.metrics import paired_difference
from h1r_rl.evaluation.report import read_metrics

ROOT = Path(__file__).parents[2]
RUN = ROOT / "cluster" / "runs" / "tiny-cpu.yaml"
DEMO = ROOT / "runs" / "tiny-cpu"
H1R = Path(sys.executable).with_name("h1r")
FORMAT_CONTROL = ("data.generate.unformatted_fraction=0.35", "grpo.steps=12")
WARM_UP_STEPS = 3
STUDENT_T = {1: 12.71, 2: 4.30, 3: 3.18, 4: 2.78}  # 97.5%, by degrees of freedom


def run(folder: Path, name: str, *overrides: str) -> Path:
    """One whole run of the demo's recipe."""
    store = f"tracking.uri=sqlite:///{folder.resolve()}/mlflow.db"
    command = [H1R, "run", RUN, f"name={name}", f"output={folder.resolve()}", store, *overrides]
    subprocess.run([*command, "--resume"], check=True)
    return folder / name


def outcomes(run_folder: Path, model: str, setting: str, field: str = "correct") -> np.ndarray:
    """[problems, samples] of one evaluation, in the order of the problems."""
    table = pq.read_table(run_folder / "evaluation" / f"{model}.parquet")
    chosen = table.filter(pc.field("setting") == setting)
    samples = len(set(chosen["sample"].to_pylist()))
    return chosen[field].to_numpy().reshape(-1, samples)


def gain(
    before: tuple[Path, str], after: tuple[Path, str], setting: str, field: str = "correct"
) -> tuple[float, float, float]:
    """(points, low, high)."""
    difference = paired_difference(
        outcomes(*before, setting, field), outcomes(*after, setting, field)
    )
    return tuple(100 * x for x in difference)


def interval(points: tuple[float, float, float]) -> str:
    return f"[{points[1]:+.1f}, {points[2]:+.1f}]"


def seed_rows(folder: Path, seed: int) -> list[dict]:
    rows = []
    for setting, name in (("t0.6", "t06"), ("greedy", "greedy")):
        points = gain((folder, "sft"), (folder, "grpo"), setting)
        rows.append(metric(f"gain_{name}_seed{seed}", points[0], "points", ">= 40",
                           points[0] >= 40 and points[1] > 0, interval(points)))  # fmt: skip
    result = json.loads((folder / "result.json").read_text())["evaluation"]
    solved = [np.nanmax(outcomes(folder, m, "t1"), axis=1, keepdims=True) for m in ("sft", "grpo")]
    points = tuple(100 * x for x in paired_difference(*solved))
    note = f"{100 * result['sft']['pass@8']:.1f} to {100 * result['grpo']['pass@8']:.1f}"
    rows.append(metric(f"passk_change_seed{seed}", points[0], "points", ">= -3", points[0] >= -3,
                       f"{interval(points)}; {note}"))  # fmt: skip
    return rows


def between_runs(gains: list[float]) -> tuple[float, float, float]:
    """(mean, low, high) by Student's t."""
    mean, spread = float(np.mean(gains)), float(np.std(gains, ddof=1))
    half = STUDENT_T[len(gains) - 1] * spread / len(gains) ** 0.5
    return mean, mean - half, mean + half


def shuffled_rows(runs: dict[Path, Path]) -> list[dict]:
    """`runs`: from the run whose SFT model it starts from to the run with shuffled rewards.

    At T 1 too: a policy that wanders without a direction keeps its mean accuracy there, where that
    is nearly linear in how often the policy works a problem out; at T 0.6 it starts in the convex
    foot of the curve (it works out fewer than half), where wandering alone lifts the mean.
    """
    rows = []
    for setting, name in (("t0.6", "t06"), ("t1", "t1")):
        gains = [gain((seed, "sft"), (run, "grpo"), setting)[0] for seed, run in runs.items()]
        points = between_runs(gains)
        note = f"{interval(points)} over {len(gains)} runs: {', '.join(f'{g:+.1f}' for g in gains)}"
        rows.append(metric(f"control_shuffled_{name}", points[0], "points", "interval covers 0",
                           points[1] <= 0 <= points[2], note))  # fmt: skip
    return rows


def format_row(formatted: Path) -> dict:
    points = gain((formatted, "sft"), (formatted, "grpo"), "t0.6")
    form = [100 * outcomes(formatted, m, "t0.6", "formatted").mean() for m in ("sft", "grpo")]
    note = f"{interval(points)}; format {form[0]:.1f}% to {form[1]:.1f}%"
    met = points[1] <= 0 and form[1] > form[0] and 60 <= form[0] <= 90
    return metric("control_format_t06", points[0], "points", "interval covers 0 or lies below",
                  met, note)  # fmt: skip


def phase_rows(folder: Path) -> list[dict]:
    """Seconds a step by phase. Generation goes on beside learning: what counts here is the time
    that the step loop waited for it."""
    steps = [r for r in read_metrics(folder / "metrics.jsonl") if r["stage"] == "grpo"]
    steps = steps[WARM_UP_STEPS:]
    mean = {
        name: float(np.mean([r[key] for r in steps]))
        for name, key in {
            "grpo_step_s": "time/step_s",
            "generation_s": "time/wait_s",
            "learning_s": "learner/forward_backward_s",
            "sync_s": "weights/sync_s",
        }.items()
    }
    notes = {
        "grpo_step_s": f"mean of {len(steps)} steps",
        "generation_s": "the step loop's wait for groups",
        "learning_s": "forward and backward; the optimizer step counts as other",
        "sync_s": "beside the next step's generation, not in its way",
    }
    rows = [metric(name, value, "s", "reported", None, notes[name]) for name, value in mean.items()]
    share = 1 - (mean["generation_s"] + mean["learning_s"]) / mean["grpo_step_s"]
    return [*rows, metric("other_share", share, "share", "<= 0.15", share <= 0.15, "")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=ROOT / "runs" / "proof")
    arguments = parser.parse_args()
    if not read_metrics(DEMO / "metrics.jsonl"):
        parser.error(f"expected the demo's steps in {DEMO}, found none: run `make demo` first")
    folder = arguments.folder
    names = [f"{kind}{seed}" for kind in ("seed", "shuffled") for seed in arguments.seeds]
    runs = [DEMO, *(folder / name for name in (*names, "format"))]
    if not all((run_folder / "result.json").exists() for run_folder in runs):
        refuse_other_commits(runs)
    seeds = {seed: run(folder, f"seed{seed}", f"seed={seed}") for seed in arguments.seeds}
    shuffled = {}
    for seed, start in seeds.items():
        model = f"model.path={(start / 'sft-model').resolve()}"
        shuffled[start] = run(folder, f"shuffled{seed}", f"seed={seed}", "sft=null",
                              "model.tiny=null", model, "reward.control=shuffled")  # fmt: skip
    formatted = run(folder, "format", "reward.control=format_only", *FORMAT_CONTROL)
    made_by = origin_of_runs(runs)
    rows = phase_rows(DEMO)
    for seed, run_folder in seeds.items():
        rows += seed_rows(run_folder, seed)
    write_results("main_job", [*rows, *shuffled_rows(shuffled), format_row(formatted)],
                  made_by=made_by)  # fmt: skip


if __name__ == "__main__":
    main()
