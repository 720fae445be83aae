"""The run loop against what goes wrong and what is asked of it while it runs."""

import asyncio
import logging

import pytest

from cluster.grpo_loop import MAX_EMPTY_STEPS, MAX_QUARANTINED, train_grpo
from cluster.scale import Request
from cluster.weight_sync import ATTEMPTS, MAX_LATE
from h1r_rl.errors import RolloutLost, RunFailed, WeightTransferError
from h1r_rl.weight_manifest import ParameterSpec, TransferEpoch, WeightManifest

DEADLINE_S = 20.0


async def run_to_end(run):
    await asyncio.wait_for(train_grpo(run), DEADLINE_S)
    await run.scaling.close()
    return run.tracker.steps


def cause(error):
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


async def failure(run) -> BaseException:
    with pytest.raises(BaseExceptionGroup) as caught:
        await run_to_end(run)
    return cause(caught.value)


async def until(condition):
    while not condition():  # noqa: ASYNC110 - what is waited for happens in stubs without events
        await asyncio.sleep(0.002)


async def steps_done(run, count):
    await until(lambda: len(run.tracker.steps) >= count)


@pytest.mark.parametrize("staleness", [0, 1, 3])
async def test_steps_end_with_the_engines_at_the_last_version(loop_world, staleness):
    run = await loop_world.build(f"grpo.max_staleness={staleness}", "rollout.actors=2")
    steps = await run_to_end(run)
    assert len(steps) == 6 and all(len(plan.groups) == 4 for plan in loop_world.plans)
    assert {e.holds for e in loop_world.engines.values()} == {"6"}
    assert all(step["rollout/staleness_max"] <= staleness for step in steps)
    assert all(step["buffer/dropped_stale"] == 0 for step in steps)
    loop_world.account(run, loop_world)


async def test_nothing_waits_for_a_long_answer(loop_world):
    """Its siblings are judged, other groups are asked for and trained on while it is written."""
    long_ends = asyncio.Event()
    loop_world.sample_s = lambda prompt, i: 0.4 if (prompt.prompt_id, i) == ("p1", 1) else 0.002
    run = await loop_world.build("grpo.max_staleness=3", "grpo.steps=3")
    judged, score = [], run.rewards.score

    async def noted(prompt, part):
        judged.extend((prompt.prompt_id, i) for i in part.sample_indices)
        if ("p1", 1) in judged:
            long_ends.set()
        return await score(prompt, part)

    run.rewards.score = noted
    training = asyncio.create_task(run_to_end(run))
    await until(lambda: ("p1", 0) in judged)
    assert not long_ends.is_set()
    await steps_done(run, 1)
    assert not long_ends.is_set() and len(run.prompts.issued) > 4  # beyond the first batch
    trained = {group.key for plan in loop_world.plans for group in plan.groups}
    assert len(trained) >= 4 and "p1/0" not in trained
    await training
    loop_world.account(run, loop_world)


async def test_the_learners_bubble_is_its_wait_for_groups_and_for_transfers(loop_world):
    loop_world.send_s, loop_world.learn_s = 0.08, 0.005
    run = await loop_world.build("grpo.max_staleness=3", "grpo.steps=8")
    steps = await run_to_end(run)
    for step in steps:
        waited_s = step["time/wait_s"] + step["time/transfer_wait_s"]
        assert step["learner/bubble"] == pytest.approx(waited_s / step["time/step_s"])
    assert max(step["time/transfer_wait_s"] for step in steps) > 0.05


async def test_skipped_steps_at_staleness_zero_do_not_stall(loop_world):
    loop_world.skip = {1, 2, 4}
    run = await loop_world.build("grpo.max_staleness=0")
    await run_to_end(run)
    assert run.buffer.dropped["skipped_step"] == 12
    assert [e.holds for e in loop_world.engines.values()] == ["3"]
    loop_world.account(run, loop_world)


