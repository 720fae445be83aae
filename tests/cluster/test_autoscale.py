"""The rule against simulated loads, and the loop that applies it."""

from __future__ import annotations

import asyncio

import numpy as np
import pytest

from cluster.autoscale import Autoscaler, RuleState, Waits, wanted_engines
from cluster.grpo_loop import train_grpo
from cluster.scale import Request
from h1r_rl.config.schema import AutoscaleConfig

BOUNDS = AutoscaleConfig(min=1, max=6, patience=3, cool_down=4)


def overlapped(engines: int, load: float) -> tuple[float, float]:
    """Shares of a step that (learner, engines) wait, generation beside learning. `load`: engines
    that generate exactly as fast as the learner learns."""
    return max(1 - engines / load, 0.0), max(1 - load / engines, 0.0)


def in_turns(engines: int, load: float) -> tuple[float, float]:
    """The same at staleness 0: one waits while the other works."""
    generation = load / engines
    return generation / (1 + generation), 1 / (1 + generation)


def simulate(shares, loads, settings=BOUNDS, engines=1, noise=0.0, seed=0) -> list[int]:
    rng = np.random.default_rng(seed)
    state, series = RuleState(), []
    for load in loads:
        wait, idle = np.clip(shares(engines, load) + rng.normal(0, noise, 2), 0, 1)
        engines, state = wanted_engines(settings, state, engines, Waits(1.0, wait, idle))
        series.append(engines)
    return series


def changes(series: list[int]) -> list[int]:
    """Steps at which the number changed."""
    return [step for step in range(1, len(series)) if series[step] != series[step - 1]]


@pytest.mark.parametrize("shares", [overlapped, in_turns])
@pytest.mark.parametrize("dead_band", [0.0, 0.1, 0.3])
@pytest.mark.parametrize("first", [1, 6])
def test_a_steady_load_is_met_once_and_for_all(shares, dead_band, first):
    settings = BOUNDS.model_copy(update={"dead_band": dead_band})
    for load in np.arange(0.3, 8, 0.3):
        series = simulate(shares, [load] * 150, settings, engines=first)
        assert len(set(np.sign(np.diff(series))) - {0}) <= 1, (load, series)  # no way back
        assert changes(series[100:]) == []
        wait, idle = shares(series[-1], load)
        if series[-1] < settings.max:
            assert wait - idle <= dead_band + 1e-9


def test_it_follows_a_load_that_changes_both_ways():
    series = simulate(overlapped, [0.8] * 40 + [4.0] * 60 + [0.8] * 80)
    assert series[39] == 1 and series[99] == 4 and series[-1] == 1


def test_noise_within_the_dead_band_changes_nothing():
    settings = BOUNDS.model_copy(update={"dead_band": 0.2, "patience": 5})
    for seed in range(20):
        series = simulate(overlapped, [3.0] * 500, settings, engines=3, noise=0.1, seed=seed)
        assert changes(series) == [], seed


def test_a_spike_shorter_than_patience_changes_nothing():
    loads = ([1.0] * 5 + [5.0] * (BOUNDS.patience - 1)) * 40
    assert set(simulate(overlapped, loads)) == {1}


def test_one_at_a_time_within_the_bounds_and_never_within_the_cool_down():
    for loads, first in (([50.0] * 100, 1), ([0.01] * 100, 6)):
        series = simulate(overlapped, loads, engines=first)
        assert min(series) >= BOUNDS.min and max(series) <= BOUNDS.max
        assert series[-1] == (BOUNDS.max if first == 1 else BOUNDS.min)
        assert set(np.abs(np.diff(series))) == {0, 1}
        assert set(np.diff(changes(series))) == {BOUNDS.cool_down + BOUNDS.patience}


def test_engines_that_idle_as_much_are_not_what_the_learner_waits_for():
    """Both wait for verdicts."""
    assert set(simulate(lambda *_: (0.8, 0.75), [0.0] * 50)) == {1}


