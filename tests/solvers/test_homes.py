"""Homes of requests, labels aligned for them and predicted touches: brute force, flow optimality, laws."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import UsageError
from solvers.affinity.align_homes import align_for_homes, best_labels
from solvers.affinity.homes import assign_homes, touches_at_home
from solvers.affinity.matching import heaviest_matching
from solvers.affinity.predict import touch_from_prefix, touch_from_tag
from solvers.ranks import relabel_ranks


def best_homes(touch_QR: np.ndarray, tokens_Q: np.ndarray, cap: float) -> float:
    requests, ranks = touch_QR.shape
    worth = -1.0
    for homes in itertools.product(range(ranks), repeat=requests):
        if np.bincount(homes, weights=tokens_Q, minlength=ranks).max() <= cap + 1e-9:
            worth = max(worth, touches_at_home(touch_QR, np.array(homes)))
    return worth


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 3), st.sampled_from([0.0, 0.3, 1.0]), st.integers(1, 7))
def test_equal_requests_get_the_best_homes(seed: int, requests: int, ranks: int, slack: float, length: int) -> None:
    rng = np.random.default_rng(seed)
    touch_QR = rng.integers(0, 20, size=(requests, ranks))
    tokens_Q = np.full(requests, length)
    home_Q = assign_homes(touch_QR, tokens_Q, ranks, slack)
    cap = max((1 + slack) * tokens_Q.sum() / ranks, -(-requests // ranks) * length)
    assert np.bincount(home_Q, weights=tokens_Q, minlength=ranks).max() <= cap + 1e-9
    assert touches_at_home(touch_QR, home_Q) == best_homes(touch_QR, tokens_Q, cap)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 6), st.integers(2, 3), st.sampled_from([0.0, 0.2, 0.5]))
def test_unequal_requests_keep_the_balance_and_no_move_or_swap_helps(
    seed: int, requests: int, ranks: int, slack: float
) -> None:
    rng = np.random.default_rng(seed)
    tokens_Q = rng.integers(0, 9, size=requests)
    touch_QR = rng.integers(0, 1 + tokens_Q[:, None], size=(requests, ranks))
    home_Q = assign_homes(touch_QR, tokens_Q, ranks, slack)
    load_R = np.bincount(home_Q, weights=tokens_Q, minlength=ranks)
    packed = np.zeros(ranks)
    for length in sorted(tokens_Q.tolist(), reverse=True):
        packed[packed.argmin()] += length
    cap = max((1 + slack) * tokens_Q.sum() / ranks, packed.max())
    assert load_R.max() <= cap + 1e-9
    worth = touches_at_home(touch_QR, home_Q)
    assert worth <= best_homes(touch_QR, tokens_Q, cap)
    assert np.array_equal(home_Q, assign_homes(touch_QR, tokens_Q, ranks, slack))
    neighbours = []
    for one in range(requests):
        neighbours += [np.where(np.arange(requests) == one, rank, home_Q) for rank in range(ranks)]
        for two in range(one):
            other_Q = home_Q.copy()
            other_Q[[one, two]] = home_Q[[two, one]]
            neighbours.append(other_Q)
    for other_Q in neighbours:
        if np.bincount(other_Q, weights=tokens_Q, minlength=ranks).max() <= cap:
            assert touches_at_home(touch_QR, other_Q) <= worth


def test_the_flow_finds_what_single_moves_and_swaps_cannot() -> None:
    # homes turn in a circle of three: no two requests would exchange, all three together gain
    touch_QR = np.array([[5, 6, 0], [0, 5, 6], [6, 0, 5]])
    assert assign_homes(touch_QR, np.array([4, 4, 4]), 3, 0.0).tolist() == [1, 2, 0]


def test_room_beyond_the_mean_is_used_only_as_far_as_the_slack() -> None:
    touch_QR = np.array([[3, 0]] * 4)
    homes = [np.bincount(assign_homes(touch_QR, np.full(4, 10), 2, slack)).tolist() for slack in (0.0, 0.5, 1.0)]
    assert homes == [[2, 2], [3, 1], [4]]


def planted(seed: int, layers: int, requests: int, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Each request touches one hidden group, which every layer calls by another label."""
    rng = np.random.default_rng(seed)
    label_LR = np.stack([rng.permutation(ranks) for _ in range(layers)])
    touch_LQR = np.zeros((layers, requests, ranks), dtype=np.int32)
    for layer, request in itertools.product(range(layers), range(requests)):
        touch_LQR[layer, request, label_LR[layer, request % ranks]] = 10
    return touch_LQR, np.full(requests, 10)


