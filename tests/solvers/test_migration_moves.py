"""What a migration takes: moves, rank labels with fewest moves, other rank counts.

Legend: L layers, P slots, E experts, R ranks.
"""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import MismatchError, UsageError
from placer.core.migration import held_LRE, moves
from solvers.migration.elastic import fewest_moves, rescale
from solvers.migration.relabel import relabel


def random_slots(rng: np.random.Generator, layers: int, experts: int, ranks: int, redundant: int = 0) -> np.ndarray:
    """Every expert once, then replicas on ranks that do not hold them, equal slots per rank."""
    width = (experts + redundant) // ranks
    rows = []
    while len(rows) < layers:
        held = [set() for _ in range(ranks)]
        for place, expert in enumerate(rng.permutation(experts)):
            held[place % ranks].add(int(expert))
        for rank in range(ranks):
            rest = [expert for expert in range(experts) if expert not in held[rank]]
            held[rank] |= {int(expert) for expert in rng.permutation(rest)[: width - len(held[rank])]}
        rows.append(np.concatenate([rng.permutation(sorted(inside)) for inside in held]))
    return np.stack(rows).astype(np.int64)


def test_moves_by_hand() -> None:
    current = np.array([[0, 1, 2, 3, 4, 5, 6, 7], [0, 1, 2, 3, 4, 5, 6, 7]])
    # order inside a rank is free; rank 0 gets 2 and rank 1 gets 0 in the first row, nothing moves in the second
    target = np.array([[2, 1, 3, 0, 4, 5, 6, 7], [1, 0, 3, 2, 5, 4, 7, 6]])
    needed = moves(current, target, 4)
    assert [a.tolist() for a in (needed.layer_M, needed.expert_M, needed.source_M, needed.destination_M)] == [
        [0, 0], [2, 0], [1, 0], [0, 1]]  # fmt: skip
    assert len(needed) == 2
    assert needed.moved_bytes(10) == 20
    assert needed.layers.tolist() == [0]


def test_a_copy_comes_from_its_own_node_and_senders_take_turns() -> None:
    # experts 0 and 1 are on rank 0 (node 0) and rank 2 (node 1); ranks 1 and 3 want both
    current = np.array([[0, 1, 2, 3, 0, 1, 4, 5]])
    target = np.array([[0, 1, 0, 1, 2, 3, 0, 1]])
    needed = moves(current, target, 4, ranks_per_node=2)
    assert dict(zip(needed.destination_M.tolist(), needed.source_M.tolist(), strict=True)) == {1: 0, 2: 1, 3: 2}
    flat = moves(current, target, 4)
    wanted = [source for source, expert in zip(flat.source_M, flat.expert_M, strict=True) if expert in (0, 1)]
    assert sorted(wanted) == [0, 0, 2, 2]


def test_moves_refuses_what_is_not_there() -> None:
    with pytest.raises(UsageError, match="no rank holds expert 3"):
        moves(np.array([[0, 1, 2, 2]]), np.array([[0, 1, 2, 3]]), 2)
    with pytest.raises(MismatchError, match="layers"):
        moves(np.zeros((1, 4), dtype=np.int64), np.zeros((2, 4), dtype=np.int64), 2)
    with pytest.raises(UsageError, match="do not divide"):
        moves(np.arange(4)[None], np.arange(4)[None], 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0, 4]))
def test_applying_the_moves_gives_the_target(seed: int, redundant: int) -> None:
    rng = np.random.default_rng(seed)
    current, target = (random_slots(rng, 3, 8, 4, redundant) for _ in range(2))
    needed = moves(current, target, 4, ranks_per_node=2)
    held, wanted = held_LRE(current, 4), held_LRE(target, 4)
    assert held[needed.layer_M, needed.source_M, needed.expert_M].all()
    assert not held[needed.layer_M, needed.destination_M, needed.expert_M].any()
    held[needed.layer_M, needed.destination_M, needed.expert_M] = True
    assert (held | ~wanted).all()
    assert len(needed) == int((wanted & ~held_LRE(current, 4)).sum())


