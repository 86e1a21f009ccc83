"""choose_slots against a reading of its docstring token by token, for all six replica choices.

Legend: T tokens, K top-k, E experts, P slots, R ranks.
"""

from collections import defaultdict

import numpy as np
import pytest
from core_cases import UNSET, Case, cases
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.modes import REPLICA_CHOICES
from placer.core.replicas import LayerSlots, choose_slots, layer_slots

MASK = 2**64 - 1


def unit_hash(token: int, expert: int) -> float:
    """The finaliser of MurmurHash3 on integers that do not overflow."""
    x = (token * 0x9E3779B97F4A7C15 + expert) & MASK
    x = ((x ^ (x >> 33)) * 0xFF51AFD7ED558CCD) & MASK
    x = ((x ^ (x >> 33)) * 0xC4CEB9FE1A85EC53) & MASK
    return ((x ^ (x >> 33)) >> 11) / 2**53


def draw(weight: dict[int, float], level: float) -> int:
    """The key at which the running sum of weights passes `level` of the whole."""
    cumulative = np.cumsum(list(weight.values())).tolist()
    return next(key for key, top in zip(weight, cumulative, strict=True) if level * cumulative[-1] < top)


def visit_first(slots: LayerSlots, replicas: dict, expert_K: list[int], source: int, token: int) -> list[int]:
    def of(expert: int, ranks: set[int]) -> int:
        pool = {p: max(float(slots.share_P[p]), 1e-9) for p in replicas[expert] if int(slots.rank_P[p]) in ranks}
        return draw(pool, unit_hash(token, expert))

    held = {e: {int(slots.rank_P[p]) for p in replicas[e]} for e in expert_K if e in replicas}
    chosen = {e: replicas[e][0] for e in held if len(replicas[e]) == 1}
    visited = {int(slots.rank_P[p]) for p in chosen.values()}
    chosen |= {e: of(e, visited) for e in held if e not in chosen and held[e] & visited}
    while rest := [e for e in held if e not in chosen]:
        share: dict[int, float] = {}
        for e in sorted(rest, key=expert_K.index):
            on_rank: dict[int, float] = defaultdict(float)
            for p in replicas[e]:
                on_rank[int(slots.rank_P[p])] += max(float(slots.share_P[p]), 1e-9)
            for r, part in on_rank.items():
                share[r] = share.get(r, 0.0) + part
        most = max(sum(r in held[e] for e in rest) for r in share)
        best = [r for r in sorted(share) if sum(r in held[e] for e in rest) == most]
        rank = source if source in best else draw({r: share[r] for r in best}, unit_hash(token, min(rest)))
        chosen |= {e: of(e, {rank}) for e in rest if rank in held[e]}
    return [chosen.get(e, -1) for e in expert_K]


def reference(slots: LayerSlots, row: np.ndarray, choice: str, expert_TK, source_T, token_T) -> np.ndarray:
    replicas: dict[int, list[int]] = defaultdict(list)
    for slot, expert in enumerate(row.tolist()):
        if expert >= 0:
            replicas[expert].append(slot)
    turns: dict[tuple[int, int], int] = defaultdict(int)
    result = np.full(expert_TK.shape, -1, dtype=np.int64)
    for i, (expert_K, source, token) in enumerate(
        zip(expert_TK.tolist(), source_T.tolist(), token_T.tolist(), strict=True)
    ):
        if choice == "visit_first":
            result[i] = visit_first(slots, replicas, expert_K, source, token)
            continue
        for k, expert in enumerate(expert_K):
            candidates = replicas.get(expert, [])
            local = [p for p in candidates if slots.rank_P[p] == source]
            if len(candidates) < 2:
                result[i, k] = candidates[0] if candidates else -1
            elif choice == "token_hash":
                result[i, k] = candidates[(token * 2654435769 % 2**32) % len(candidates)]
            elif choice == "fixed_source":
                result[i, k] = candidates[source % len(candidates)]
            elif choice == "round_robin":
                result[i, k] = candidates[(turns[source, expert] + source) % len(candidates)]
                turns[source, expert] += 1
            elif choice == "local_or_uniform":
                draw = int(unit_hash(token, expert) * len(candidates))
                result[i, k] = local[0] if local else candidates[draw]
            else:
                raise AssertionError(choice)
    return result


