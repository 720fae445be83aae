"""What `make demo` leaves: the result, the model in plain libraries, the MLflow record."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

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
    assert sum(result["minutes"].values()) > 0 and result["model"].endswith("tiny-cpu/model")
    before, after = evaluation["sft"], evaluation["grpo"]
    for setting in ("greedy", "t0.6"):
        gain = after[setting]["pass@1"] - before[setting]["pass@1"]
        error = (after[setting]["se"] ** 2 + before[setting]["se"] ** 2) ** 0.5
        assert gain >= 0.40 and gain - 1.96 * error > 0
    assert after["pass@8"] >= before["pass@8"] - 0.03


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


def test_mlflow_has_the_run_and_its_children(result):
    from mlflow.tracking import MlflowClient

    client = MlflowClient(f"sqlite:///{ROOT}/mlflow.db")
    experiment = client.get_experiment_by_name("h1r")
    runs = client.search_runs([experiment.experiment_id])
    parent = next(r for r in runs if r.info.run_name == "tiny-cpu" and r.info.status == "FINISHED")
    children = {
        r.info.run_name: r
        for r in runs
        if r.data.tags.get("mlflow.parentRunId") == parent.info.run_id
    }
    grpo = children.get("tiny-cpu/grpo")
    if grpo is None:
        pytest.skip("the run was resumed: its GRPO stage belongs to an earlier parent")
    wanted = (
        "reward/mean reward/accuracy reward/format reward/score_spread reward/zero_signal_groups "
        "learner/kl_behaviour learner/clip_fraction learner/entropy learner/grad_norm "
        "learner/learning_rate learner/target_tokens_per_s rollout/length_mean rollout/truncated "
        "rollout/staleness_mean weights/sync_s reward/queue_depth"
    )
    assert set(wanted.split()) <= set(grpo.data.metrics)
    names = [a.path for a in client.list_artifacts(grpo.info.run_id)]
    assert "grpo.png" in names and "model" in names and "samples-00000.json" in names
    assert {"tiny-cpu/sft", "tiny-cpu/evaluate-grpo"} <= set(children)
