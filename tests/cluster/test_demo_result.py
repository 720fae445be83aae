"""What `make demo` leaves: the result, the model in plain libraries, the MLflow record."""

import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
import yaml

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "runs" / "tiny-cpu"
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]

PLAIN_VLLM = """
import json, sys
from vllm import LLM, SamplingParams
model, prompts = sys.argv[1], json.load(open(sys.argv[2]))
engine = LLM(model, dtype="float32", max_model_len=112, enforce_eager=True)
limits = SamplingParams(temperature=0.0, max_tokens=64)
answers = engine.generate([{"prompt_token_ids": p} for p in prompts], limits)
json.dump([a.outputs[0].text for a in answers], open(sys.argv[3], "w"))
"""


@pytest.fixture(scope="module")
def result(demo_folder) -> dict:
    return json.loads((demo_folder / "result.json").read_text())


@pytest.fixture(scope="module")
def questions() -> list[dict]:
    return pq.read_table(FOLDER / "data" / "evaluation.parquet").to_pylist()


@pytest.fixture(scope="module")
def prompts(result, questions) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")
    return [
        tokenizer.apply_chat_template(q["messages"], add_generation_prompt=True)["input_ids"]
        for q in questions
    ]


def score(texts: list[str], questions: list[dict]) -> float:
    right = 0
    for text, question in zip(texts, questions, strict=True):
        boxes = re.findall(r"\\boxed\{([^{}]*)\}", text)
        right += bool(boxes) and boxes[-1].strip() == question["ground_truth"]
    return right / len(questions)


def test_result_has_its_shape_and_grpo_its_gain(result):
    evaluation = result["evaluation"]
    assert set(evaluation) == {"base", "sft", "grpo"} and "t0.6" not in evaluation["base"]
    assert result["model"] == str(FOLDER / "model") and (FOLDER / "model" / "config.json").exists()
    for model in ("sft", "grpo"):
        measured = evaluation[model]
        assert measured["pass@8"] == measured["t1"]["pass@8"] >= measured["t1"]["pass@1"]
        assert measured["mean_length"] == measured["t1"]["mean_length"] > 0
        for setting in ("greedy", "t0.6", "t1"):
            share, error = measured[setting]["pass@1"], measured[setting]["se"]
            assert 0 <= share <= 1 and 0 <= error < 0.03
            assert (error == 0) == (share in (0, 1))  # no spread where all answers are alike
            assert 0.5 < measured[setting]["format_rate"] <= 1 and measured[setting]["entropy"] > 0
    before, after = evaluation["sft"], evaluation["grpo"]
    for setting in ("greedy", "t0.6"):
        gain = after[setting]["pass@1"] - before[setting]["pass@1"]
        error = (after[setting]["se"] ** 2 + before[setting]["se"] ** 2) ** 0.5
        assert gain >= 0.40 and gain - 1.96 * error > 0
    assert after["pass@8"] >= before["pass@8"] - 0.03


def test_it_was_measured_on_all_held_out_problems_in_three_settings(questions):
    config = yaml.safe_load((FOLDER / "resolved.yaml").read_text())["evaluation"]
    settings = {s["name"]: (s["temperature"], s["top_p"], s["samples"]) for s in config["settings"]}
    assert settings == {"greedy": (0.0, 1.0, 1), "t0.6": (0.6, 0.95, 4), "t1": (1.0, 1.0, 8)}
    assert len(questions) >= 500
    for model in ("base", "sft", "grpo"):
        answers = pq.read_table(FOLDER / "evaluation" / f"{model}.parquet").to_pylist()
        asked = Counter((a["setting"], a["prompt_id"]) for a in answers)
        used = {"greedy"} if model == "base" else set(settings)
        assert asked == {(s, q["prompt_id"]): settings[s][2] for s in used for q in questions}


def test_the_model_in_plain_transformers(result, questions, prompts):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER / "model", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(FOLDER / "model")
    texts = [""] * len(prompts)
    for length in {len(p) for p in prompts}:  # equal lengths: no padding in a recurrent model
        rows = [i for i, p in enumerate(prompts) if len(p) == length]
        ids = torch.tensor([prompts[i] for i in rows])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=64, do_sample=False
        )
        decoded = tokenizer.batch_decode(out[:, length:], skip_special_tokens=True)
        for row, text in zip(rows, decoded, strict=True):
            texts[row] = text
    expected = result["evaluation"]["grpo"]["greedy"]["pass@1"]
    assert score(texts, questions) == pytest.approx(expected, abs=0.005)