def slots_of(case: Case, layer: int) -> tuple[LayerSlots, np.ndarray]:
    plan = case.plan
    share = None if plan.replica_share_LP is None else plan.replica_share_LP[layer]
    row = plan.slot_expert_LP[layer]
    return layer_slots(row, plan.num_experts, plan.num_ranks, plan.ranks_per_node, share), row


@pytest.mark.parametrize("choice", [c for c in REPLICA_CHOICES if c != "nearest"])
@settings(max_examples=60, deadline=None)
@given(case=cases(), start=st.sampled_from([0, 1, 10**6]))
def test_every_choice_follows_its_rule(choice: str, case: Case, start: int) -> None:
    token_T = np.arange(case.expert_LTK.shape[1]) + start
    for layer in range(len(case.expert_LTK)):
        slots, row = slots_of(case, layer)
        found = choose_slots(slots, choice, case.expert_LTK[layer], case.source_T, token_T)
        wanted = reference(slots, row, choice, case.expert_LTK[layer], case.source_T, token_T)
        np.testing.assert_array_equal(found, wanted)


@settings(max_examples=100, deadline=None)
@given(case=cases())
def test_nearest_is_a_table_by_source_that_prefers_its_rank_then_its_node(case: Case) -> None:
    slots, row = slots_of(case, 0)
    experts, ranks = case.plan.num_experts, case.plan.num_ranks
    expert_TK = np.tile(np.arange(experts), (ranks, 1))
    source_T = np.arange(ranks)
    table_SE = choose_slots(slots, "nearest", expert_TK, source_T, np.arange(ranks))
    later_SE = choose_slots(slots, "nearest", expert_TK, source_T, np.arange(ranks) + 12345)
    np.testing.assert_array_equal(table_SE, later_SE)
    for source in range(ranks):
        for expert in range(experts):
            chosen = table_SE[source, expert]
            assert row[chosen] == expert
            held = slots.rank_P[np.flatnonzero(row == expert)]
            if source in held:
                assert slots.rank_P[chosen] == source
            elif slots.node_R[source] in slots.node_R[held]:
                assert slots.node_R[slots.rank_P[chosen]] == slots.node_R[source]


def test_nearest_draws_fairly_where_no_replica_is_near() -> None:
    """Eight nodes of one rank, expert 0 on ranks 0 to 3: the other four sources use each replica at most twice."""
    row = np.array([0, 0, 0, 0, 1, 2, 3, 4])
    slots = layer_slots(row, 5, 8, 1)
    chosen = choose_slots(slots, "nearest", np.zeros((8, 1), dtype=int), np.arange(8), np.arange(8))[:, 0]
    assert chosen[:4].tolist() == [0, 1, 2, 3]
    assert np.bincount(chosen, minlength=4)[:4].max() <= 3


@pytest.mark.parametrize("choice", REPLICA_CHOICES)
@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_served_by_a_slot_of_the_expert_or_by_none(choice: str, case: Case) -> None:
    slots, row = slots_of(case, 0)
    expert_TK = case.expert_LTK[0]
    slot_TK = choose_slots(slots, choice, expert_TK, case.source_T, np.arange(len(expert_TK)))
    served = slot_TK >= 0
    np.testing.assert_array_equal(served, expert_TK != UNSET)
    np.testing.assert_array_equal(row[slot_TK[served]], expert_TK[served])


@pytest.mark.parametrize("choice", REPLICA_CHOICES)
def test_unplaced_null_and_unset_ids_are_served_by_none(choice: str) -> None:
    slots = layer_slots(np.array([0, 1, 0, 2, -1, 1]), 4, 3, 3)
    expert_TK = np.array([[3, 4, 255, 0], [-1, 7, 2, 1]])
    slot_TK = choose_slots(slots, choice, expert_TK, np.array([0, 2]), np.array([0, 1]))
    assert (slot_TK[0, :3] == -1).all()
    assert slot_TK[0, 3] in (0, 2)
    assert (slot_TK[1, :2] == -1).all()
    assert slot_TK[1, 2] == 3
    assert slot_TK[1, 3] in (1, 5)


