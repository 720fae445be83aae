"""Every alarm goes off on its fault, stays silent on a healthy run, and names its page."""

import json
import math
import re
from pathlib import Path

import pytest

from h1r_rl.config.schema import GRPOConfig, LearnerConfig, RolloutConfig, TripwiresConfig
from h1r_rl.errors import RunFailed
from h1r_rl.grpo.tripwires import (
    ALARMS,
    GAP_FLOOR,
    SLIP_FLOOR,
    SLIP_STOP,
    Tripwires,
    gap_bounds,
    reload_limit,
)

ROOT = Path(__file__).parents[2]
PAGES = ROOT / "docs" / "tripwires"
HEALTHY = {
    "learner/entropy": 0.8,
    "learner/grad_norm": 0.4,
    "reward/zero_signal_groups": 0.3,
    "rollout/truncated": 0.05,
}


def rollout(**settings) -> RolloutConfig:
    return RolloutConfig(max_response_tokens=8, max_model_len=16, **settings)


def tripwires(**settings) -> Tripwires:
    grpo = GRPOConfig(steps=1, **settings)
    return Tripwires(grpo, rollout(dtype="float32"), LearnerConfig())


def after(wires: Tripwires, steps: int = 30, **changes: float) -> dict[str, float]:
    logged = {}
    for step in range(steps):
        logged = wires.after_step(step, HEALTHY | {k.replace("__", "/"): v
                                                   for k, v in changes.items()})  # fmt: skip
    return logged


def test_a_healthy_run_rings_nothing(caplog):
    wires = tripwires()
    for step in range(40):
        wires.before_update(step, {"logprob_gap": 3e-6, "logprob_gap_stale": 0.02})
    assert after(wires) == {f"tripwire/{name}": 0.0 for name in ALARMS}
    assert not caplog.records


@pytest.mark.parametrize(
    ("alarm", "fault"),
    [
        ("entropy", {"learner__entropy": 0.01}),
        ("entropy", {"learner__entropy": 4.0}),
        ("entropy", {"learner__entropy": math.nan}),
        ("zero_signal", {"reward__zero_signal_groups": 0.95}),
        ("truncation", {"rollout__truncated": 0.5}),
        ("grad_norm", {"learner__grad_norm": 9.0}),
    ],
)
def test_each_alarm_rings_once_and_falls_silent_again(alarm, fault, caplog):
    wires = tripwires()
    after(wires)
    logged = after(wires, 6 if alarm != "grad_norm" else 1, **fault)
    assert logged[f"tripwire/{alarm}"] == 1.0 and sum(logged.values()) == 1.0
    assert len(caplog.records) == 1
    assert f"docs/tripwires/{alarm}.md" in caplog.text
    if not math.isnan(sum(fault.values())):
        assert after(wires)[f"tripwire/{alarm}"] == 0.0


def test_a_growing_gap_warns_and_then_stops(caplog):
    wires = tripwires()
    warn, stop = gap_bounds(GRPOConfig(steps=1), rollout(dtype="float32"), LearnerConfig())
    wires.before_update(0, {"logprob_gap": 0.5 * (warn + stop)})
    assert "docs/tripwires/logprob_gap.md" in caplog.text
    assert wires.after_step(0, HEALTHY)["tripwire/logprob_gap"] == 1.0
    for gap in (1.01 * stop, math.nan, math.inf):
        with pytest.raises(RunFailed, match="step 3: engine and learner disagree.*logprob_gap.md"):
            wires.before_update(3, {"logprob_gap": gap})
    with pytest.raises(RunFailed, match="earlier weights"):
        wires.before_update(3, {"logprob_gap_stale": 0.6})
    wires.before_update(4, {})  # a step without a token to compare


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_wrong_temperature_stops_where_the_gap_alone_would_not(dtype):
    wires = Tripwires(GRPOConfig(steps=1), rollout(dtype=dtype), LearnerConfig())

    def step(slip, error):
        found = {"temperature_slip": slip, "temperature_slip_error": error, "logprob_gap": 0.0}
        wires.before_update(0, found)

    step(SLIP_FLOOR, 1e-4)
    step(-0.3, 0.06)  # five errors reach back to 0: a few tokens say nothing
    for slip, error in ((0.05, 1e-3), (-0.05, 1e-3), (math.nan, 1e-3)):
        with pytest.raises(RunFailed, match="temperature.*logprob_gap.md"):
            step(slip, error)