def test_no_number_no_change():
    step = Waits(1.0, float("nan"), 0.0)
    engines, state = wanted_engines(BOUNDS, RuleState((), BOUNDS.patience - 1), 2, step)
    assert engines == 2 and state.streak == 0


def test_a_wave_of_groups_is_judged_as_a_whole():
    """Staleness 2: three batches are done at once, then the learner is busy for three steps. It
    waits half of the time; steps alone would never ask for the same thing twice."""
    waits = [Waits(4.0, 0.75, 0.0), Waits(1.0, 0.0, 0.0), Waits(1.0, 0.0, 0.0)] * 10
    for wave, asked_for in ((1, False), (3, True)):
        engines, state, asked_at = 1, RuleState(), []
        for step, waited in enumerate(waits):
            engines, state = wanted_engines(BOUNDS, state, 1, waited, wave)
            asked_at += [step] if engines == 2 else []
        assert bool(asked_at) == asked_for
        if asked_for:  # one step that stands out colours its wave: that alone is not enough
            assert asked_at[0] == BOUNDS.patience + wave - 2


class Pool:
    def __init__(self, *names: str) -> None:
        self.names, self.calm = list(names), True

    def members(self) -> dict[str, int]:
        return dict.fromkeys(self.names, 1)

    def settled(self) -> bool:
        return self.calm


SHORT = {"time/wait_s": 0.9, "time/step_s": 1.0, "engine/bubble": 0.0}


def test_waits_for_transfers_ask_for_no_engine():
    autoscaler = Autoscaler(BOUNDS.model_copy(update={"cool_down": 0}), Pool("rollout-0"))
    for _ in range(20):
        autoscaler.after_step(SHORT | {"time/wait_s": 0.0, "learner/bubble": 0.9})
        assert autoscaler.take() is None


@pytest.mark.parametrize("fault", ["replaced within a step", "being replaced", "asked for"])
def test_steps_in_which_engines_came_or_went_do_not_count(fault):
    pool = Pool("rollout-0", "rollout-1")
    autoscaler = Autoscaler(BOUNDS.model_copy(update={"cool_down": 0}), pool)
    autoscaler.after_step(SHORT)  # who served it from its beginning is not known
    for _ in range(BOUNDS.patience - 1):
        autoscaler.after_step(SHORT)
    if fault == "asked for":
        autoscaler.settle()
    elif fault == "being replaced":
        pool.calm = False
        for _ in range(20):
            autoscaler.after_step(SHORT)
            assert autoscaler.take() is None
        pool.calm = True
    else:
        pool.names[0] = "rollout-2"
        autoscaler.after_step(SHORT)
    for _ in range(BOUNDS.patience - 1):
        assert autoscaler.take() is None
        autoscaler.after_step(SHORT)
    assert autoscaler.take() is None
    autoscaler.after_step(SHORT)
    wanted, why = autoscaler.take()
    assert wanted == 3 and "learner waits 90%, 2 engines idle 0%" in why
    assert autoscaler.take() is None


async def finish(run):
    await asyncio.wait_for(train_grpo(run), 60)
    await run.scaling.close()
    return [int(step["engine/engines"]) for step in run.tracker.steps]


async def until(condition):
    while not condition():  # noqa: ASYNC110 - what is waited for happens in stubs without events
        await asyncio.sleep(0.002)


@pytest.fixture
def busy_world(loop_world):
    """An engine makes a sample at a time, 8 a step: two are about as fast as the learner."""
    loop_world.at_once, loop_world.learn_s = 1, 0.09
    loop_world.sample_s = lambda prompt, index: 0.018
    return loop_world


def autoscaled(*more: str) -> tuple[str, ...]:
    bounds = ("max=3", "dead_band=0.25", "patience=3", "cool_down=2")
    own = (f"rollout.autoscale.{setting}" for setting in bounds)
    return ("grpo.max_staleness=2", "cluster.num_cpus=8", *own, *more)


