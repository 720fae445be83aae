"""The asynchronous loop against the synchronous one on real parts: `h1r grpo` at staleness 0 and 1,
one engine and one learner.

Overlap: engine and learner have one thread each, on two cores. What generation and learning take is
read from the synchronous run: there they alternate, and the loop's wait for groups is generation.
The demo's base model answers, which never ends an answer before its limit, so that both sides
handle the same tokens in every step; what a step costs beside its tokens weighs little then.
Unpinned: the demo's own answers of a dozen tokens, and the learner may use both cores, as the
engine's processes do beside it.

    python tests/benchmarks/bench_rollouts_async.py     # after `make demo`
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
ROOT = Path(__file__).parents[2]
RUN = ROOT / "cluster" / "runs" / "tiny-cpu.yaml"
DEMO = ROOT / "runs" / "tiny-cpu"
H1R = Path(sys.executable).with_name("h1r")
STEPS, WARM_UP = 14, 4
SHORT = (
    f"model.path={DEMO / 'sft-model'}", "data.generate.code_fraction=0",
    "grpo.prompts_per_step=16", "learner.threads=2",
)  # fmt: skip
UNENDING = (  # no answer ends before its limit
    f"model.path={DEMO / 'base'}", "data.generate=null", f"data.rl=[{DEMO / 'data/rl.parquet'}]",
    f"data.evaluation=[{DEMO / 'data/evaluation.parquet'}]", "data.verifier_column=none",
    "data.default_verifier=coin_reward:verify", "grpo.prompts_per_step=8",
    "rollout.max_response_tokens=192", "rollout.max_model_len=256",
)  # fmt: skip


def run(folder: Path, name: str, work: tuple[str, ...], staleness: int) -> dict[str, float]:
    """Medians of seconds over the steps after the warm-up."""
    settings = (
        f"output={folder}", f"tracking.uri=sqlite:///{folder}/mlflow.db", f"name={name}",
        "sft=null", "model.tiny=null", f"grpo.steps={STEPS}", f"grpo.max_staleness={staleness}",
        # The work stays the same over the steps: the policy all but stands still.
        "grpo.optimizer.learning_rate=1e-7", *work,
    )  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([H1R, "grpo", RUN, *settings], check=True, timeout=900, env=env)
    lines = (folder / name / "metrics.jsonl").read_text().splitlines()
    steps = [r for r in map(json.loads, lines) if r["stage"] == "grpo"][WARM_UP:]
    waits = np.array([s["time/wait_s"] for s in steps])
    whole = np.array([s["time/step_s"] for s in steps])
    return {
        "step": float(np.median(whole)),
        "wait": float(np.median(waits)),
        "learn": float(np.median(whole - waits)),
    }


def main() -> None:
    from results_file import metric, write_results

    with tempfile.TemporaryDirectory() as name:
        long = (*UNENDING, "learner.threads=1")
        apart = {s: run(Path(name), f"long-{s}", long, s) for s in (0, 1)}
        free = {s: run(Path(name), f"short-{s}", SHORT, s) for s in (0, 1)}
    roll, learn, together = apart[0]["wait"], apart[0]["learn"], apart[1]["step"]
    overlap = 1 - (together - max(roll, learn)) / min(roll, learn)
    what = (
        f"one thread each: {roll:.2f} s generation, {learn:.2f} s learning, {together:.2f} s a "
        f"step at staleness 1 ({apart[0]['step']:.2f} at 0); medians of {STEPS - WARM_UP} steps"
    )
    speedup = free[0]["step"] / free[1]["step"]
    write_results(
        "rollouts_async",
        [
            metric("overlap_efficiency", overlap, "share", ">= 0.8", overlap >= 0.8, what),
            metric("async_speedup_unpinned", speedup, "ratio", "reported", None,
                   f"{free[0]['step']:.2f} s a step at staleness 0, {free[1]['step']:.2f} at 1; "
                   "the learner has two threads, nothing is pinned"),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    main()
