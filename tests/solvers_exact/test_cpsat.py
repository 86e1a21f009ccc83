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
from solvers.exact import cpsat, isolate
from solvers.exact.cpsat import solve_cpsat
from solvers.exact.cpsat_model import search_layers
from solvers.result import SolveResult

EXPERTS = 6


def solve_here(problem: PlacementProblem, monkeypatch: pytest.MonkeyPatch) -> SolveResult:
    """The whole solver without the cost of a child process."""
    monkeypatch.setattr(cpsat, "run_isolated", lambda function, arguments, *, time_limit_s: function(*arguments))
    return solve_cpsat(problem, time_limit_s=60, seed=1)


def best_under_cap(problem: PlacementProblem, trace: np.ndarray, ranks: int) -> float | None:
    """Least mean of ranks touched over all pairs of placements of two layers whose mean PAR meets the cap."""
    touched, par = [], []
    for load_E, ids_TK in zip(problem.profile.load_LE, trace, strict=True):
        every = list(equal_placements(EXPERTS, ranks))
        touched.append(np.array([ranks_touched(ids_TK, rank_E) / len(ids_TK) for rank_E in every]))
        par.append(np.array([load_R(load_E, rank_E, ranks).max() * ranks / load_E.sum() for rank_E in every]))
    mean_par = (par[0][:, None] + par[1][None, :]) / 2
    mean_touched = (touched[0][:, None] + touched[1][None, :]) / 2
    allowed = mean_touched[mean_par <= (np.inf if problem.max_par is None else problem.max_par + 1e-9)]
    return float(allowed.min()) if allowed.size else None


@settings(max_examples=40, deadline=None)
@given(
    ranks=st.sampled_from([2, 3]),
    top_k=st.integers(1, 4),
    seed=st.integers(0, 10**6),
    max_par=st.sampled_from([None, 1.0, 1.05, 1.2, 1.5]),
    short=st.booleans(),
)
def test_the_optimum_is_brute_force_s(ranks: int, top_k: int, seed: int, max_par: float | None, short: bool) -> None:
    trace = random_trace(2, 12, top_k, EXPERTS, seed)
    trace[0, :3, -1] = -1  # tokens that chose fewer (none at top-1), so that the layers' loads differ in their sums
    trace[1, 0, -1] = -1 if short else trace[1, 0, -1]
    problem = make_problem(trace, num_experts=EXPERTS, cluster=make_cluster(ranks), max_par=max_par)
    with pytest.MonkeyPatch.context() as monkeypatch:
        result = solve_here(problem, monkeypatch)
    best = best_under_cap(problem, trace, ranks)
    if best is None:
        assert (result.status, result.stopped_by, result.slot_expert_LP) == ("infeasible", "infeasible", None)
        return
    assert (result.status, result.stopped_by, result.objective_name) == ("solved", "optimal", "ranks_touched")
    assert result.objective == pytest.approx(best, abs=1e-12)
    assert result.bound == pytest.approx(best, abs=1e-12)
    found_LE = rank_LE(result.slot_expert_LP, EXPERTS, ranks)
    counted = [ranks_touched(ids_TK, rank_E) / 12 for ids_TK, rank_E in zip(trace, found_LE, strict=True)]
    assert np.mean(counted) == pytest.approx(best)
    pars = [
        load_R(load_E, rank_E, ranks).max() * ranks / load_E.sum()
        for load_E, rank_E in zip(problem.profile.load_LE, found_LE, strict=True)
    ]
    assert max_par is None or np.mean(pars) <= max_par + 1e-9


def test_one_layer_may_exceed_the_cap_that_the_mean_meets() -> None:
    even, uneven = np.tile(np.arange(4), 2), np.array([0, 0, 0, 0, 1, 2, 3, 3])
    problem = make_problem(np.stack([even, uneven])[:, :, None], num_experts=4, cluster=make_cluster(4), max_par=1.5)
    result = solve_cpsat(problem, time_limit_s=30)
    assert (result.status, result.stopped_by) == ("solved", "optimal")
    tight = make_problem(np.stack([even, uneven])[:, :, None], num_experts=4, cluster=make_cluster(4), max_par=1.49)
    assert solve_cpsat(tight, time_limit_s=30).status == "infeasible"


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