@pytest.mark.parametrize("staleness", [0, 1])
async def test_groups_without_signal_are_made_up_for(loop_world, staleness):
    """Two of three have none: each step is filled up all the same."""
    loop_world.flat = {f"p{i}" for i in range(1000) if i % 3}
    run = await loop_world.build(f"grpo.max_staleness={staleness}", "grpo.max_backfill=8")
    await run_to_end(run)
    assert [len(plan.groups) for plan in loop_world.plans] == [4] * 6
    trained = {group.prompt.prompt_id for plan in loop_world.plans for group in plan.groups}
    assert not trained & loop_world.flat
    assert run.buffer.dropped["no_signal"] >= 2 * (6 * 4 - 2)
    loop_world.account(run, loop_world)


async def test_a_step_whose_backfill_is_used_up_trains_on_what_has_signal(loop_world):
    loop_world.flat = {f"p{i}" for i in range(2, 1000)} - {"p30", "p31", "p50"}
    run = await loop_world.build("grpo.max_staleness=0", "grpo.max_backfill=1", "grpo.steps=2")
    await run_to_end(run)
    sizes = [len(plan.groups) for plan in loop_world.plans]
    assert sizes[0] == 2 and all(0 < size < 4 for size in sizes)  # after steps that found none
    loop_world.account(run, loop_world)


async def test_a_reward_that_never_differs_ends_the_run(loop_world):
    loop_world.flat = {f"p{i}" for i in range(10_000)}
    run = await loop_world.build("grpo.max_backfill=0")
    error = await failure(run)
    assert f"{MAX_EMPTY_STEPS} steps in a row found no group" in str(error)
    assert "nothing can be learned" in str(error) and "mean reward of the last groups: 0.00" in str(
        error
    )
    assert not loop_world.plans


async def test_a_prompt_without_room_is_quarantined_and_told(loop_world, caplog):
    loop_world.too_long = {"p1", "p5"}
    run = await loop_world.build()
    with caplog.at_level(logging.WARNING):
        steps = await run_to_end(run)
    assert run.counts["quarantined"] == 2 == run.buffer.dropped["quarantined"]
    assert steps[-1]["faults/quarantined"] == 2
    assert "prompt p1/0 is quarantined: prompt p1/0 leaves no room" in caplog.text
    loop_world.account(run, loop_world)


async def test_nothing_but_quarantine_ends_the_run(loop_world):
    loop_world.too_long = {f"p{i}" for i in range(1000)}
    error = await failure(await loop_world.build())
    assert isinstance(error, RunFailed)
    assert f"{MAX_QUARANTINED} prompts in a row" in str(error) and "no room" in str(error)


async def test_a_poisonous_prompt_is_quarantined_and_its_engines_replaced(loop_world):
    loop_world.poison = {"p3"}
    run = await loop_world.build("rollout.actors=2")
    steps = await run_to_end(run)
    assert run.buffer.dropped["quarantined"] == 1  # and nobody who shared an engine with it
    assert len(run.rollouts.lost()) == 3
    assert steps[-1]["engine/engines_lost"] == 3
    loop_world.account(run, loop_world)


async def test_an_engine_that_dies_is_replaced_and_serves_after_its_first_commit(loop_world):
    run = await loop_world.build("rollout.actors=2", "grpo.steps=12")
    training = asyncio.create_task(run_to_end(run))
    await steps_done(run, 3)
    loop_world.engines["rollout-0"].kill()
    await training
    joiner = loop_world.engines["rollout-2"]
    assert joiner.asked and all(version != "0" for _, version in joiner.asked)
    assert set(run.rollouts.members()) == {"rollout-1", "rollout-2"}
    loop_world.account(run, loop_world)


