from hypothesis import given
from hypothesis import strategies as st

from h1r_rl.packing import document_cost, pack_documents


@given(st.lists(st.integers(1, 300), max_size=60), st.integers(1, 4), st.integers(50, 200))
def test_every_document_once_within_budget_equal_counts(lengths, ranks, budget):
    placed = pack_documents(lengths, ranks=ranks, budget=budget)
    assert sorted(i for rank in placed for bin_ in rank for i in bin_) == list(range(len(lengths)))
    assert len({len(rank) for rank in placed}) == 1
    for rank in placed:
        for members in rank:
            assert sum(lengths[i] for i in members) <= budget or len(members) == 1


def test_balanced_by_cost_where_attention_counts():
    lengths = [100_000] + [10_000] * 20  # two lots of 100k and 200k tokens, of equal cost? almost
    placed = pack_documents(lengths, ranks=2, budget=100_000)
    work = [sum(document_cost(lengths[i]) for bin_ in rank for i in bin_) for rank in placed]
    assert max(work) / min(work) < 1.2
    assert sum(len(bin_) for bin_ in placed[0]) == 1  # the long one has a rank of its own


def test_no_documents_give_every_rank_nothing():
    assert len(pack_documents([], ranks=3, budget=10)) == 3
