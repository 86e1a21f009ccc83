"""CP-SAT against brute force over every placement of tiny layers, and its manners at its limits."""

import itertools

import isolated_functions
import numpy as np
import pytest
from exact_problems import (
    equal_placements,
    load_R,
    make_cluster,
    make_problem,
    random_trace,
    rank_LE,
    ranks_touched,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import UsageError
from placer.core.plan import canonical_slots
from placer.core.problem import PlacementProblem
from solvers import cpsat, isolate
from solvers.cpsat import solve_cpsat, solve_layers
from solvers.result import SolveResult

EXPERTS = 6


def solve_here(problem: PlacementProblem, monkeypatch: pytest.MonkeyPatch) -> SolveResult:
    """The whole solver without the cost of a child process."""
    monkeypatch.setattr(cpsat, "run_isolated", lambda function, arguments, *, time_limit_s: function(*arguments))
    return solve_cpsat(problem, time_limit_s=60, seed=1)


@settings(max_examples=30, deadline=None)
@given(
    ranks=st.sampled_from([2, 3]),
    top_k=st.integers(1, 3),
    seed=st.integers(0, 10**6),
    max_par=st.sampled_from([None, 1.0, 1.05, 1.2, 1.5]),
)
def test_the_optimum_is_brute_force_s(ranks: int, top_k: int, seed: int, max_par: float | None) -> None:
    trace = random_trace(2, 12, top_k, EXPERTS, seed)
    trace[:, :3, -1] = -1  # tokens that chose fewer, or nothing at top-1
    problem = make_problem(trace, num_experts=EXPERTS, cluster=make_cluster(ranks), max_par=max_par)
    with pytest.MonkeyPatch.context() as monkeypatch:
        result = solve_here(problem, monkeypatch)
    best = []
    for load_E, ids_TK in zip(problem.profile.load_LE, trace, strict=True):
        cap = np.inf if max_par is None else max_par * load_E.sum() / ranks + 1e-9
        allowed = [r for r in equal_placements(EXPERTS, ranks) if load_R(load_E, r, ranks).max() <= cap]
        best.append(min((ranks_touched(ids_TK, rank_E) for rank_E in allowed), default=None))
    if None in best:
        assert (result.status, result.stopped_by, result.slot_expert_LP) == ("infeasible", "infeasible", None)
        assert f"layer {best.index(None)} (row {best.index(None)})" in result.message
        return
    assert (result.status, result.stopped_by, result.objective_name) == ("solved", "optimal", "ranks_touched")
    assert result.objective == pytest.approx(sum(best) / 24, abs=1e-12)
    assert result.bound == result.objective
    found_LE = rank_LE(result.slot_expert_LP, EXPERTS, ranks)
    counted = [ranks_touched(ids_TK, rank_E) for ids_TK, rank_E in zip(trace, found_LE, strict=True)]
    assert counted == best
    for load_E, rank_E in zip(problem.profile.load_LE, found_LE, strict=True):
        assert max_par is None or load_R(load_E, rank_E, ranks).max() <= max_par * load_E.sum() / ranks + 1e-9


@settings(max_examples=15, deadline=None)
@given(ranks=st.sampled_from([2, 3]), seed=st.integers(0, 10**6))
def test_without_sets_the_largest_load_is_least(ranks: int, seed: int) -> None:
    trace = random_trace(2, 40, 2, EXPERTS, seed)
    problem = make_problem(trace, num_experts=EXPERTS, cluster=make_cluster(ranks), with_sets=False)
    with pytest.MonkeyPatch.context() as monkeypatch:
        result = solve_here(problem, monkeypatch)
    least = [
        min(load_R(load_E, rank_E, ranks).max() for rank_E in equal_placements(EXPERTS, ranks))
        for load_E in problem.profile.load_LE
    ]
    assert (result.stopped_by, result.objective_name) == ("optimal", "par")
    assert result.objective == pytest.approx(np.mean([load * ranks / 80 for load in least]))
    assert result.bound == pytest.approx(result.objective)
    for load_E, rank_E, load in zip(
        problem.profile.load_LE, rank_LE(result.slot_expert_LP, EXPERTS, ranks), least, strict=True
    ):
        assert load_R(load_E, rank_E, ranks).max() == load


def test_through_the_child_process_same_seed_same_placement() -> None:
    trace = random_trace(2, 60, 2, 8, 3)
    problem = make_problem(trace, num_experts=8, cluster=make_cluster(4), max_par=1.4)
    first, second = (solve_cpsat(problem, time_limit_s=60, seed=7) for _ in range(2))
    assert (first.status, first.stopped_by, first.bound_by) == ("solved", "optimal", "cpsat")
    assert first.slot_expert_LP.dtype == np.int64
    assert np.array_equal(first.slot_expert_LP, second.slot_expert_LP)
    assert np.array_equal(first.slot_expert_LP, canonical_slots(first.slot_expert_LP, 4))
    assert (first.objective, first.bound, first.message) == (second.objective, second.bound, second.message)


def test_an_impossible_cap_names_the_layer_and_the_heaviest_expert() -> None:
    trace = np.zeros((2, 10, 1), dtype=int)
    trace[0, :, 0] = np.arange(10) % 4
    problem = make_problem(trace[:, :8], num_experts=4, cluster=make_cluster(2), max_par=1.25)
    result = solve_cpsat(problem, time_limit_s=30)
    assert (result.status, result.stopped_by, result.objective) == ("infeasible", "infeasible", None)
    assert "layer 1 (row 1)" in result.message
    assert "heaviest expert alone needs 2.0000" in result.message


def test_the_time_limit_stops_a_layer_with_a_bound_below_its_placement() -> None:
    problem = make_problem(random_trace(1, 1500, 4, 32, 0), num_experts=32, cluster=make_cluster(8))
    result = solve_cpsat(problem, time_limit_s=1)
    assert (result.status, result.stopped_by) == ("solved", "time_limit")
    assert 1.0 <= result.bound < result.objective <= 4.0
    assert result.message == "0 of 1 layers proven optimal"
    rank_LE(result.slot_expert_LP, 32, 8)


def test_no_placement_in_time_says_so() -> None:
    trace = np.random.default_rng(0).integers(0, 64, size=(1, 6400, 1))
    problem = make_problem(trace, num_experts=64, cluster=make_cluster(8), max_par=1.0)
    layers = cpsat._layer_models(problem)
    (answer,) = solve_layers(layers, 8, 0.01, 0, 1)
    assert (answer.state, answer.rank_E) == ("unknown", None)
    result = cpsat._assemble(problem, layers, [answer], 0.0)
    assert (result.status, result.stopped_by) == ("error", "time_limit")
    assert "layer 0 (row 0): no placement found" in result.message


@pytest.mark.parametrize(
    ("function", "stopped_by", "says"),
    [("sleep_forever", "time_limit", "it was killed"), ("crash", "error", "SIGSEGV")],
)
def test_a_back_end_that_hangs_or_dies_is_an_error_result(
    function: str, stopped_by: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolate, "GRACE_S", 0.0)
    monkeypatch.setattr(isolate, "GRACE_FACTOR", 1.0)
    monkeypatch.setattr(cpsat, "solve_layers", getattr(isolated_functions, function))
    problem = make_problem(random_trace(1, 5, 1, 4, 0), num_experts=4, cluster=make_cluster(2))
    result = solve_cpsat(problem, time_limit_s=1.5)
    assert (result.status, result.stopped_by, result.slot_expert_LP) == ("error", stopped_by, None)
    assert says in result.message


def test_a_search_cut_short_still_returns_its_start() -> None:
    trace = random_trace(1, 800, 4, 32, 0)
    problem = make_problem(trace, num_experts=32, cluster=make_cluster(8))
    (answer,) = solve_layers(cpsat._layer_models(problem), 8, 1e-9, 0, 1)
    assert answer.state == "feasible"
    assert np.bincount(answer.rank_E).tolist() == [4] * 8
    assert answer.objective == ranks_touched(trace[0], answer.rank_E)
    assert 800 <= answer.bound < answer.objective


def test_replicas_and_zero_workers_are_refused() -> None:
    trace = random_trace(1, 5, 1, 4, 0)
    with pytest.raises(UsageError, match="redundant is 2; use --redundant 0"):
        solve_cpsat(make_problem(trace, num_experts=4, cluster=make_cluster(2), redundant=2), time_limit_s=1)
    with pytest.raises(UsageError, match="workers is 0"):
        solve_cpsat(make_problem(trace, num_experts=4, cluster=make_cluster(2)), time_limit_s=1, workers=0)


def test_brute_force_itself_counts_every_placement() -> None:
    assert len(list(equal_placements(6, 2))) == 20
    assert len(list(equal_placements(6, 3))) == 90
    assert ranks_touched(np.array([[0, 1], [0, -1]]), np.array([0, 1])) == 3
    assert len(list(itertools.islice(equal_placements(4, 4), 99))) == 24