def test_the_model_in_plain_vllm(result, questions, prompts, tmp_path):
    (tmp_path / "prompts.json").write_text(json.dumps(prompts))
    script = tmp_path / "plain.py"
    script.write_text(f"if __name__ == '__main__':\n    exec({PLAIN_VLLM!r})\n")
    out = tmp_path / "answers.json"
    done = subprocess.run(
        [sys.executable, script, FOLDER / "model", tmp_path / "prompts.json", out],
        capture_output=True,
        text=True,
        timeout=600,
        env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "VLLM_CPU_KVCACHE_SPACE": "1"}
        | {"VLLM_PLUGINS": ""},  # plain: without our weight receiver
    )
    assert done.returncode == 0, done.stderr[-3000:]
    expected = result["evaluation"]["grpo"]["greedy"]["pass@1"]
    assert score(json.loads(out.read_text()), questions) == pytest.approx(expected, abs=0.005)


STAGES = ("evaluate-base", "sft", "evaluate-sft", "grpo", "evaluate-grpo")
METRICS = {
    "sft": "learner/loss learner/grad_norm learner/learning_rate learner/target_tokens_per_s",
    "grpo": (
        "reward/mean reward/accuracy reward/format reward/score_spread reward/zero_signal_groups "
        "reward/queue_depth learner/advantage_spread learner/advantage_max learner/kl_behaviour "
        "learner/clip_fraction learner/entropy learner/grad_norm learner/learning_rate "
        "learner/target_tokens_per_s rollout/length_mean rollout/truncated rollout/staleness_mean "
        "engine/tokens_per_s engine/running engine/waiting buffer/ready buffer/rolling "
        "buffer/slots_used weights/sync_s weights/bytes_per_s"
    ),
    "evaluate-grpo": "greedy/pass_1 t0.6/pass_1 t1/pass_1 t1/pass_8 t1/mean_length t1/format_rate",
}
ARTIFACTS = {
    "sft": "",
    "grpo": "grpo.png model samples-00000.json",
    "evaluate-grpo": "answers-greedy.json answers-t0.6.json answers-t1.json",
}


@pytest.fixture(scope="module")
def tracked(result) -> tuple[Any, dict[str, Any], dict[str, Any]]:
    """(client, the newest finished run of each stage, the run that it is a child of). A demo that
    was resumed has stages under more than one."""
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{ROOT}/mlflow.db")
    experiment = client.get_experiment_by_name("h1r")
    runs = client.search_runs(
        [experiment.experiment_id],
        "attributes.status = 'FINISHED'",
        order_by=["attributes.start_time DESC"],
    )
    stages = {}
    for stage in STAGES:
        stages[stage] = next(r for r in runs if r.info.run_name == f"tiny-cpu/{stage}")
    parents = {
        stage: client.get_run(run.data.tags["mlflow.parentRunId"]) for stage, run in stages.items()
    }
    return client, stages, parents


@pytest.mark.parametrize("stage", METRICS)
def test_mlflow_has_what_was_measured_and_made(tracked, stage):
    client, stages, parents = tracked
    run = stages[stage]
    assert set(METRICS[stage].split()) <= set(run.data.metrics)
    assert set(ARTIFACTS[stage].split()) <= {a.path for a in client.list_artifacts(run.info.run_id)}
    assert {"seed", "grpo.steps", "rollout.max_response_tokens"} <= set(run.data.params)
    assert parents[stage].info.run_name == "tiny-cpu"
    assert "resolved.yaml" in [a.path for a in client.list_artifacts(parents[stage].info.run_id)]


def test_mlflow_has_every_step_and_the_model_whole(tracked):
    client, stages, _ = tracked
    run_id = stages["grpo"].info.run_id
    rewards = client.get_metric_history(run_id, "reward/mean")
    steps = yaml.safe_load((FOLDER / "resolved.yaml").read_text())["grpo"]["steps"]
    assert [m.step for m in sorted(rewards, key=lambda m: m.step)] == list(range(steps))
    logged = {Path(a.path).name: a.file_size for a in client.list_artifacts(run_id, "model")}
    there = {f.name: f.stat().st_size for f in (FOLDER / "model").iterdir() if f.is_file()}
    assert logged == there


def test_minutes_are_the_runs_wall_time(result, tracked):
    _, stages, parents = tracked
    minutes = result["minutes"]
    assert set(STAGES) < set(minutes) and min(minutes.values()) >= 0
    for stage, run in stages.items():  # engine start and job submission are the stage's too
        assert minutes[stage] > (run.info.end_time - run.info.start_time) / 60_000
    if len({p.info.run_id for p in parents.values()}) == 1:  # else a part was done by another
        whole = parents["sft"].info
        assert sum(minutes.values()) == pytest.approx(
            (whole.end_time - whole.start_time) / 60_000, abs=0.5
        )
