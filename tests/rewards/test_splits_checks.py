"""Ground truths are checked at load as the run's own settings judge them."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import cluster.splits
from h1r_rl.config.schema import RewardConfig

CHECK = json.dumps({"check": "def check(f): f(1)", "entry_point": "f"})


def test_the_runs_reward_settings_apply(monkeypatch):
    asked = {}
    monkeypatch.setattr(
        cluster.splits, "load_problems", lambda *_, split, check_ground_truths, **__: asked.update(
            {split: check_ground_truths}
        )
    )
    http = RewardConfig.model_validate({"sandbox": {"http": "http://nowhere:1"}})
    config = SimpleNamespace(data=SimpleNamespace(rl=("x",), sft=("x",)), reward=http)
    for split in ("rl", "sft"):
        cluster.splits.load_split(config, Path("nowhere"), split)  # type: ignore[arg-type]
    assert asked["sft"] is None
    assert asked["rl"]([("code", CHECK), ("math", "5")]) == ["check_needs_namespaces", None]
    config.reward = RewardConfig()
    cluster.splits.load_split(config, Path("nowhere"), "rl")  # type: ignore[arg-type]
    assert asked["rl"]([("code", CHECK)]) == [None]
