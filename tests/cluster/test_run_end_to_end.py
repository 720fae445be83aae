"""The real thing, short: Ray jobs, DeepSpeed, vLLM, MLflow; ends, failures and interrupts."""

import json
import re
import signal
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from live_runs import H1R, call, from_model, h1r, records, statuses
from safetensors.torch import load_file

from h1r_rl.config.lora_targets import TARGETS

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


@pytest.fixture
def from_sft(demo_folder) -> tuple[str, ...]:
    """GRPO from the demo's SFT model, which answers in more than one way."""
    return from_model(demo_folder / "sft-model")


def test_a_synchronous_run_of_three_steps_ends_by_itself(tmp_path, from_sft):
    done = call(h1r(tmp_path, "run", *from_sft, "grpo.max_staleness=0"))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "tiny-cpu"
    result = json.loads((run / "result.json").read_text())
    assert set(result["evaluation"]) == {"base", "grpo"}
    assert set(result["evaluation"]["grpo"]) >= {"greedy", "t0.6", "t1", "pass@8", "mean_length"}
    assert (run / "model" / "model.safetensors").exists()
    assert set(statuses(tmp_path).values()) == {"FINISHED"}
    steps = records(tmp_path, "grpo")
    assert [r["step"] for r in steps] == [0, 1, 2]
    assert max(r["rollout/staleness_max"] for r in steps) == 0

    before = (run / "resolved.yaml").read_text()
    again = call(h1r(tmp_path, "run", *from_sft))
    assert again.returncode == 2 and "holds a run already" in again.stderr
    assert (run / "resolved.yaml").read_text() == before


def test_a_model_is_evaluated_alone(tmp_path, demo_folder, from_sft):
    """`h1r eval` of the demo's SFT model as a base: what the demo's own stage measured."""
    data = demo_folder / "data"
    splits = [f"data.{s}=[{data / f'{s}.parquet'}]" for s in ("rl", "evaluation")]
    own = ("data.generate=null", "data.sft=[]", "data.evaluation_code=[]", "evaluation.limit=100")
    done = call(h1r(tmp_path, "eval", *from_sft, *splits, *own))
    assert done.returncode == 0, done.stderr
    run = tmp_path / "tiny-cpu"
    (measured,) = json.loads((run / "result.json").read_text())["evaluation"].values()
    assert set(measured) == {"greedy", "t0.6", "t1", "pass@8", "mean_length"}
    assert statuses(tmp_path) == {"tiny-cpu": "FINISHED", "tiny-cpu/evaluate-base": "FINISHED"}

    def correct(folder: Path, model: str, setting: str) -> list[float]:
        answers = pq.read_table(folder / "evaluation" / f"{model}.parquet").to_pylist()
        return [a["correct"] for a in answers if a["setting"] == setting]

    for setting, samples in (("greedy", 1), ("t0.6", 4), ("t1", 8)):
        again = correct(run, "base", setting)
        before = correct(demo_folder, "sft", setting)[: 100 * samples]
        assert len(again) == len(before) == 100 * samples
        assert measured[setting]["pass@1"] == pytest.approx(np.mean(again))
        if setting == "greedy":  # other companions in a batch may turn a tie
            assert sum(a != b for a, b in zip(again, before, strict=True)) <= 3
        else:
            assert abs(np.mean(again) - np.mean(before)) < 4 * measured[setting]["se"]


def test_a_constant_reward_ends_with_an_explanation(live_run, tmp_path, from_sft):
    live = live_run(
        h1r(tmp_path, "grpo", *from_sft, "reward.control=constant", "grpo.max_backfill=0")
    )
    code, stderr = live.end(600)
    assert code == 1 and "nothing can be learned" in " ".join(stderr.split())
    assert statuses(tmp_path) == {"tiny-cpu": "FAILED", "tiny-cpu/grpo": "FAILED"}


def test_two_runs_of_one_seed_start_alike(tmp_path):
    """Same data, weights, batches and first losses; in SFT nothing is sampled."""
    losses, files = [], []
    for name in ("a", "b"):
        folder = tmp_path / name
        done = call(h1r(folder, "sft", "sft.steps=3", "learner.threads=1"))
        assert done.returncode == 0, done.stderr
        losses.append([r["learner/loss"] for r in records(folder, "sft")])
        run = folder / "tiny-cpu"
        made = ("data/sft.parquet", "data/rl.parquet", "base/model.safetensors")
        files.append([(run / file).read_bytes() for file in made])
    assert losses[0] == losses[1] and files[0] == files[1]


