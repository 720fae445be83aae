"""Against TRL's GRPOTrainer: time a step and time per point of reward, from one SFT model, with the
same problems, group size, batch, length limit, learning rate and clipping, on the same cores. Its
answers have a dozen tokens; the time a step is also taken where every answer has 192, of the
demo's base model, which ends none.

TRL generates with transformers here; its fast path, a vLLM server, is not what is measured.

    pip install --no-deps --target FOLDER trl==1.16.0 accelerate
    TRL_FOLDER=FOLDER python tests/benchmarks/bench_rollouts_trl.py

The SFT model is the demo's (`make demo`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))

from bench_rollouts_async import DEMO, H1R, ROOT, RUN, UNENDING  # noqa: E402
from coin_reward import coin  # noqa: E402

PROMPTS, GROUP, RATE, WARM_UP = 8, 8, 1e-4, 2


class Work(NamedTuple):
    """What both do."""

    model: Path
    length: int  # most tokens of an answer
    our_steps: int
    trl_steps: int
    settings: tuple[str, ...]


WORK = {
    "answers": Work(DEMO / "sft-model", 64, 36, 12, ("data.generate.code_fraction=0",)),
    "long": Work(DEMO / "base", 192, 14, 6, UNENDING),
}


def ours(folder: Path, work: Work) -> tuple[list[float], list[float]]:
    """(seconds of each step, mean reward of each)."""
    settings = (
        f"output={folder}", f"tracking.uri=sqlite:///{folder}/mlflow.db", "name=ours", "sft=null",
        "model.tiny=null", f"model.path={work.model}", f"grpo.steps={work.our_steps}",
        f"grpo.prompts_per_step={PROMPTS}", f"grpo.samples_per_prompt={GROUP}",
        f"rollout.max_response_tokens={work.length}", f"grpo.optimizer.learning_rate={RATE}",
        "grpo.optimizer.warmup_steps=0", *work.settings,
    )  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parent)}
    subprocess.run([H1R, "grpo", RUN, *settings], check=True, timeout=900, env=env)
    lines = (folder / "ours" / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["stage"] == "grpo"]
    # A step without a mean met no group that was finished since the one before.
    return [s["time/step_s"] for s in steps], [s.get("reward/mean", np.nan) for s in steps]


def theirs(folder: Path, name: str) -> tuple[list[float], list[float]]:
    """The same of TRL, in a process that sees its folder."""
    path = os.pathsep.join([str(ROOT), os.environ["TRL_FOLDER"]])
    env = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "2"}
    out = folder / "trl.json"
    words = [sys.executable, __file__, "--trl", name, str(DEMO / "data" / "rl.parquet"), out]
    subprocess.run(words, check=True, env=env, timeout=1800, cwd=folder)
    found = json.loads(out.read_text())
    return found["seconds"], found["rewards"]


def train_with_trl(name: str, problems: str, out: str) -> None:
    import pyarrow.parquet as pq
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from rewards.answer_text import final_answer

    torch.set_num_threads(2)
    work = WORK[name]
    rows = pq.read_table(problems).to_pylist()
    data = Dataset.from_list(
        [{"prompt": r["messages"], "ground_truth": r["ground_truth"]} for r in rows]
    )
    seconds: list[float] = []
    rewards: list[float] = []

    def reward(completions: Any, ground_truth: list[str], **_: Any) -> list[float]:
        texts = [completion[0]["content"] for completion in completions]
        if name == "long":
            return [coin(t) for t in texts]
        return [float(final_answer(t) == g) for t, g in zip(texts, ground_truth, strict=True)]

    class Clock(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.at = time.perf_counter()

        def on_log(self, args: Any, state: Any, control: Any, logs: Any, **_: Any) -> None:
            if "reward" in logs:
                rewards.append(logs["reward"])

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.perf_counter() - self.at)

    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(work.model, dtype="float32"),
        processing_class=AutoTokenizer.from_pretrained(work.model),
        reward_funcs=reward,
        train_dataset=data,
        callbacks=[Clock()],
        args=GRPOConfig(
            output_dir=str(Path(out).parent / "trl"), use_cpu=True, bf16=False, fp16=False,
            per_device_train_batch_size=PROMPTS * GROUP, num_generations=GROUP,
            max_completion_length=work.length, learning_rate=RATE, lr_scheduler_type="constant",
            max_steps=work.trl_steps, temperature=1.0, beta=0.0, epsilon=0.2, epsilon_high=0.28,
            loss_type="dapo", gradient_checkpointing=False, logging_steps=1, save_strategy="no",
            report_to=[], seed=0,
        ),
    )  # fmt: skip
    trainer.train()
    Path(out).write_text(json.dumps({"seconds": seconds, "rewards": rewards}))


def points_a_second(seconds: list[float], rewards: list[float]) -> tuple[float, float]:
    """(points of reward, points a second) by a straight line through the rewards over time."""
    times, points = np.cumsum(seconds), 100 * np.array(rewards)
    known = np.isfinite(points)
    slope = float(np.polyfit(times[known], points[known], 1)[0])
    return slope * float(times[-1] - times[0]), slope


def step_row(name: str, what: str, runs: dict[str, Any]) -> dict[str, Any]:
    from results_file import metric

    mine, peer = (float(np.median(seconds[WARM_UP:])) for seconds, _ in runs[what])
    note = (
        f"{PROMPTS} prompts x {GROUP}, at most {WORK[what].length} tokens: {peer:.2f} s over "
        f"{mine:.2f} s; TRL generates with transformers"
    )
    return metric(name, peer / mine, "ratio", ">= 5", peer / mine >= 5, note)


def main() -> None:
    from results_file import metric, write_results

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        runs = {}
        for what, work in WORK.items():
            (folder / what).mkdir()
            runs[what] = ours(folder / what, work), theirs(folder / what, what)
    mine, peer = runs["answers"]
    gained, speed = points_a_second(*mine)
    gained_trl, speed_trl = points_a_second(*peer)
    known = speed > 0 and speed_trl > 0
    points = (
        f"TRL {gained_trl:+.1f} points in {sum(peer[0]):.0f} s ({len(peer[0])} steps), ours "
        f"{gained:+.1f} in {sum(mine[0]):.0f} s ({len(mine[0])} steps), by straight lines; one seed"
    )
    write_results(
        "rollouts_trl",
        [
            step_row("trl_step_ratio", "answers", runs),
            step_row("trl_step_ratio_192", "long", runs),
            metric("trl_reward_ratio", speed / speed_trl if known else 0.0, "ratio", ">= 5",
                   known and speed / speed_trl >= 5,
                   points + ("" if known else "; one did not gain: no ratio")),
        ],
    )  # fmt: skip


if __name__ == "__main__":
    if sys.argv[1:2] == ["--trl"]:
        train_with_trl(*sys.argv[2:])
    else:
        main()