def test_a_cap_that_no_arrangement_meets_is_infeasible() -> None:
    load = np.repeat(np.arange(4), [5, 5, 4, 1])  # no expert is too heavy, but the best is 5 + 4 against 5 + 1
    problem = make_problem(load[None, :, None], num_experts=4, cluster=make_cluster(2), max_par=1.2)
    assert solve_cpsat(problem, time_limit_s=30).stopped_by == "optimal"
    problem = make_problem(load[None, :, None], num_experts=4, cluster=make_cluster(2), max_par=1.19)
    result = solve_cpsat(problem, time_limit_s=30)
    assert (result.status, result.stopped_by, result.objective) == ("infeasible", "infeasible", None)
    assert "mean PAR within 1.19; raise --max-par" in result.message


def test_the_time_limit_stops_with_a_bound_below_the_placement() -> None:
    problem = make_problem(random_trace(1, 1500, 4, 32, 0), num_experts=32, cluster=make_cluster(8))
    result = solve_cpsat(problem, time_limit_s=1)
    assert (result.status, result.stopped_by) == ("solved", "time_limit")
    assert 1.0 <= result.bound < result.objective <= 4.0
    assert result.message == "0 of 1 layers proven optimal"
    rank_LE(result.slot_expert_LP, 32, 8)


def test_no_placement_in_time_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    trace = np.random.default_rng(0).integers(0, 64, size=(1, 6400, 1))
    problem = make_problem(trace, num_experts=64, cluster=make_cluster(8), max_par=1.0)
    answer = search_layers(cpsat._layers(problem), 8, 1.0, 0.01, 0, 1)
    assert (answer.state, answer.rank_LE) == ("unknown", None)
    monkeypatch.setattr(cpsat, "run_isolated", lambda *_, **__: answer)
    result = solve_cpsat(problem, time_limit_s=1)
    assert (result.status, result.stopped_by) == ("error", "time_limit")
    assert "no placement found with a mean PAR within 1.0" in result.message


@pytest.mark.parametrize("max_par", [None, 1.3])
def test_a_search_cut_short_still_returns_its_start(max_par: float | None) -> None:
    trace = np.random.default_rng(1).integers(0, 32, size=(2, 800, 3))
    problem = make_problem(trace, num_experts=32, cluster=make_cluster(8))
    answer = search_layers(cpsat._layers(problem), 8, max_par, 1e-9, 0, 1)
    assert (answer.state, answer.proven) == ("solved", False)
    assert [np.bincount(rank_E).tolist() for rank_E in answer.rank_LE] == [[4] * 8] * 2
    counted = [ranks_touched(ids, rank_E) / 800 for ids, rank_E in zip(trace, answer.rank_LE, strict=True)]
    assert answer.objective == pytest.approx(np.mean(counted))
    assert 1.0 <= answer.bound < answer.objective


@settings(max_examples=60, deadline=None)
@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5), t=st.integers(1, 8))
def test_the_cut_through_pairs_holds_for_every_grouping(sizes: list[int], t: int) -> None:
    chosen, together = sum(sizes), sum(size * (size - 1) // 2 for size in sizes)
    assert t * (t + 1) * len(sizes) >= 2 * t * chosen - 2 * together
    equal = t * (t + 1) * len(sizes) == 2 * t * chosen - 2 * together
    assert equal == all(size in (t, t + 1) for size in sizes)


@pytest.mark.parametrize(
    ("function", "stopped_by", "says"),
    [("sleep_forever", "time_limit", "it was killed"), ("crash", "error", "SIGSEGV")],
)
def test_a_back_end_that_hangs_or_dies_is_an_error_result(
    function: str, stopped_by: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolate, "GRACE_S", 0.0)
    monkeypatch.setattr(isolate, "GRACE_FACTOR", 1.0)
    monkeypatch.setattr(cpsat, "search_layers", getattr(isolated_functions, function))
    problem = make_problem(random_trace(1, 5, 1, 4, 0), num_experts=4, cluster=make_cluster(2))
    result = solve_cpsat(problem, time_limit_s=1.5)
    assert (result.status, result.stopped_by, result.slot_expert_LP) == ("error", stopped_by, None)
    assert says in result.message


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