def test_adapters_through_both_stages(tmp_path, demo_folder):
    """GRPO goes on from what SFT merged; engines agree with the learner after every transfer."""
    base = demo_folder / "sft-model"
    lora = ("model.tiny=null", f"model.path={base}", "model.lora.rank=4", "sft.steps=3")
    for command, *more in (("sft",), ("grpo", "--resume")):
        done = call(h1r(tmp_path, command, *lora, *more))
        assert done.returncode == 0, done.stderr
    run = tmp_path / "tiny-cpu"
    held = [load_file(f / "model.safetensors") for f in (base, run / "sft-model", run / "model")]
    for before, after in pairwise(held):
        assert before.keys() == after.keys()
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert {name.split(".")[-2] for name in moved} == set(TARGETS["falcon_h1"])
    assert (run / "model" / "adapter" / "adapter_config.json").exists()
    steps = records(tmp_path, "grpo")
    assert len(steps) == 3 and max(r["learner/probe_gap"] for r in steps) < 3e-5


def in_flight(record: dict) -> float:
    """Admitted groups of a step that were neither trained on nor dropped by then."""
    dropped = sum(value for key, value in record.items() if key.startswith("buffer/dropped_"))
    return record["buffer/admitted"] - record["buffer/trained"] - dropped


@pytest.mark.proof  # three engines' starts: minutes
@pytest.mark.timeout(1500)
def test_a_live_run_scales_and_its_services_restart(live_run, tmp_path, from_sft):
    """From one engine to three and back; then the learner alone, then the engines alone."""
    live = live_run(
        h1r(
            # A policy that all but stands still has signal for as long as this takes.
            tmp_path, "grpo", *from_sft, "grpo.steps=5000", "grpo.optimizer.learning_rate=1e-7",
            "cluster.num_cpus=8", "learner.threads=1", "rollout.kv_cache_gib=0.1",
            "rollout.num_cpus=0.5",
        )
    )  # fmt: skip
    folder = tmp_path / "tiny-cpu"

    def last() -> dict:
        return (records(tmp_path, "grpo") or [{"step": -1}])[-1]

    def ask(*words: str) -> str:
        command = [str(H1R), words[0], str(folder), *words[1:], "--wait", "400"]
        done = call(command, timeout=450)
        assert done.returncode == 0, done.stderr
        assert "done:" in done.stdout, done.stdout
        return done.stdout

    def serving(count: int) -> bool:
        """That many engines, each of which has generated since the last step."""
        names = [key for key in last() if re.fullmatch(r"engine/rollout-\d+/tokens_per_s", key)]
        busy = [key for key in names if last()[key] > 0]
        return last().get("engine/engines") == count == len(busy) == len(names)

    try:
        live.wait_for(lambda: last()["step"] >= 1)
        assert "3 rollout actors" in ask("scale", "--rollout-actors", "3")
        live.wait_for(lambda: serving(3))
        ask("scale", "--rollout-actors", "1")
        live.wait_for(lambda: serving(1))
        ask("restart", "--learner")
        restarted = last()["step"]
        live.wait_for(lambda: last()["step"] >= restarted + 2)
        before = {key for key in last() if key.startswith("engine/rollout-")}
        ask("restart", "--rollout-actors")
        live.wait_for(lambda: serving(1) and not before & set(last()))
        restarted = last()["step"]
        live.wait_for(lambda: last()["step"] >= restarted + 2)
    finally:
        live.process.send_signal(signal.SIGINT)
        code, stderr = live.end()
    assert code == 130, stderr
    for record in records(tmp_path, "grpo"):
        assert in_flight(record) == record["buffer/rolling"] + record["buffer/ready"]
        assert record["buffer/slots_used"] <= record["buffer/slots"]
        assert record["buffer/dropped_stale"] == 0
        assert record["rollout/staleness_max"] <= 1
        assert record.get("faults/quarantined", 0) == record.get("faults/engines_lost", 0) == 0
    steps = [record["step"] for record in records(tmp_path, "grpo")]
    assert steps == list(range(len(steps)))