async def test_a_run_adds_the_engine_that_its_learner_waits_for_and_no_other(busy_world):
    run = await busy_world.build("grpo.steps=24", *autoscaled())
    engines = await finish(run)
    assert engines[0] == 1 and engines[-1] == 2 and max(engines) == 2
    tags = {key: text for key, text in run.tracker.tags.items() if key.startswith("scale.")}
    assert len(tags) == 2
    begun, done = tags.values()
    assert "2 rollout actors from step" in begun and "autoscale: the learner waits" in begun
    assert "2 rollout actors asked at step" in done
    assert run.buffer.dropped == {"stale": 0} and not run.rollouts.lost()
    busy_world.account(run, busy_world)


async def test_engines_that_idle_leave_down_to_the_fewest(busy_world):
    busy_world.sample_s = lambda prompt, index: 0.001
    busy_world.learn_s = 0.04
    run = await busy_world.build("grpo.steps=40", *autoscaled("rollout.actors=3"))
    engines = await finish(run)
    assert engines[0] == 3 and engines[-1] == 1
    assert not run.rollouts.lost() and run.counts["engines_lost"] == 0
    busy_world.account(run, busy_world)


async def test_a_lost_engine_is_replaced_and_nothing_else_is_changed(busy_world):
    """The learner waits while the replacement comes up, longer than patience and cool-down."""
    run = await busy_world.build("grpo.steps=20", *autoscaled("rollout.actors=2"))
    training = asyncio.create_task(finish(run))
    await until(lambda: len(run.tracker.steps) >= 3)
    busy_world.start_s = 1.0
    busy_world.engines["rollout-0"].kill()
    engines = await training
    assert 1 in engines and engines[-1] == 2 and max(engines) == 2
    assert not [key for key in run.tracker.tags if key.startswith("scale.")]
    busy_world.account(run, busy_world)


async def test_an_engine_lost_for_good_is_not_replaced_by_the_rule(busy_world):
    """Or the allowance for faults would be none."""
    run = await busy_world.build(
        "grpo.steps=20", *autoscaled("rollout.actors=2", "rollout.max_replacements=0")
    )
    training = asyncio.create_task(finish(run))
    await until(lambda: len(run.tracker.steps) >= 3)
    busy_world.engines["rollout-0"].kill()
    engines = await training
    assert engines[-1] == 1  # and the learner waits for it
    assert max(step["learner/bubble"] for step in run.tracker.steps[-4:]) > 0.3
    assert not [key for key in run.tracker.tags if key.startswith("scale.")]


async def test_what_is_asked_for_by_hand_within_the_bounds_stands_for_the_cool_down(busy_world):
    busy_world.sample_s = lambda prompt, index: 0.001
    busy_world.learn_s = 0.04
    run = await busy_world.build("grpo.steps=60", *autoscaled("rollout.autoscale.cool_down=8"))
    training = asyncio.create_task(finish(run))
    await until(lambda: len(run.tracker.steps) >= 12)  # the first cool-down is over
    more = busy_world.control.ask(Request(rollout_actors=3, reward_workers=2))
    await until(lambda: busy_world.control.outcome(more)[0] == "done")
    from_step = len(run.tracker.steps)
    outside = busy_world.control.ask(Request(rollout_actors=4))
    engines = await training
    outcome, text = busy_world.control.outcome(outside)
    assert outcome == "refused" and "rollout.autoscale keeps this run between 1 and 3" in text
    assert run.rewards.workers == 2
    assert engines[from_step : from_step + 8] == [3] * 8
    assert engines[-1] == 1
    busy_world.account(run, busy_world)


async def test_more_than_the_cluster_has_free_is_not_asked_for_at_every_step(busy_world):
    busy_world.free = {"CPU": 0.5}
    run = await busy_world.build("grpo.steps=20", *autoscaled())
    assert set(await finish(run)) == {1}
    refused = [key for key in run.tracker.tags if key.endswith(".refused")]
    assert 1 <= len(refused) <= 20 // (3 + 2)
    assert "0.5 are free" in run.tracker.tags[refused[0]]