@pytest.mark.parametrize("staleness", [0, 1])
async def test_all_engines_die_while_the_learner_holds(loop_world, staleness):
    """Nothing is published meanwhile: the joiners get the version that the learner holds."""
    run = await loop_world.build(
        "rollout.actors=2", "grpo.steps=10", f"grpo.max_staleness={staleness}"
    )
    training = asyncio.create_task(run_to_end(run))
    await steps_done(run, 3)
    for engine in list(loop_world.engines.values()):
        engine.kill()
    await training
    assert len(loop_world.engines) == 4
    for name in ("rollout-2", "rollout-3"):
        assert all(version != "0" for _, version in loop_world.engines[name].asked)
    loop_world.account(run, loop_world)


async def test_without_replacements_the_run_ends_and_names_the_causes(loop_world):
    run = await loop_world.build("rollout.max_replacements=0")
    training = asyncio.create_task(failure(run))
    await steps_done(run, 2)
    loop_world.engines["rollout-0"].kill()
    error = await training
    assert isinstance(error, RunFailed) and "no rollout engine is left (rollout-0" in str(error)


@pytest.mark.parametrize("staleness", [0, 2])
async def test_a_transfer_that_cannot_be_made_ends_the_run(loop_world, staleness):
    """At staleness 0 the step loop waits for groups, not for the transfer, when it fails."""
    loop_world.send_errors = [RunFailed("learner rank 0 died in send")]
    run = await loop_world.build(f"grpo.max_staleness={staleness}")
    error = await failure(run)
    assert "learner rank 0 died in send" in str(error) and "the engines:" in str(error)


async def test_a_transfer_that_fails_is_made_again(loop_world):
    loop_world.send_errors = [WeightTransferError("one"), WeightTransferError("two")]
    run = await loop_world.build()
    await run_to_end(run)
    assert loop_world.num_sends == 6 + 2
    assert [e.holds for e in loop_world.engines.values()] == ["6"]
    assert loop_world.learners[0].epochs == 3


@pytest.mark.parametrize("times", [1, MAX_LATE, 99])
async def test_an_engine_that_weights_reach_damaged_gets_them_again_or_is_replaced(
    loop_world, times
):
    """While its peer holds the new version: it serves nothing until it has a whole one too."""
    loop_world.damage = {"rollout-0": times}
    run = await loop_world.build("rollout.actors=2", "grpo.steps=8")
    await run_to_end(run)
    kept = times < MAX_LATE
    assert ("rollout-0" in run.rollouts.members()) == kept
    assert ("checksum of w" in run.rollouts.lost().get("rollout-0", "")) != kept
    alive = [loop_world.engines[name] for name in run.rollouts.members()]
    assert len(alive) == 2 and {engine.holds for engine in alive} == {"8"}
    assert loop_world.num_sends >= 8 + min(times, MAX_LATE)
    loop_world.account(run, loop_world)


async def test_a_meeting_that_fails_names_both_sides_and_is_held_again(loop_world, caplog):
    loop_world.missed = [{"rollout-1"}, {"learner"}, {"rollout-0", "learner"}]
    run = await loop_world.build("rollout.actors=2")
    with caplog.at_level(logging.WARNING):
        await run_to_end(run)
    told = [message for message in caplog.messages if message.startswith("version 1, attempt ")]
    assert len(told) == 3
    for message in told:
        assert "the learner (rank 0) and rollout-0, rollout-1 did not meet: " in message
    assert "rollout-1: no meeting" in told[0] and "learner rank 0 failed" in told[1]
    assert "rollout-0: no meeting" in told[2] and "learner rank 0 failed" in told[2]
    assert {engine.holds for engine in loop_world.engines.values()} == {"6"}
    loop_world.account(run, loop_world)


async def test_weights_that_reach_nobody_whole_end_the_run(loop_world):
    loop_world.damage = {"rollout-0": 99, "rollout-1": 99}
    error = await failure(await loop_world.build("rollout.actors=2"))
    assert isinstance(error, WeightTransferError)
    assert f"version 1 did not reach the engines in {ATTEMPTS} attempts" in str(error)
    assert all(
        part in str(error) for part in ("learner (rank 0), w to w", "rollout-0: checksum of w",
                                        "rollout-1: checksum of w")
    )  # fmt: skip
    assert {engine.holds for engine in loop_world.engines.values()} == {"0"}