def nested_orders(ranks: int, width: int) -> list[tuple[int, ...]]:
    """Every relabelling that keeps nodes together."""
    nodes = ranks // width
    result = []
    for order in itertools.permutations(range(nodes)):
        for inside in itertools.product(itertools.permutations(range(width)), repeat=nodes):
            parts = zip(order, inside, strict=True)
            result.append(tuple(node * width + local for node, perm in parts for local in perm))
    return result


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([4, 2, 1]), st.sampled_from([0, 4]), st.booleans())
def test_relabelling_is_the_best_of_all_labels(seed: int, width: int, redundant: int, common: bool) -> None:
    rng = np.random.default_rng(seed)
    current, target = (random_slots(rng, 2, 8, 4, redundant) for _ in range(2))
    found, needed = relabel(current, target, 4, ranks_per_node=width, common=common)
    blocks = target.reshape(2, 4, -1)
    counts = np.array(
        [[len(moves(current[[at]], blocks[at][list(order)].reshape(1, -1), 4)) for at in range(2)]
         for order in nested_orders(4, width)]
    )  # fmt: skip
    assert len(needed) == (counts.sum(axis=1).min() if common else counts.min(axis=0).sum())
    assert len(needed) == len(moves(current, found, 4))
    for layer in range(2):
        groups = [sorted(map(tuple, np.sort(rows[layer].reshape(4, -1)).tolist())) for rows in (found, target)]
        assert groups[0] == groups[1]
        nodes = [{frozenset(node) for node in rows[layer].reshape(4 // width, -1).tolist()} for rows in (found, target)]
        assert nodes[0] == nodes[1]


def test_only_labels_of_one_kind_are_exchanged() -> None:
    current = np.array([[0, 1, 2, 3, 4, 5, 6, 7]])
    target = np.array([[6, 7, 4, 5, 2, 3, 0, 1]])
    assert len(relabel(current, target, 4)[1]) == 0
    found, needed = relabel(current, target, 4, kind_R=np.array([0, 0, 0, 1]))
    # block (0, 1) must stay on rank 3, so ranks 0 and 3 both get something new
    assert found.tolist() == [[6, 7, 2, 3, 4, 5, 0, 1]]
    assert len(needed) == 4
    stays, none = relabel(current, current, 4, kind_R=np.arange(4))
    assert (stays == current).all()
    assert len(none) == 0


def test_scale_from_4_to_6_to_3() -> None:
    four = np.arange(12)[None]
    six = rescale(four, 4, range(6))
    # quota 2: each of the four old ranks gives one expert away
    assert len(six.moves) == 4
    assert six.bound_L.tolist() == [4]
    assert set(six.moves.destination_M.tolist()) == {4, 5}
    # back to ranks 0, 1, 2: the six experts of ranks 3, 4, 5 must go, quota 4
    three = rescale(six.slot_expert_LP, 6, [0, 1, 2])
    assert len(three.moves) == 6
    assert set(three.moves.source_M.tolist()) == {3, 4, 5}
    assert sorted(three.slot_expert_LP[0].tolist()) == list(range(12))
    assert three.slot_expert_LP.shape == (1, 12)


def test_nothing_moves_where_nothing_changes() -> None:
    slots = random_slots(np.random.default_rng(0), 3, 12, 4, 4)
    same = rescale(slots, 4, range(4))
    assert len(same.moves) == 0
    assert same.bound_L.tolist() == [0, 0, 0]
    assert (held_LRE(same.slot_expert_LP, 4) == held_LRE(slots, 4)).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.integers(1, 7), st.sampled_from([0, 4]))
def test_flow_and_closed_form_agree(seed: int, after: int, redundant: int) -> None:
    rng = np.random.default_rng(seed)
    slots = random_slots(rng, 2, 12, 4, redundant)
    ids = rng.permutation(7)[:after].tolist()
    scaled = rescale(slots, 4, ids)
    per_layer = np.bincount(scaled.moves.layer_M, minlength=2)
    if redundant == 0:
        assert (per_layer == scaled.bound_L).all()
    assert (per_layer >= scaled.bound_L).all()
    counts = (scaled.slot_expert_LP >= 0).reshape(2, after, -1).sum(axis=2)
    assert (counts.max(axis=1) - counts.min(axis=1) <= 1).all()
    before = held_LRE(slots, 4).sum(axis=1)
    assert (held_LRE(scaled.slot_expert_LP, after, 12).sum(axis=1) == np.minimum(before, after)).all()


def test_the_closed_form_by_hand() -> None:
    # one rank of 5 and one of 1 stay, a third is new: 6 experts here, 3 on removed ranks; quota 3
    stay = np.zeros((3, 9), dtype=bool)
    stay[0, :5], stay[1, 5] = True, True
    assert fewest_moves(stay, np.ones(9, dtype=np.int64)) == 3 + 2


def test_rescale_refuses_bad_rank_ids() -> None:
    for ids in ([], [0, 0], [-1]):
        with pytest.raises(UsageError, match="ranks is"):
            rescale(np.arange(4)[None], 2, ids)
