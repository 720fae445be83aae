"""Planning and laying out: canonical order, exact counts, endings, equal work."""

import numpy as np
import pytest

from h1r_rl.config.schema import AlgorithmConfig
from h1r_rl.grpo.build_batch import (
    PlannedDocument,
    advantages_by_group,
    build_micro_batch,
    plan_train_batch,
)
from h1r_rl.packing import pack_documents
from h1r_rl.records import Completion, Group, Prompt, Sample, Verdict, VersionSpan

ALGORITHM = AlgorithmConfig()


def make(prompt_id, lengths, scores, finish="stop", spans=None):
    prompt = Prompt(prompt_id, 0, np.arange(4, dtype=np.int32), "", "math", "1")
    spans = spans or [(VersionSpan("3", 0, n),) for n in lengths]
    completions, samples = {}, []
    for i, (n, score) in enumerate(zip(lengths, scores, strict=True)):
        ids = np.arange(100, 100 + n, dtype=np.int32)
        logprobs = -np.arange(1, n + 1, dtype=np.float32)
        completions[i] = Completion(i, ids, logprobs, spans[i], finish, "", "e")
        parts = {} if score is None else {"accuracy": score}
        samples.append(Sample(i, n, finish, spans[i], Verdict(score, parts), None, i))
    return Group(prompt, tuple(samples), 3), completions


def plan_of(groups, **changes):
    settings = {"ranks": 1, "micro_batch_tokens": 64, "learner_version": 3, "max_staleness": 1}
    return plan_train_batch(groups, ALGORITHM, **(settings | changes))


def test_packing_places_each_document_once_within_budget():
    rng = np.random.default_rng(0)
    for ranks in (1, 2, 3):
        lengths = rng.integers(1, 80, 50).tolist()
        placed = pack_documents(lengths, ranks=ranks, budget=64)
        assert sorted(i for r in placed for m in r for i in m) == list(range(50))
        assert len({len(r) for r in placed}) == 1
        for micro_batch in (m for r in placed for m in r):
            assert len(micro_batch) <= 1 or sum(lengths[i] for i in micro_batch) <= 64


def test_plan_does_not_depend_on_the_order_of_arrival():
    a, _ = make("a", (5, 6), (0.0, 1.0))
    b, _ = make("b", (7, 2), (1.0, 0.0))
    assert plan_of([a, b]) == plan_of([b, a])


def test_entries_speak_of_the_token_they_stand_at():
    group, completions = make("a", (3, 2), (1.0, 0.0))
    plan = plan_of([group])
    advantages = advantages_by_group(plan, ALGORITHM)
    documents = (PlannedDocument(0, 0), PlannedDocument(0, 1))
    batch = build_micro_batch(
        plan, documents, {(0, i): c for i, c in completions.items()}, advantages
    )
    assert batch.document_starts.tolist() == [0, 7, 13]
    assert batch.loss_mask.tolist() == [False] * 4 + [True] * 3 + [False] * 4 + [True] * 2
    assert batch.behaviour_logprobs[4:7].tolist() == [-1, -2, -3]
    assert np.allclose(batch.advantages[4:7], advantages[0][0])
    assert batch.positive[4:7].all() and not batch.positive[11:].any()
    assert plan.num_target_tokens == batch.loss_mask.sum() == 5
    assert plan.num_positive_tokens == 3


@pytest.mark.parametrize(
    "finish, score, filtering, targets",
    [
        ("stop", 1.0, False, 10),  # all sampled tokens, the end token included
        ("length", 0.0, False, 10),
        ("length", 0.0, True, 0),  # overlong filtering
        ("pruned", 0.0, False, 8),  # the forced end token never
        ("stop", None, False, 0),  # no verdict: not in the loss
    ],
)
def test_table_of_endings(finish, score, filtering, targets):
    group, _ = make("a", (5, 5), (score, score), finish=finish)
    algorithm = AlgorithmConfig(overlong_filtering=filtering)
    plan = plan_train_batch(
        [group], algorithm, ranks=1, micro_batch_tokens=64, learner_version=3, max_staleness=1
    )
    assert plan.num_target_tokens == targets


def test_a_sample_without_verdict_is_out_of_the_baseline():
    group, _ = make("a", (2, 2, 2), (1.0, 0.0, None))
    (advantages,) = advantages_by_group(plan_of([group]), ALGORITHM)
    assert advantages[2] == 0
    assert advantages[0] == pytest.approx(1.0, abs=1e-5)  # mean 0.5, std 0.5 of the two judged


def test_tokens_older_than_the_bound_are_masked_and_their_reward_still_counts():
    spans = [(VersionSpan("1", 0, 2), VersionSpan("3", 2, 5)), (VersionSpan("1", 0, 5),)]
    group, completions = make("a", (5, 5), (1.0, 0.0), spans=spans)
    plan = plan_of([group])
    assert plan.num_target_tokens == 3
    assert sum(len(m) for rank in plan.ranks for m in rank) == 1  # nothing to train in the second
    batch = build_micro_batch(
        plan, plan.ranks[0][0], {(0, 0): completions[0]}, advantages_by_group(plan, ALGORITHM)
    )
    assert batch.loss_mask.sum() == 3
    assert batch.advantages.max() > 0.9


def test_an_empty_micro_batch_has_nothing_masked_in():
    group, _ = make("a", (5, 5), (1.0, 0.0))
    batch = build_micro_batch(plan_of([group]), (), {}, None)
    assert batch.num_tokens == 2 and not batch.loss_mask.any()
