"""Shares of replicas: closed forms, max-flow as an oracle, and the laws of the split."""

import networkx as nx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import counts_problem

from placer.core.check import check
from placer.core.errors import UsageError
from placer.core.evaluate_profile import evaluate_profile
from placer.pipeline import make_plan
from solvers.balance.eplb import eplb_slots, solve_eplb
from solvers.balance.load import mean_par, rank_load_LR
from solvers.balance.lpt import lpt_slots
from solvers.balance.split import equal_shares, shared_load_LR, solve_lplb, split_layers, split_tokens


def busiest(load_E: np.ndarray, slots_P: np.ndarray, share_P: np.ndarray, ranks: int) -> float:
    return float(shared_load_LR(load_E[None], slots_P[None], share_P[None], ranks).max())


def can_carry(load_E: np.ndarray, slots_P: np.ndarray, ranks: int, peak: int) -> bool:
    """Max-flow in whole tokens: experts to the ranks that hold them, each rank at most `peak`."""
    graph = nx.DiGraph()
    for expert, load in enumerate(load_E.tolist()):
        graph.add_edge("source", ("expert", expert), capacity=load)
    for slot, expert in enumerate(slots_P.tolist()):
        graph.add_edge(("expert", expert), ("rank", slot // (len(slots_P) // ranks)), capacity=int(load_E.sum()))
    for rank in range(ranks):
        graph.add_edge(("rank", rank), "sink", capacity=peak)
    return nx.maximum_flow_value(graph, "source", "sink") == load_E.sum()


def test_a_hand_example() -> None:
    # expert 0 is on both ranks, experts 1 and 2 fill them to 2 and 6: the 8 tokens of expert 0 go 6 : 2
    slots_P = np.array([0, 1, 0, 2])
    np.testing.assert_allclose(split_tokens(np.array([8, 2, 6]), slots_P, 2), [0.75, 1.0, 0.25, 1.0])
    # 3 tokens cannot lift rank 0 to the 9 of rank 1: they all go to rank 0
    np.testing.assert_allclose(split_tokens(np.array([3, 2, 9]), slots_P, 2), [1.0, 1.0, 0.0, 1.0])


def test_a_chain_of_replicas_passes_load_on() -> None:
    # rank 0 {0, 0'}: expert 0 also on rank 1, expert 1 on ranks 1 and 2: everything can be levelled to 10
    slots_P = np.array([0, 3, 0, 1, 1, 4])
    share_P = split_tokens(np.array([18, 12, 0, 0, 0]), slots_P, 3)
    assert busiest(np.array([18, 12, 0, 0, 0]), slots_P, share_P, 3) == pytest.approx(10.0)


def test_one_replica_gets_everything_and_empty_slots_and_experts_nothing() -> None:
    share_P = split_tokens(np.array([5, 0, 7]), np.array([0, -1, 2, 1, 1, -1]), 3)
    assert share_P.tolist() == [1.0, 0.0, 1.0, 0.5, 0.5, 0.0]
    assert equal_shares(np.array([0, 1, 0, -1])).tolist() == [0.5, 1.0, 0.5, 0.0]


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=6, max_size=6),
    st.lists(st.integers(0, 40), min_size=6, max_size=6),
    st.sampled_from([3, 6, 12]),
)
def test_the_split_is_max_flow_s_and_never_worse_than_equal(
    planned: list[int], drifted: list[int], redundant: int
) -> None:
    load_E, ranks = np.array(drifted), 3
    slots_P = lpt_slots(np.array([planned]), 6 + redundant, ranks)[0]
    share_P = split_tokens(load_E, slots_P, ranks)
    assert (share_P >= 0).all()
    np.testing.assert_allclose(np.bincount(slots_P, weights=share_P), 1.0)
    peak = busiest(load_E, slots_P, share_P, ranks)
    assert peak <= busiest(load_E, slots_P, equal_shares(slots_P), ranks)
    # with loads in multiples of 60 the optimum over at most 3 ranks is whole: binary search on the flow finds it
    scaled_E, low, high = load_E * 60, 0, int(load_E.sum()) * 60
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if can_carry(scaled_E, slots_P, ranks, middle) else (middle + 1, high)
    assert peak * 60 == pytest.approx(high, abs=1e-4)
    assert np.array_equal(share_P, split_tokens(load_E, slots_P, ranks))


def test_the_split_follows_a_drift_that_equal_shares_do_not() -> None:
    rng = np.random.default_rng(0)
    load_LE = rng.lognormal(0, 1, size=(2, 32)) * 1000
    slots_LP = eplb_slots(load_LE, 48, 8)
    drifted_LE = load_LE * rng.lognormal(0, 0.3, size=load_LE.shape)
    split = mean_par(shared_load_LR(drifted_LE, slots_LP, split_layers(drifted_LE, slots_LP, 8), 8))
    equal = mean_par(rank_load_LR(drifted_LE, slots_LP, 8))
    assert split < 1 + 0.6 * (equal - 1)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0, 4, 8]))
def test_lplb_is_eplb_s_placement_and_never_above_its_par(seed: int, redundant: int) -> None:
    load_LE = np.random.default_rng(seed).integers(0, 100, size=(3, 8))
    problem = counts_problem(load_LE, 4, redundant)
    eplb, lplb = solve_eplb(problem), solve_lplb(problem)
    assert np.array_equal(lplb.slot_expert_LP, eplb.slot_expert_LP)
    assert eplb.bound - 1e-9 <= lplb.bound <= lplb.objective <= eplb.objective + 1e-12
    plan = make_plan(problem, lplb, 0)
    assert {violation.code for violation in check(problem, plan)} <= {"same-rank-replicas"}
    assert evaluate_profile(plan, problem.profile).par == pytest.approx(lplb.objective)


@pytest.mark.parametrize(
    ("load", "slots", "says"),
    [
        ([1.0, -1.0], [0, 1], "has -1"),
        ([1.0, float("nan")], [0, 1], "has nan"),
        ([1.0, 2.0], [0, 0], "expert 1 has load and no slot"),
        ([1.0, 2.0], [0, 1, 2, 0], "has expert 2; load_E knows 2"),
    ],
)
def test_what_makes_no_sense_is_refused(load: list[float], slots: list[int], says: str) -> None:
    with pytest.raises(UsageError, match=says):
        split_tokens(np.array(load), np.array(slots), 2)
