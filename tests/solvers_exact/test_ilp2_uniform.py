"""MoETuner's second program on one bandwidth: polynomial against HiGHS, brute force and the closed form."""

import itertools

import numpy as np
import pytest
from exact_problems import make_cluster, make_problem, random_trace, rank_LE
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers.papers import moetuner
from solvers.papers.ilp2_uniform import assign_ranks_uniform, heaviest_unavoidable
from solvers.papers.moetuner import Settings, assign_ranks, pair_gbytes_RR, solve_moetuner


def largest_between_ranks(flow_CC: np.ndarray, here_C: np.ndarray, there_C: np.ndarray) -> float:
    pairs = itertools.product(range(len(flow_CC)), repeat=2)
    return max((flow_CC[c, d] for c, d in pairs if here_C[c] != there_C[d]), default=0.0)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(3, 2), (3, 3), (2, 4)]), st.sampled_from([3, 1000]))
def test_it_equals_the_integer_program(seed: int, shape: tuple[int, int], most: int) -> None:
    layers, clusters = shape
    flow_LCC = np.random.default_rng(seed).integers(0, most, size=(layers - 1, clusters, clusters)).astype(float)
    rate_RR = pair_gbytes_RR(make_cluster(clusters))
    stage = assign_ranks(flow_LCC, rate_RR, np.ones((layers, clusters), dtype=np.int64), Settings(capacity=1), 60.0)
    _, objective = assign_ranks_uniform(flow_LCC)
    assert stage.state == "optimal"
    assert objective / rate_RR.min() == pytest.approx(stage.objective, rel=1e-5, abs=1e-5)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 4), st.sampled_from([2, 5, 1000]))
def test_it_is_brute_force_s_and_its_objective_is_what_the_labels_give(
    seed: int, clusters: int, layers: int, most: int
) -> None:
    flow_LCC = np.random.default_rng(seed).integers(0, most, size=(layers - 1, clusters, clusters)).astype(float)
    rank_LC, objective = assign_ranks_uniform(flow_LCC)
    assert np.array_equal(np.sort(rank_LC, axis=1), np.tile(np.arange(clusters), (layers, 1)))
    found = [largest_between_ranks(*item) for item in zip(flow_LCC, rank_LC, rank_LC[1:], strict=False)]
    assert objective == pytest.approx(sum(found))
    for flow_CC, largest in zip(flow_LCC, found, strict=True):
        orders = map(np.array, itertools.permutations(range(clusters)))
        assert largest == min(largest_between_ranks(flow_CC, np.arange(clusters), order) for order in orders)
        assert largest == heaviest_unavoidable(flow_CC)


def test_ties_are_broken_by_the_flow_that_stays() -> None:
    flow_LCC = np.array([[[5.0, 5.0, 0.0], [0.0, 5.0, 5.0], [5.0, 0.0, 4.0]]])
    rank_LC, objective = assign_ranks_uniform(flow_LCC)
    assert objective == 5.0
    assert rank_LC[1].tolist() == [
        2,
        0,
        1,
    ]  # clusters 1, 2 and 0 follow clusters 0, 1 and 2: all three fives but one line


def test_the_solver_takes_it_on_one_bandwidth_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moetuner, "run_isolated", lambda function, arguments, *, time_limit_s: function(*arguments))
    asked = []
    program = moetuner.assign_ranks
    monkeypatch.setattr(moetuner, "assign_ranks", lambda *arguments: asked.append(1) or program(*arguments))
    trace = random_trace(4, 300, 2, 8, 7)
    one = solve_moetuner(make_problem(trace, num_experts=8, cluster=make_cluster(4)), time_limit_s=60)
    assert (one.status, one.stopped_by, asked) == ("solved", "effort", [])
    two = solve_moetuner(make_problem(trace, num_experts=8, cluster=make_cluster(4, nodes=2)), time_limit_s=60)
    assert (two.status, asked) == ("solved", [1])
    monkeypatch.setattr(moetuner, "_one_rate", lambda rate_RR: False)
    program_s = solve_moetuner(make_problem(trace, num_experts=8, cluster=make_cluster(4)), time_limit_s=60)
    assert asked == [1, 1]
    assert one.objective == pytest.approx(program_s.objective, rel=1e-5)
    assert one.message == program_s.message
    rank_LE(one.slot_expert_LP, 8, 4)
