"""The hull of groups against pairs together, and proximal steps on it, against brute force."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers.bounds.hull import hulls, pair_weights_of_slopes, slopes_towards, together, value

FEW = settings(max_examples=20, deadline=None)
SHAPES = [(4, 4, 8), (6, 2, 3), (8, 4, 8), (8, 8, 3), (5, 3, 2), (3, 1, 4)]


def partition_points(size: int, largest: int, groups: int) -> set[tuple[int, int]]:
    """(pairs together, groups touched) of every way to send `size` members to groups."""
    found = set()
    for group_S in itertools.product(range(groups), repeat=size):
        counts = np.bincount(group_S, minlength=groups) if size else np.zeros(groups, int)
        if counts.max(initial=0) <= largest:
            found.add((int((counts * (counts - 1) // 2).sum()), int((counts > 0).sum())))
    return found


@pytest.mark.parametrize(
    ("size", "largest", "groups"), [(0, 2, 2), (4, 4, 4), (5, 3, 2), (6, 2, 3), (6, 6, 2), (3, 1, 4)]
)
def test_hull_is_the_lower_hull_of_all_partitions(size: int, largest: int, groups: int) -> None:
    hull = hulls(size, largest, groups)
    count = hull.count_K[size]
    vertices = list(zip(hull.pairs_KV[size, :count], hull.groups_KV[size, :count], strict=True))
    points = partition_points(size, largest, groups)
    assert set(vertices) <= points
    for slope in np.linspace(0, 2, 41):
        assert min(g + slope * p for p, g in vertices) == pytest.approx(min(g + slope * p for p, g in points))


@pytest.mark.parametrize(("most", "largest", "groups"), SHAPES)
def test_hull_falls_and_is_convex(most: int, largest: int, groups: int) -> None:
    hull = hulls(most, largest, groups)
    for size in range(most + 1):
        count = hull.count_K[size]
        steps = np.diff(hull.groups_KV[size, :count]) / np.diff(hull.pairs_KV[size, :count])
        assert (steps < 0).all()
        assert (np.diff(steps) > 0).all()


@FEW
@given(st.integers(0, 10**6), st.sampled_from(SHAPES))
def test_step_of_a_slope_is_the_proximal_step(seed: int, shape: tuple[int, int, int]) -> None:
    rng = np.random.default_rng(seed)
    most, largest, groups = shape
    hull = hulls(most, largest, groups)
    size_H = rng.integers(0, most + 1, 6)
    pairs_H, slope_H, step = rng.uniform(0, 6, 6), rng.uniform(0, 1.2, 6), float(rng.uniform(0.02, 1))
    moved_H = slopes_towards(slope_H, pairs_H, step, size_H, hull.pairs_KV, hull.groups_KV, hull.count_K)
    grid = np.linspace(0, 8, 16001)
    for h, size in enumerate(size_H):
        count = hull.count_K[size]
        reach = grid[:, None] * hull.pairs_KV[size, :count] + hull.groups_KV[size, :count]
        worth = reach.min(axis=1) - grid * pairs_H[h] - (grid - slope_H[h]) ** 2 / (2 * step)
        assert moved_H[h] == pytest.approx(grid[np.argmax(worth)], abs=6e-4)


def test_pairs_together_and_their_weights_by_hand() -> None:
    expert_HK = np.array([[0, 1, 2], [1, 3, -1]], dtype=np.int16)
    same_EE = np.zeros((4, 4))
    same_EE[0, 1] = same_EE[1, 0] = 0.5
    same_EE[1, 3] = same_EE[3, 1] = 0.25
    assert together(expert_HK, same_EE).tolist() == [0.5, 0.25]
    pair_EE = pair_weights_of_slopes(expert_HK, np.array([2.0, 3.0]), np.array([0.5, 1.0]), 4)
    expected_EE = np.zeros((4, 4))
    expected_EE[0, 1] = expected_EE[0, 2] = expected_EE[1, 2] = 1.0
    expected_EE[1, 3] = 3.0
    assert (pair_EE == expected_EE + expected_EE.T).all()


@FEW
@given(st.floats(0, 12))
def test_value_is_the_best_that_slopes_can_prove(pairs: float) -> None:
    hull = hulls(8, 4, 8)
    tables = (hull.pairs_KV, hull.groups_KV, hull.count_K)
    found = value(np.array([pairs]), np.array([2.0]), np.array([8]), *tables) / 2
    count = hull.count_K[8]
    slopes = np.linspace(0, 2, 2001)[:, None]
    proven = (hull.groups_KV[8, :count] + slopes * hull.pairs_KV[8, :count]).min(axis=1) - slopes[:, 0] * pairs
    assert found == pytest.approx(proven.max(), abs=0.02)
