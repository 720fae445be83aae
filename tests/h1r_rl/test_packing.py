import pytest
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


@pytest.mark.parametrize(
    ("lengths", "ranks", "budget"),
    [
        ([1_000] * 8, 2, 8_192),  # one bin would hold them all
        ([1_000] * 9, 2, 8_192),
        ([500] * 40, 4, 8_192),
        ([7_000, 100, 100, 100], 2, 8_192),
    ],
)
def test_no_rank_idles_while_another_works(lengths, ranks, budget):
    placed = pack_documents(lengths, ranks=ranks, budget=budget)
    work = [sum(document_cost(lengths[i]) for bin_ in rank for i in bin_) for rank in placed]
    costs = [document_cost(length) for length in lengths]
    assert max(work) <= max(max(costs), sum(costs) / ranks + min(costs))


@given(st.lists(st.integers(1, 300), min_size=1, max_size=60), st.integers(1, 4))
def test_work_is_near_its_mean_where_everything_fits(lengths, ranks):
    placed = pack_documents(lengths, ranks=ranks, budget=sum(lengths))
    costs = [document_cost(length) for length in lengths]
    work = [sum(costs[i] for bin_ in rank for i in bin_) for rank in placed]
    assert max(work) <= sum(costs) / ranks + max(costs)


def test_no_documents_give_every_rank_nothing():
    assert len(pack_documents([], ranks=3, budget=10)) == 3


def fewest_bins(lengths, budget) -> int:
    """By trying every placement; an over-long document has a bin of its own."""
    best = len(lengths)

    def place(index: int, bins: tuple[int, ...]) -> None:
        nonlocal best
        if len(bins) >= best:
            return
        if index == len(lengths):
            best = len(bins)
            return
        for i, filled in enumerate(bins):
            if filled + lengths[index] <= budget:
                place(index + 1, (*bins[:i], filled + lengths[index], *bins[i + 1 :]))
        place(index + 1, (*bins, lengths[index]))

    place(0, ())
    return best


@given(st.lists(st.integers(1, 120), min_size=1, max_size=9), st.integers(60, 130))
def test_as_few_micro_batches_as_first_fit_decreasing_promises(lengths, budget):
    """FFD(L) <= 11/9 OPT(L) + 6/9 (Dosa, 2007); a micro-batch is a forward pass."""
    bins = [members for members in pack_documents(lengths, ranks=1, budget=budget)[0] if members]
    assert len(bins) <= 11 / 9 * fewest_bins(lengths, budget) + 6 / 9