def test_bounds_follow_the_dtypes_and_the_settings_win():
    config = GRPOConfig(steps=1)
    fine = gap_bounds(config, rollout(dtype="float32"), LearnerConfig())
    coarse = gap_bounds(config, rollout(dtype="bfloat16"), LearnerConfig())
    assert coarse > fine
    autocast = LearnerConfig(autocast="bfloat16")
    assert gap_bounds(config, rollout(dtype="float32"), autocast) == coarse
    own = GRPOConfig(steps=1, logprob_gap_warn=0.1, logprob_gap_stop=0.2)
    assert gap_bounds(own, rollout(), LearnerConfig()) == (0.1, 0.2)
    only_stop = GRPOConfig(steps=1, logprob_gap_stop=1e-9)
    assert gap_bounds(only_stop, rollout(), LearnerConfig()) == (1e-9, 1e-9)
    assert all(0 < floor < 0.1 for floor in GAP_FLOOR.values())


def test_another_batch_is_no_corrupted_reload():
    """Few rows round differently by up to 3e-5; the bound of the mean would be too near."""
    for dtype in ("float32", "bfloat16"):
        _, stop = gap_bounds(GRPOConfig(steps=1), rollout(dtype=dtype), LearnerConfig())
        assert reload_limit(rollout(dtype=dtype)) >= max(stop, 30 * 3e-5)


def test_settings_reach_the_alarms():
    wires = tripwires(tripwires=TripwiresConfig(truncation_share=0.01, window=1))
    assert after(wires, 1)["tripwire/truncation"] == 1.0


@pytest.mark.parametrize("alarm", ALARMS)
def test_every_alarm_has_a_page_that_says_what_to_do(alarm):
    page = (PAGES / f"{alarm}.md").read_text()
    assert "## What it means" in page and "## What to change" in page


@pytest.mark.parametrize(
    ("alarm", "metric", "silent", "ringing"),
    [
        ("entropy", "learner__entropy", (0.8 * 0.11, 0.8 * 2.9), (0.8 * 0.09, 0.8 * 3.1)),
        ("zero_signal", "reward__zero_signal_groups", (0.0, 0.79), (0.81, 1.0)),
        ("truncation", "rollout__truncated", (0.0, 0.24), (0.26, 1.0)),
        ("grad_norm", "learner__grad_norm", (0.0, 0.4 * 9.9), (0.4 * 10.1,)),
    ],
)
def test_defaults_ring_where_they_say(alarm, metric, silent, ringing):
    for values, rings in ((silent, 0.0), (ringing, 1.0)):
        for value in values:
            wires = tripwires()
            after(wires)
            logged = after(wires, 5 if alarm != "grad_norm" else 1, **{metric: value})
            assert logged[f"tripwire/{alarm}"] == rings, value


def test_a_skipped_step_neither_rings_nor_counts():
    wires = tripwires()
    after(wires)
    logged = after(wires, 30, learner__grad_norm=math.nan, learner__skipped=1.0)
    assert logged["tripwire/grad_norm"] == 0.0
    assert after(wires, 1, learner__grad_norm=9.0)["tripwire/grad_norm"] == 1.0


@pytest.mark.parametrize(
    ("alarm", "setting"),
    [
        ("entropy", "entropy_fall"),
        ("entropy", "entropy_rise"),
        ("entropy", "window"),
        ("zero_signal", "zero_signal_share"),
        ("zero_signal", "window"),
        ("truncation", "truncation_share"),
        ("truncation", "window"),
        ("grad_norm", "grad_norm_jump"),
        ("logprob_gap", "logprob_gap_stale_stop"),
    ],
)
def test_pages_give_the_defaults(alarm, setting):
    value = getattr(TripwiresConfig(), setting)
    page = (PAGES / f"{alarm}.md").read_text()
    assert re.search(rf"`[\w.]*{setting}`\s+\({value:g}\)", page), f"{setting} ({value:g})"


TABLE = json.loads((ROOT / "tests/benchmarks/results/logprob_gap.json").read_text())["table"]


@pytest.mark.parametrize("coarse", ["float32", "bfloat16"])
@pytest.mark.parametrize("ssm", ["float32", "bfloat16"])
def test_floors_are_the_measured_ones(coarse, ssm):
    """The worst decode of the committed table at these dtypes, rounded up to one digit."""
    worst = max(
        row["mean"] for row in TABLE
        if row["path"] == "decode" and row["ssm"] == ssm
        and ("bfloat16" in (row["engine"], row["learner"])) == (coarse == "bfloat16")
    )  # fmt: skip
    floor = GAP_FLOOR[coarse, ssm]
    assert worst <= floor <= worst + 10 ** math.floor(math.log10(worst)), worst
    assert {row["temperature"] for row in TABLE} == {0.6, 1.0, 1.3}


def test_the_floor_of_the_temperature_is_the_measured_one():
    worst = max(abs(row["temperature_slip"]) for row in TABLE if row["path"] == "decode")
    assert worst <= SLIP_FLOOR <= worst + 10 ** math.floor(math.log10(worst)), worst
    page = (PAGES / "logprob_gap.md").read_text()
    assert f"beyond {SLIP_STOP:g}" in page