async def test_completions_that_are_gone_are_generated_again(loop_world):
    loop_world.score_errors = [RolloutLost("rollout-0", "its completions are gone")] * 3
    run = await loop_world.build()
    await run_to_end(run)
    assert run.counts["completions_lost"] == 3
    assert all(len(g.samples) == 2 for plan in loop_world.plans for g in plan.groups)
    loop_world.account(run, loop_world)


async def test_identical_weights_are_pushed_once_more_and_must_change_nothing(loop_world):
    run = await loop_world.build("rollout.actors=2", probe=True)
    steps = await run_to_end(run)
    assert loop_world.num_sends == 6 + 1
    assert steps[-1].get("weights/identical_push_gap", 0.0) == 0.0
    loop_world.reload_noise = {"rollout-1": 0.0}  # each reload moves it
    run = await loop_world.build("rollout.actors=2", probe=True)
    error = await failure(run)
    assert "version 1 pushed twice" in str(error) and "rollout-1 by 0.00" in str(error)
    loop_world.reload_noise, loop_world.reload_shift = {}, 1e-7  # too little for log-probabilities
    error = await failure(await loop_world.build("rollout.actors=1", probe=True))
    assert "version 1 pushed twice left 1 tensors other than they were" in str(error)
    assert "rollout-0: mixer.0.A" in str(error)


@pytest.mark.parametrize(
    ("where", "what"), [("logprob_gap", "current weights"), ("probe_gap", "probe")]
)
async def test_a_run_whose_engine_and_learner_disagree_stops_before_the_update(
    loop_world, where, what
):
    setattr(loop_world, where, 1.0)
    run = await loop_world.build(probe=True)
    error = await failure(run)
    assert "step 0: engine and learner disagree" in str(error) and what in str(error)
    assert loop_world.learners[0].version == 0 and loop_world.num_sends == 0


async def test_a_value_that_the_engine_rounded_stops_the_run(loop_world):
    loop_world.held_value = -2.0 * (1 + 2**-9)  # a bfloat16 A_log
    run = await loop_world.build()
    error = await failure(run)
    assert "step 0" in str(error) and "rollout-0: mixer.0.A by 0.0039" in str(error)
    assert loop_world.learners[0].version == 0


async def test_a_comparison_of_nothing_stops_the_run(loop_world):
    loop_world.held_name = "an engine's own name"
    error = await failure(await loop_world.build())
    assert "expected tensors that rollout-0 and the learner both name, found none" in str(error)
    assert loop_world.learners[0].version == 0


async def test_the_guard_has_a_number_in_every_step(loop_world):
    loop_world.probe_gap = 1e-6
    run = await loop_world.build("grpo.max_staleness=2", probe=True)
    for step in await run_to_end(run):
        assert step["learner/probe_gap"] == pytest.approx(1e-6)


async def test_an_engine_lost_while_a_peer_still_commits_is_no_error(loop_world):
    run = await loop_world.build("rollout.actors=2", "rollout.max_replacements=0")
    pool = run.rollouts
    epoch = TransferEpoch(1, "gloo", "", 0, 3, {"rollout-0": 1, "rollout-1": 2}, 5.0)
    await pool.join_epoch(epoch)
    await pool.begin_receive(WeightManifest((ParameterSpec("w", (4,), "float32"),), 64))
    loop_world.commit_s = {"rollout-1": 0.1}
    commit = asyncio.create_task(pool.commit("1"))
    await asyncio.sleep(0.05)
    pool._engines.lose("rollout-0", RuntimeError("killed"))
    assert await commit == 0.001
    assert pool.newest() == "1" and pool.behind() == []
    assert await pool._engines.serving() == ("rollout-1", pool._engines.members["rollout-1"])
    await pool.close()


