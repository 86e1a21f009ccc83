"""Least of groups touched + slopes of pairs together: the verifier's two and the finder's three ways, against all."""

import numpy as np
import pytest
from bound_problems import set_partitions
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.certificates.touched_sets import member_intercepts, pair_intercepts, pair_slopes, together_weights
from solvers.bounds.columns import MOST_ACTIVE, cheapest_partitions
from solvers.bounds.partitions import member_values, pair_values, partitions_of, sizes_of

FEW = settings(max_examples=15, deadline=None)
LIMITS = st.sampled_from([(3, 2, 2), (4, 4, 4), (4, 2, 3), (5, 5, 2), (5, 3, 8), (6, 2, 3)])


def least_of_all(row_K: np.ndarray, slope_Q: np.ndarray, largest: int, groups: int) -> float:
    members = np.flatnonzero(row_K >= 0)
    columns = [(i, j) for i in range(len(row_K)) for j in range(i + 1, len(row_K))]
    best = np.inf
    for label in set_partitions(len(members)):
        if len(set(label)) <= groups and max(np.bincount(label), default=0) <= largest:
            part = dict(zip(members.tolist(), label, strict=True))
            cost = sum(slope_Q[q] for q, (i, j) in enumerate(columns) if i in part and j in part and part[i] == part[j])
            best = min(best, len(set(label)) + cost)
    return best


def ragged_sets(rng: np.random.Generator, top_k: int) -> np.ndarray:
    rows = np.stack([np.sort(rng.choice(9, top_k, replace=False)) for _ in range(7)]).astype(np.int16)
    rows[rng.random(rows.shape) < 0.2] = -1
    rows[0, 0] = 0
    return rows


@FEW
@given(st.integers(0, 10**6), LIMITS)
def test_slopes_per_pair(seed: int, limits: tuple[int, int, int]) -> None:
    top_k, largest, groups = limits
    rng = np.random.default_rng(seed)
    rows, slope_HQ = ragged_sets(rng, top_k), rng.normal(0.2, 0.5, (7, top_k * (top_k - 1) // 2))
    expected = [least_of_all(row, slope, largest, groups) for row, slope in zip(rows, slope_HQ, strict=True)]
    assert pair_intercepts(rows, slope_HQ, largest, groups) == pytest.approx(expected)
    weight_H = rng.uniform(0, 1, 7)
    found = partitions_of(rows, largest, groups)
    tables = (found.together_MVQ, found.groups_MV, found.count_M, found.pattern_H)
    assert pair_values(weight_H, slope_HQ, *tables) == pytest.approx(weight_H @ expected)
    active = (np.zeros((7, MOST_ACTIVE), np.int64), np.zeros((7, MOST_ACTIVE)), np.zeros((7, MOST_ACTIVE)))
    counts = (np.zeros(7, np.int64), np.ones(7))
    total = cheapest_partitions(rows, weight_H, slope_HQ, *active, *counts, largest, groups, True)
    assert total == pytest.approx(weight_H @ expected)
    # what has become active costs what was found
    together_HQ = (active[0][:, :1] >> np.arange(slope_HQ.shape[1])) & 1
    assert active[1][:, 0] + (together_HQ * slope_HQ).sum(axis=1) == pytest.approx(expected)


@FEW
@given(st.integers(0, 10**6), LIMITS)
def test_slopes_per_member(seed: int, limits: tuple[int, int, int]) -> None:
    top_k, largest, groups = limits
    rng = np.random.default_rng(seed)
    rows, slope_HK = ragged_sets(rng, top_k), rng.normal(0.1, 0.4, (7, top_k))
    slope_HQ = pair_slopes(rows, slope_HK)
    expected = [least_of_all(row, slope, largest, groups) for row, slope in zip(rows, slope_HQ, strict=True)]
    assert member_intercepts(rows, slope_HK, largest, groups) == pytest.approx(expected)
    weight_H = rng.uniform(0, 1, 7)
    total = member_values(rows, weight_H, slope_HK, *sizes_of(top_k, largest, groups))
    assert total == pytest.approx(weight_H @ expected)


def test_weights_on_pairs_by_hand() -> None:
    rows = np.array([[0, 2, 3], [-1, 2, 3]], dtype=np.int16)
    slope_HQ = np.array([[0.5, 0.25, 1.0], [0.0, 0.0, 2.0]])
    weight_EE = together_weights(rows, np.array([2.0, 3.0]), slope_HQ, 4)
    expected_EE = np.zeros((4, 4))
    expected_EE[0, 2], expected_EE[0, 3], expected_EE[2, 3] = 1.0, 0.5, 8.0
    assert (weight_EE == expected_EE + expected_EE.T).all()