@pytest.mark.parametrize(("choice", "shares"), [("visit_first", (0.2, 0.8)), ("local_or_uniform", (0.5, 0.5))])
def test_draws_meet_their_shares(choice: str, shares: tuple[float, float]) -> None:
    """Expert 0 on ranks 0 and 1, all tokens from rank 2: five standard deviations of 20,000 draws are 0.018."""
    slots = layer_slots(np.array([0, 0, 1]), 2, 3, 3, np.array([0.2, 0.8, 1.0]))
    tokens = 20_000
    expert_TK, source_T = np.zeros((tokens, 1), dtype=int), np.full(tokens, 2)
    slot_T = choose_slots(slots, choice, expert_TK, source_T, np.arange(tokens))[:, 0]
    assert np.bincount(slot_T, minlength=2) / tokens == pytest.approx(shares, abs=0.018)


def test_visit_first_stays_on_ranks_that_are_visited_anyway() -> None:
    """Expert 0 lives on rank 0 alone, 1 and 2 on both ranks: from rank 1, rank 0 is enough, whatever the draw."""
    slots = layer_slots(np.array([1, 2, 0, 1, 2, 3]), 4, 2, 2)
    expert_TK = np.tile([1, 2, 0], (50, 1))
    slot_TK = choose_slots(slots, "visit_first", expert_TK, np.ones(50, dtype=int), np.arange(50))
    assert set(slots.rank_P[slot_TK].reshape(-1).tolist()) == {0}


def test_visit_first_sends_several_replicated_experts_to_one_rank_that_holds_them_all() -> None:
    """Experts 0, 1, 2 have two replicas each and meet on rank 1 alone; the source rank 0 holds only two of them."""
    slots = layer_slots(np.array([0, 1, 3, 0, 1, 2, 2, 4, 5]), 6, 3, 3)
    expert_TK = np.tile([0, 1, 2], (50, 1))
    slot_TK = choose_slots(slots, "visit_first", expert_TK, np.zeros(50, dtype=int), np.arange(50))
    assert set(slots.rank_P[slot_TK].reshape(-1).tolist()) == {1}


def test_visit_first_shares_among_the_visited_ranks_as_planned() -> None:
    """Experts 1 and 2 alone on ranks 0 and 1, expert 0 on both (and 2): five standard deviations are 0.016."""
    slots = layer_slots(np.array([0, 1, 0, 2, 0, 3]), 4, 3, 2, np.array([0.1, 1, 0.3, 1, 0.6, 1]))
    tokens = 20_000
    slot_TK = choose_slots(slots, "visit_first", np.tile([0, 1, 2], (tokens, 1)), np.full(tokens, 2), np.arange(tokens))
    assert np.bincount(slots.rank_P[slot_TK[:, 0]], minlength=3) / tokens == pytest.approx((0.25, 0.75, 0), abs=0.016)


def test_visit_first_takes_the_source_rank_where_nothing_is_visited() -> None:
    slots = layer_slots(np.array([0, 1, 0, 2, 0, 3]), 4, 3, 3)
    for source in range(3):
        slot_TK = choose_slots(slots, "visit_first", np.zeros((20, 1), int), np.full(20, source), np.arange(20))
        assert set(slots.rank_P[slot_TK[:, 0]].tolist()) == {source}


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_layer_slots_inverts_the_row(case: Case) -> None:
    slots, row = slots_of(case, 0)
    for expert in range(case.plan.num_experts):
        held = np.flatnonzero(row == expert)
        assert slots.count_E[expert] == len(held)
        np.testing.assert_array_equal(slots.slot_EN[expert, : len(held)], held)
        assert (slots.slot_EN[expert, len(held) :] == -1).all()
        assert slots.share_P[held].sum() == pytest.approx(1.0)
    np.testing.assert_array_equal(slots.rank_P, np.repeat(np.arange(case.plan.num_ranks), case.plan.slots_per_rank))