async def test_one_to_three_and_back_with_every_prompt_accounted_for(loop_world):
    run = await loop_world.build("grpo.steps=40", "grpo.max_staleness=2")
    training = asyncio.create_task(run_to_end(run))
    await steps_done(run, 5)
    first = loop_world.control.ask(Request(rollout_actors=2, reward_workers=3))
    second = loop_world.control.ask(Request(rollout_actors=3))  # one change with the first
    await until(lambda: loop_world.control.outcome(second)[0] == "done")
    assert loop_world.control.outcome(first) == loop_world.control.outcome(second)
    grown = len(run.tracker.steps)
    assert len(run.rollouts.members()) == 3 and run.rewards.workers == 3
    await steps_done(run, grown + 8)
    third = loop_world.control.ask(Request(rollout_actors=1))
    await until(lambda: loop_world.control.outcome(third)[0] == "done")
    assert list(run.rollouts.members()) == ["rollout-0"]
    await training
    engines = [step["engine/engines"] for step in run.tracker.steps]
    assert engines[0] == 1 and max(engines) == 3 and engines[-1] == 1
    for name in ("rollout-1", "rollout-2"):
        asked = loop_world.engines[name].asked
        assert asked and all(version != "0" for _, version in asked)
    assert run.buffer.dropped == {"stale": 0} and not run.rollouts.lost()
    assert run.counts["engines_lost"] == 0
    tags = " ".join(f"{k}: {v}" for k, v in run.tracker.tags.items())
    assert "3 rollout actors, 3 reward workers" in tags and "done: 1 rollout actors" in tags
    loop_world.account(run, loop_world)


async def test_a_leaver_hands_back_what_it_cannot_finish(loop_world):
    loop_world.sample_s = lambda prompt, index: 0.002 if int(prompt.prompt_id[1:]) % 3 else 0.3
    run = await loop_world.build(
        "rollout.actors=2", "grpo.steps=6", "grpo.max_staleness=3", "rollout.drain_timeout_s=0.05"
    )
    training = asyncio.create_task(run_to_end(run))
    await steps_done(run, 1)
    asked = loop_world.control.ask(Request(rollout_actors=1))
    await until(lambda: loop_world.control.outcome(asked)[0] == "begun")
    await asyncio.sleep(0.005)
    taken = list(loop_world.engines["rollout-1"].asked)
    await training
    assert loop_world.engines["rollout-1"].asked == taken  # it takes nothing more
    assert loop_world.control.outcome(asked)[0] == "done"
    assert run.counts["engines_left"] > 0 and run.counts["quarantined"] == 0
    assert not run.rollouts.lost()
    loop_world.account(run, loop_world)


async def test_more_than_the_cluster_has_is_refused_and_the_run_goes_on(loop_world):
    loop_world.free = {"CPU": 1.5}
    run = await loop_world.build("grpo.steps=8")
    asked = loop_world.control.ask(Request(rollout_actors=4))
    await run_to_end(run)
    outcome, text = loop_world.control.outcome(asked)
    assert outcome == "refused" and "CPU more, 1.5 are free" in text
    assert list(run.rollouts.members()) == ["rollout-0"]


async def test_engines_that_do_not_start_are_told_and_the_run_goes_on(loop_world):
    run = await loop_world.build("grpo.steps=30")
    loop_world.start_s = 99.0
    run.rollouts._engines._start = run.rollouts._engines._start.__class__(
        "m", 0, "0", "r", 0.05, False
    )
    asked = loop_world.control.ask(Request(rollout_actors=3))
    await run_to_end(run)
    outcome, text = loop_world.control.outcome(asked)
    assert outcome == "failed" and "2 of 2 engines did not start" in text
    assert list(run.rollouts.members()) == ["rollout-0"]
    assert run.rollouts.settled()  # nobody is missed: one is what there are to be
    loop_world.account(run, loop_world)


