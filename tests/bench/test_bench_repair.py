"""Repair and polish: legal counts whatever they start from, loads no worse, every swap an exact gain."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repair import layer_limits, members, polish_cut, polish_touched, repair_counts, repair_load

RANKS, CAPACITY, TOP_K = 3, 3, 3
EXPERTS = RANKS * CAPACITY


class Layer:
    """A random layer: blocks of any sizes, values, pairs, sets and loads."""

    def __init__(self, seed: int) -> None:
        rng = np.random.default_rng(seed)
        self.blocks_E = rng.integers(0, RANKS, EXPERTS)
        self.even_E = rng.permutation(np.repeat(np.arange(RANKS), CAPACITY))
        self.value_ER = rng.random((EXPERTS, RANKS)) * 10
        pair_EE = rng.random((EXPERTS, EXPERTS))
        self.pair_EE = np.triu(pair_EE, 1) + np.triu(pair_EE, 1).T
        self.load_E = rng.integers(1, 40, EXPERTS).astype(np.float64)
        sets = {tuple(sorted(rng.choice(EXPERTS, rng.integers(1, TOP_K + 1), replace=False))) for _ in range(12)}
        self.expert_HK = np.full((len(sets), TOP_K), -1, dtype=np.int16)
        for row, members_of_set in enumerate(sorted(sets)):
            self.expert_HK[row, : len(members_of_set)] = members_of_set
        self.weight_H = rng.integers(1, 9, len(sets))

    def load_R(self, rank_E: np.ndarray) -> np.ndarray:
        return np.bincount(rank_E, weights=self.load_E, minlength=RANKS)

    def touched(self, rank_E: np.ndarray) -> int:
        rows = zip(self.expert_HK, self.weight_H, strict=True)
        return sum(int(weight) * len({rank_E[e] for e in row if e >= 0}) for row, weight in rows)

    def kept(self, rank_E: np.ndarray) -> float:
        return float(self.value_ER[np.arange(EXPERTS), rank_E].sum())

    def swaps_within(self, rank_E: np.ndarray, limit: float) -> "list[np.ndarray]":
        """Every exchange of two experts whose busier side ends within the limit."""
        found = []
        for a, b in itertools.combinations(range(EXPERTS), 2):
            after_E = rank_E.copy()
            after_E[a], after_E[b] = rank_E[b], rank_E[a]
            before_R, after_R = self.load_R(rank_E), self.load_R(after_E)
            if rank_E[a] != rank_E[b] and (after_R[after_R > before_R] <= limit).all():
                found.append(after_E)
        return found


def even(rank_E: np.ndarray) -> bool:
    return np.bincount(rank_E, minlength=RANKS).tolist() == [CAPACITY] * RANKS


@given(st.integers(0, 10_000))
@settings(max_examples=60, deadline=None)
def test_repair_of_counts_gives_every_rank_its_experts(seed: int) -> None:
    layer = Layer(seed)
    before_E = layer.blocks_E.copy()
    after_E = repair_counts(layer.blocks_E, layer.value_ER, layer.pair_EE)
    assert even(after_E)
    np.testing.assert_array_equal(layer.blocks_E, before_E)
    # nobody leaves a rank that was not overfull
    size_R = np.bincount(before_E, minlength=RANKS)
    assert (size_R[before_E[after_E != before_E]] > CAPACITY).all()


def test_the_cheapest_expert_leaves() -> None:
    value_ER = np.array([[9.0, 0.0], [9.0, 8.0], [9.0, 0.0], [0.0, 9.0]])
    assert repair_counts(np.array([0, 0, 0, 1]), value_ER, np.zeros((4, 4))).tolist() == [0, 1, 0, 1]
    # the pairs count as well: expert 1 now belongs to expert 0
    pair_EE = np.zeros((4, 4))
    pair_EE[0, 1] = pair_EE[1, 0] = 20
    assert repair_counts(np.array([0, 0, 0, 1]), value_ER, pair_EE).tolist() == [0, 0, 1, 1]


@given(st.integers(0, 10_000), st.floats(1.0, 1.5))
@settings(max_examples=60, deadline=None)
def test_repair_of_load_lowers_the_peak_to_the_limit_or_a_local_least(seed: int, cap: float) -> None:
    layer = Layer(seed)
    limit = cap * layer.load_E.sum() / RANKS
    after_E = repair_load(layer.even_E, layer.value_ER, layer.pair_EE, layer.load_E, limit)
    assert even(after_E)
    before_R, after_R = layer.load_R(layer.even_E), layer.load_R(after_E)
    assert after_R.max() <= before_R.max()
    if after_R.max() > limit:
        busiest = int(after_R.argmax())
        for mine, other in itertools.product(np.flatnonzero(after_E == busiest), np.flatnonzero(after_E != busiest)):
            shift = layer.load_E[mine] - layer.load_E[other]
            assert max(after_R[busiest] - shift, after_R[after_E[other]] + shift) >= after_R[busiest] * (1 - 1e-9)


@given(st.integers(0, 10_000), st.floats(1.0, 2.0))
@settings(max_examples=60, deadline=None)
def test_polish_ends_where_no_allowed_swap_helps(seed: int, cap: float) -> None:
    """By brute force over every swap, for both objectives: so each gain was computed exactly."""
    layer = Layer(seed)
    limit = cap * layer.load_E.sum() / RANKS
    cut_E = polish_cut(layer.even_E, layer.value_ER, layer.load_E, limit)
    first_E, set_I = members(layer.expert_HK, EXPERTS)
    touched_E = polish_touched(
        layer.even_E, layer.expert_HK, layer.weight_H, first_E, set_I, RANKS, layer.load_E, limit, 100
    )
    most = max(limit, layer.load_R(layer.even_E).max())
    for after_E in (cut_E, touched_E):
        assert even(after_E)
        assert layer.load_R(after_E).max() <= most + 1e-9
    assert layer.kept(cut_E) >= layer.kept(layer.even_E) - 1e-9
    assert all(layer.kept(other_E) <= layer.kept(cut_E) + 1e-6 for other_E in layer.swaps_within(cut_E, limit))
    assert layer.touched(touched_E) <= layer.touched(layer.even_E)
    others = layer.swaps_within(touched_E, limit)
    assert all(layer.touched(other_E) >= layer.touched(touched_E) for other_E in others)


def test_members_are_the_sets_of_each_expert() -> None:
    expert_HK = np.array([[0, 2], [1, -1], [0, 1]], dtype=np.int16)
    first_E, set_I = members(expert_HK, 4)
    sets = [sorted(set_I[first_E[e] : first_E[e + 1]].tolist()) for e in range(4)]
    assert sets == [[0, 2], [1, 2], [0], []]


def test_limits_of_layers_meet_the_cap_on_their_mean() -> None:
    # one heavy expert: this layer's PAR cannot be below 1.6, so the other gets what is left of the mean
    load_LE = np.array([[80, 10, 5, 5], [25, 25, 25, 25]])
    limit_L = layer_limits(load_LE, 2, 1.4)
    par_L = limit_L / (load_LE.sum(axis=1) / 2)
    assert par_L[0] == pytest.approx(1.7)
    assert par_L.mean() == pytest.approx(1.4)
    assert np.isinf(layer_limits(load_LE, 2, None)).all()