@pytest.mark.parametrize("seed", range(4))
def test_hidden_groups_are_all_brought_home(seed: int) -> None:
    touch_LQR, tokens_Q = planted(seed, 6, 12, 4)
    before = touches_at_home(touch_LQR.sum(axis=0), assign_homes(touch_LQR.sum(axis=0), tokens_Q, 4, 0.0))
    found = align_for_homes(touch_LQR, tokens_Q, ranks_per_node=4, slack=0.0)
    assert found.touches == touch_LQR.sum() > before
    assert np.bincount(found.rank_Q).tolist() == [3] * 4


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(4, 4), (4, 2), (6, 2), (3, 1)]))
def test_labels_are_permutations_that_keep_nodes_whole(seed: int, shape: tuple[int, int]) -> None:
    ranks, per_node = shape
    rng = np.random.default_rng(seed)
    tokens_Q = rng.integers(1, 20, size=9)
    touch_LQR = rng.integers(0, 1 + tokens_Q[None, :, None], size=(3, 9, ranks)).astype(np.int32)
    found = align_for_homes(touch_LQR, tokens_Q, ranks_per_node=per_node, slack=0.2, seed=1)
    assert np.array_equal(np.sort(found.order_LR, axis=1), np.tile(np.arange(ranks), (3, 1)))
    node_of_old = found.order_LR.reshape(3, -1, per_node) // per_node
    assert (node_of_old == node_of_old[:, :, :1]).all()
    relabelled_LQR = np.take_along_axis(touch_LQR, found.order_LR[:, None, :], axis=2)
    assert found.touches == touches_at_home(relabelled_LQR.sum(axis=0), found.rank_Q)
    as_it_was = touch_LQR.sum(axis=0)
    assert found.touches >= touches_at_home(as_it_was, assign_homes(as_it_was, tokens_Q, ranks, 0.2))
    again = align_for_homes(touch_LQR, tokens_Q, ranks_per_node=per_node, slack=0.2, seed=1)
    assert np.array_equal(again.order_LR, found.order_LR)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(4, 4), (4, 2), (3, 1)]))
def test_best_labels_are_brute_force_s(seed: int, shape: tuple[int, int]) -> None:
    ranks, per_node = shape
    gain_RR = np.random.default_rng(seed).integers(-50, 50, size=(ranks, ranks)).astype(float)
    order_R = best_labels(gain_RR, per_node)
    worth = [
        gain_RR[np.arange(ranks), list(order)].sum()
        for order in itertools.permutations(range(ranks))
        if all(len({rank // per_node for rank in order[n : n + per_node]}) == 1 for n in range(0, ranks, per_node))
    ]
    assert gain_RR[np.arange(ranks), order_R].sum() == max(worth)
    if per_node == ranks:
        assert np.array_equal(order_R, heaviest_matching(gain_RR))


def test_slots_and_shares_follow_the_labels() -> None:
    order_LR = np.array([[1, 0], [0, 1]])
    assert relabel_ranks(np.array([[0, 1, 2, 3], [0, 1, 2, 3]]), order_LR).tolist() == [[2, 3, 0, 1], [0, 1, 2, 3]]
    assert relabel_ranks(np.array([[0.5, 1, 0.25, 1]]), order_LR[:1]).tolist() == [[0.25, 1, 0.5, 1]]


def test_predictions_by_hand() -> None:
    seen_QR, seen_Q = np.array([[4, 2], [0, 0]]), np.array([4, 0])
    assert touch_from_prefix(seen_QR, seen_Q, np.array([10, 7])).tolist() == [[10.0, 5.0], [0.0, 0.0]]
    known_QR, tokens_Q, tag_Q = np.array([[8, 2], [2, 8], [9, 0]]), np.array([10, 10, 5]), np.array([0, 2, 0])
    predicted = touch_from_tag(known_QR, tokens_Q, tag_Q, np.array([2, 0, 1]), np.array([5, 30, 25]))
    assert predicted.tolist() == [[1.0, 4.0], [34.0, 4.0], [19.0, 10.0]]


def test_what_makes_no_sense_is_refused() -> None:
    two = np.ones((2, 2))
    for touch_QR, tokens, ranks, slack, says in (
        (two, [1, 1], 3, 0.0, "need that shape"),
        (-two, [1, 1], 2, 0.0, "below 0"),
        (two, [1, -1], 2, 0.0, "below 0"),
        (two, [1, 1], 2, -0.1, "slack is"),
    ):
        with pytest.raises(UsageError, match=says):
            assign_homes(touch_QR, np.array(tokens), ranks, slack)
    with pytest.raises(UsageError, match="no multiple"):
        align_for_homes(np.ones((1, 2, 3), dtype=np.int32), np.ones(2, dtype=int), ranks_per_node=2, slack=0.0)
    with pytest.raises(UsageError, match="below 0"):
        touch_from_tag(two, np.ones(2), np.array([-1, 0]), np.array([0]), np.array([1]))
    assert assign_homes(np.zeros((3, 2)), np.zeros(3, dtype=int), 2, 0.0).tolist() == [0, 1, 0]