async def test_a_run_that_ends_tells_whoever_waits(loop_world):
    """One change is under way, another was asked for behind it."""
    run = await loop_world.build("grpo.steps=10")
    loop_world.start_s = 99.0
    first = loop_world.control.ask(Request(rollout_actors=2))
    training = asyncio.create_task(run_to_end(run))
    await until(lambda: loop_world.control.outcome(first)[0] == "begun")
    second = loop_world.control.ask(Request(reward_workers=2))
    await training
    for asked in (first, second):
        outcome, text = loop_world.control.outcome(asked)
        assert outcome == "failed" and "the run ended before it was done" in text
    loop_world.account(run, loop_world)


async def test_the_learner_restarts_while_engines_generate_up_to_the_bound(loop_world):
    run = await loop_world.build("grpo.steps=12", "grpo.max_staleness=1")
    training = asyncio.create_task(run_to_end(run))
    await steps_done(run, 4)
    loop_world.start_s = 0.3
    loop_world.control.ask(Request(restart_learner=True))
    while len(loop_world.learners) < 2:
        await asyncio.sleep(0.001)
        ready = run.buffer.metrics()["ready"] + run.buffer.metrics()["taken"]
    assert ready == run.buffer.num_slots  # all that may be, and no more
    await training
    assert loop_world.learners[0].version == loop_world.saved
    assert loop_world.learners[1].version == 12 and loop_world.learners[1].epochs == 1
    assert [e.holds for e in loop_world.engines.values()] == ["12"]
    loop_world.account(run, loop_world)


async def test_all_engines_restart_on_request(loop_world):
    run = await loop_world.build("grpo.steps=12", "rollout.actors=2", "rollout.max_replacements=0")
    training = asyncio.create_task(run_to_end(run))
    await steps_done(run, 4)
    loop_world.start_s = 0.1
    asked = loop_world.control.ask(Request(restart_rollouts=True))
    await until(lambda: loop_world.control.outcome(asked)[0] not in ("waiting", "begun"))
    assert loop_world.control.outcome(asked)[0] == "done"
    assert run.rollouts.counts()["engines"] == 2  # done means that they are back
    await training
    assert set(run.rollouts.members()) == {"rollout-2", "rollout-3"}
    assert run.counts["quarantined"] == 0 == run.counts["engines_lost"]  # no prompt is suspected
    loop_world.account(run, loop_world)


@pytest.mark.parametrize("engines", [1, 2, 3])
async def test_everything_restarts_to_another_size_in_one_change(loop_world, engines):
    """At staleness 0 nothing is published before the joiners have rolled groups out."""
    run = await loop_world.build("grpo.steps=30", "rollout.actors=2", "grpo.max_staleness=0")
    training = asyncio.create_task(run_to_end(run))
    await steps_done(run, 3)
    loop_world.start_s = 0.1
    asked = loop_world.control.ask(
        Request(engines, reward_workers=3, restart_rollouts=True, restart_learner=True)
    )
    await training
    assert loop_world.control.outcome(asked)[0] == "done" and run.rewards.workers == 3
    assert len(run.rollouts.members()) == engines == run.rollouts.num_engines()
    assert len(loop_world.engines) == 2 + max(engines, 2) and len(loop_world.learners) == 2
    loop_world.account(run, loop_world)


async def test_a_generation_cache_keeps_surplus_groups(loop_world):
    """At staleness 0 the engines work through the learner's step, for later steps."""
    loop_world.learn_s = 0.02
    run = await loop_world.build("grpo.max_staleness=0", "grpo.generation_cache=3")
    steps = await run_to_end(run)
    assert run.buffer.num_slots == 7 and run.buffer.max_staleness == 1
    assert max(step["rollout/staleness_max"] for step in steps) == 1
    loop_world.account(run, loop_world)
