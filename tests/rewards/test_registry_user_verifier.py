"""A user's own verifier by import path: every way it can misbehave is a reason code."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import yaml

from h1r_rl.config.schema import DataConfig, RewardConfig
from h1r_rl.errors import DataError
from h1r_rl.records import Prompt
from rewards.ground_truth import check_ground_truths
from rewards.judge import Judge
from rewards.registry import BUILT_IN, find


@pytest.fixture(scope="module")
def judge():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parent))
        judge = Judge(RewardConfig(timeout_s=1.0, memory_mib=512), max_response_tokens=100)
        yield judge
        judge.close()


def verdict_of(judge: Judge, function: str, text: str = "a b c", truth: str = "4"):
    ids = np.arange(4, dtype=np.int32)
    return judge.verify(Prompt("p", 0, ids, "q", f"user_verifiers:{function}", truth), text)


def test_its_verdict_is_taken_as_it_is(judge):
    verdict = verdict_of(judge, "word_count")
    assert (verdict.score, verdict.reason) == (0.75, "counted")
    assert verdict.parts == {"accuracy": 0.0, "share": 0.75}
    assert verdict_of(judge, "has_no_verdict").score is None


def test_it_sees_prompt_text_and_options(judge):
    verdict = verdict_of(judge, "sees_everything", text="\ud800é")
    assert (verdict.score, verdict.reason) == (1.0, "\ud800é")


@pytest.mark.parametrize(
    ("function", "score", "reason"),
    [
        ("raises", None, "verifier_error:ValueError"),
        ("exits", None, "verifier_error:SystemExit"),
        ("returns_a_number", None, "verifier_error:TypeError"),
        ("returns_nan", None, "verifier_error:ValueError"),
        ("no_such_function", None, "verifier_error:AttributeError"),
        ("vanishes", None, "worker_lost"),
        ("hangs", 0.0, "timeout"),
        ("eats_memory", 0.0, "memory"),
        ("prints", 1.0, "fine"),
    ],
)
def test_misbehaviour_is_a_reason_code(judge, function, score, reason):
    verdict = verdict_of(judge, function)
    assert (verdict.score, verdict.reason) == (score, reason)
    assert verdict_of(judge, "word_count").score == 0.75


def test_a_process_killed_from_outside_is_tried_again(judge, tmp_path):
    assert verdict_of(judge, "is_killed_once", truth=str(tmp_path / "mark")).reason == "second try"


def test_the_readmes_example(tmp_path, monkeypatch):
    """As a reader would take it: the file, the setting, the promised reasons."""
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    section = readme.split("## A verifier of your own")[1].split("\n## ")[0]
    setting, source = re.findall(r"```\w+\n(.*?)```", section, re.S)
    name = yaml.safe_load(setting)["data"]["default_verifier"]
    assert DataConfig.model_validate({"default_verifier": name}).default_verifier == name
    (tmp_path / "my_rewards.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    judge = Judge(RewardConfig(timeout_s=20), max_response_tokens=100)

    def verdict(truth: str, text: str):
        return judge.verify(Prompt("p", 0, np.zeros(0, np.int32), "q", name, truth), text)

    try:
        half = verdict("red Blue", "<think>blue</think>It is RED")
        assert (half.score, half.parts, half.reason) == (0.5, {"accuracy": 0.0}, "counted")
        assert verdict("red", "red").parts == {"accuracy": 1.0}
        error = verdict("", "red")
        assert (error.score, error.reason) == (None, "verifier_error:ZeroDivisionError")
    finally:
        judge.close()
    assert check_ground_truths([(name, "red"), (name, " ")]) == [None, "empty"]


def test_names(judge):
    assert find("math") is BUILT_IN["math"]
    assert find("package.module:function").module == "package.module"
    for name in ("maths", "", "package.module:", ":function", "package.module:a b"):
        with pytest.raises(DataError, match="math"):
            find(name)
    ids = np.zeros(0, np.int32)
    assert judge.verify(Prompt("p", 0, ids, "q", "maths", "4"), "x").reason == "unknown_verifier"
    missing = judge.verify(Prompt("p", 0, ids, "q", "no_such_package:verify", "4"), "x")
    assert missing.reason == "verifier_error:ModuleNotFoundError"
