"""Plans and micro-batches from groups that end in every way."""

import numpy as np
import pytest

from h1r_rl.config.schema import AlgorithmConfig
from h1r_rl.grpo.build_batch import (
    advantages_by_group,
    build_micro_batch,
    plan_sft_batch,
    plan_train_batch,
)
from h1r_rl.records import Completion, Group, Prompt, Sample, Verdict, VersionSpan


def make_group(name, rows, prompt_tokens=2):
    """rows: (length, finish reason, score, ((version, start, end), ...))."""
    samples = tuple(
        Sample(i, length, finish, tuple(VersionSpan(*s) for s in spans), Verdict(score), None, i)
        for i, (length, finish, score, spans) in enumerate(rows)
    )
    prompt = Prompt(name, 0, np.arange(1, prompt_tokens + 1, dtype=np.int32), "", "math", "")
    return Group(prompt, samples, 3)


def completions_of(plan):
    return {
        (g, s.sample_index): Completion(
            s.sample_index,
            100 * g + np.arange(s.length, dtype=np.int32),
            -0.5 - np.arange(s.length, dtype=np.float32),
            s.version_spans,
            s.finish_reason,
            "",
            "rollout-0",
        )
        for g, group in enumerate(plan.groups)
        for s in group.samples
    }


DEFAULT = AlgorithmConfig()
GROUPS = [
    make_group("b", [(4, "stop", 1.0, (("3", 0, 4),)),
                     (6, "length", 0.0, (("1", 0, 2), ("3", 2, 6)))]),
    make_group("a", [(5, "stop", 1.0, (("3", 0, 5),)), (3, "pruned", 0.0, (("3", 0, 3),)),
                     (9, "stop", None, (("3", 0, 9),))]),
]  # fmt: skip


def plan(groups=GROUPS, ranks=1, budget=100, **algorithm):
    return plan_train_batch(
        groups, AlgorithmConfig(**algorithm), ranks=ranks, micro_batch_tokens=budget,
        learner_version=3, max_staleness=1,
    )  # fmt: skip


def batches(plan, algorithm=DEFAULT):
    advantages = advantages_by_group(plan, algorithm)
    return [
        build_micro_batch(plan, documents, completions_of(plan), advantages)
        for rank in plan.ranks
        for documents in rank
    ]


def test_table_of_endings():
    found = plan()
    [batch] = batches(found)
    # canonical order: a/0 (stop), a/1 (pruned: forced token out), b/0, b/1 (length, 2 stale tokens)
    assert batch.prompts == ("a/0/0", "a/0/1", "b/0/0", "b/0/1")
    starts = batch.document_starts
    masks = [batch.loss_mask[s:e].tolist() for s, e in zip(starts[:-1], starts[1:], strict=True)]
    no, yes = False, True
    assert masks == [
        [no] * 2 + [yes] * 5,
        [no] * 2 + [yes, yes, no],
        [no] * 2 + [yes] * 4,
        [no] * 2 + [no, no] + [yes] * 4,
    ]
    assert (found.num_target_tokens, found.num_sequences, found.num_positive_tokens) == (15, 4, 9)


def test_overlong_filtering_takes_a_sample_out_of_loss_and_baseline():
    filtered = plan(overlong_filtering=True)
    assert (filtered.num_target_tokens, filtered.num_sequences) == (11, 3)
    algorithm = AlgorithmConfig(advantage="dr_grpo", overlong_filtering=True)
    assert advantages_by_group(filtered, algorithm)[1].tolist() == [0, 0]  # one is left
    whole = AlgorithmConfig(advantage="dr_grpo")
    assert advantages_by_group(plan(), whole)[1].tolist() == [0.5, -0.5]


def test_arrays_stand_at_the_predicted_token():
    [batch] = batches(plan(), AlgorithmConfig(advantage="dr_grpo"))
    start = batch.document_starts[2]
    assert batch.input_ids[start : start + 6].tolist() == [1, 2, 100, 101, 102, 103]
    assert batch.behaviour_logprobs[start : start + 6].tolist() == [0, 0, -0.5, -1.5, -2.5, -3.5]
    assert batch.advantages[start : start + 6].tolist() == [0, 0, 0.5, 0.5, 0.5, 0.5]
    assert batch.versions[start : start + 6].tolist() == [-1, -1, 3, 3, 3, 3]
    assert batch.positive[start : start + 6].tolist() == [False] * 2 + [True] * 4


@pytest.mark.parametrize(("ranks", "budget"), [(1, 8), (2, 8), (3, 100), (5, 100)])
def test_counts_and_content_do_not_depend_on_the_split(ranks, budget):
    whole, split = plan(), plan(ranks=ranks, budget=budget)
    assert len({len(rank) for rank in split.ranks}) == 1
    assert split.num_target_tokens == whole.num_target_tokens
    assert sum(int(b.loss_mask.sum()) for b in batches(split)) == whole.num_target_tokens
    assert sum(int(b.positive.sum()) for b in batches(split)) == whole.num_positive_tokens


def test_order_of_arrival_does_not_matter():
    assert plan(GROUPS) == plan(GROUPS[::-1])


def test_everything_stale_or_unjudged_gives_empty_batches():
    old = make_group("c", [(4, "stop", 1.0, (("1", 0, 4),)), (4, "stop", None, (("3", 0, 4),))])
    found = plan([old], ranks=2)
    assert (found.num_target_tokens, found.num_sequences, found.num_positive_tokens) == (0, 0, 0)
    assert all(not batch.loss_mask.any() for batch in batches(found))


def test_sft_targets_every_response_token():
    found = plan_sft_batch(
        [make_group("x", [(7, "stop", 1.0, (("0", 0, 7),))])],
        ranks=2, micro_batch_tokens=50, learner_version=4,
    )  # fmt: skip
    assert found.num_target_tokens == 7
    assert [len(rank) for rank in found.ranks] == [1, 1]


def test_ids_are_those_sampled_where_the_text_has_others():
    """A model may spell a word byte by byte that its tokenizer would write as one token."""
    from h1r_rl.hybrid.tiny import build_tokenizer

    tokenizer = build_tokenizer(64)
    spelled = [tokenizer.convert_tokens_to_ids(byte) for byte in "<think>"]
    text = tokenizer.decode(spelled)
    assert tokenizer.encode(text, add_special_tokens=False) != spelled
    group = make_group("s", [(7, "stop", 1.0, (("3", 0, 7),)), (7, "stop", 0.0, (("3", 0, 7),))])
    found = plan([group])
    sampled = {
        (0, i): Completion(
            i, np.array(spelled, np.int32), np.full(7, -0.1, np.float32),
            group.samples[i].version_spans, "stop", text, "rollout-0",
        )
        for i in range(2)
    }  # fmt: skip
    advantages = advantages_by_group(found, DEFAULT)
    batch = build_micro_batch(found, found.ranks[0][0], sampled, advantages)
    assert batch.input_ids[2:9].tolist() == spelled
