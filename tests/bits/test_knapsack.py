"""The multiple-choice knapsack against brute force: answers, the relaxation, CP-SAT and what has no answer."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import UsageError
from solvers.bits.knapsack import Knapsack, relaxation, solve_greedy
from solvers.bits.knapsack_cpsat import search_knapsack, solve_cpsat_knapsack


def problem_of(seed: int, classes: int = 5, options: int = 4, *, limited: bool = False) -> Knapsack:
    rng = np.random.default_rng(seed)
    bytes_CO = rng.integers(0, 30, (classes, options))
    bytes_CO[:, 1:][rng.random((classes, options - 1)) < 0.15] = -1
    cost_CO = rng.integers(0, 100, (classes, options)).astype(float)
    loss_CO = rng.integers(0, 20, (classes, options)).astype(float)
    return Knapsack(
        bytes_CO=bytes_CO,
        cost_CO=cost_CO,
        most_bytes=int(rng.integers(10, 100)),
        loss_CO=loss_CO if limited else None,
        most_loss=float(rng.integers(5, 70)) if limited else None,
    )


def best_by_pareto(problem: Knapsack) -> float:
    """Dynamic programming over classes: the least cost for every (bytes, loss) reached."""
    reached = {(0, 0.0): 0.0}
    for row in range(len(problem.bytes_CO)):
        found: dict[tuple[int, float], float] = {}
        for ((used, lost), cost), option in itertools.product(reached.items(), range(problem.bytes_CO.shape[1])):
            if problem.bytes_CO[row, option] < 0:
                continue
            more = 0.0 if problem.loss_CO is None else problem.loss_CO[row, option]
            key = (used + int(problem.bytes_CO[row, option]), lost + more)
            found[key] = min(found.get(key, np.inf), cost + problem.cost_CO[row, option])
        reached = found
    most_loss = np.inf if problem.most_loss is None else problem.most_loss
    return min(
        (cost for (used, lost), cost in reached.items() if used <= problem.most_bytes and lost <= most_loss),
        default=np.inf,
    )


@given(seed=st.integers(0, 2**32 - 1), limited=st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_bound_is_below_the_optimum_and_the_answer_is_not(seed: int, limited: bool) -> None:
    problem = problem_of(seed, limited=limited)
    optimum, result = best_by_pareto(problem), solve_greedy(problem)
    assert relaxation(problem) <= optimum + 1e-6 or optimum == np.inf
    if result.choice_C is None:
        assert result.status == "error" or optimum == np.inf
        return
    assert problem.fits(result.choice_C)
    assert (problem.bytes_CO[np.arange(5), result.choice_C] >= 0).all()
    assert result.objective == problem.total(problem.cost_CO, result.choice_C)
    assert result.bound is not None
    assert result.bound - 1e-6 <= optimum <= result.objective
    if result.stopped_by == "optimal":
        assert result.objective == pytest.approx(optimum)


@given(seed=st.integers(0, 2**32 - 1), limited=st.booleans())
@settings(max_examples=20, deadline=None)
def test_cpsat_is_the_dynamic_program(seed: int, limited: bool) -> None:
    problem = problem_of(seed, limited=limited)
    optimum = best_by_pareto(problem)
    state, choice_C, bound = search_knapsack(problem, None, 10.0, 0, 1)
    if optimum == np.inf:
        assert (state, choice_C) == ("infeasible", None)
        return
    assert state == "optimal"
    assert choice_C is not None
    assert problem.fits(choice_C)
    assert problem.total(problem.cost_CO, choice_C) == optimum == bound


def test_cpsat_in_its_own_process_proves_and_is_no_worse() -> None:
    base = problem_of(11, classes=8, limited=True)
    problem = Knapsack(
        bytes_CO=base.bytes_CO, cost_CO=base.cost_CO, most_bytes=100, loss_CO=base.loss_CO, most_loss=60.0
    )
    result, greedy = solve_cpsat_knapsack(problem, time_limit_s=10), solve_greedy(problem)
    assert result.objective == best_by_pareto(problem) == result.bound
    assert (result.stopped_by, result.gap) == ("optimal", 0.0)
    assert greedy.objective is None or result.objective <= greedy.objective


def test_the_relaxation_is_the_linear_program() -> None:
    """By GLOP, with both limits."""
    from ortools.linear_solver import pywraplp

    for seed in range(25):
        problem = problem_of(seed, limited=seed % 2 == 0)
        solver = pywraplp.Solver.CreateSolver("GLOP")
        places = np.argwhere(problem.bytes_CO >= 0).tolist()
        share = {(row, option): solver.NumVar(0, 1, "") for row, option in places}
        for row in range(len(problem.bytes_CO)):
            solver.Add(sum(one for at, one in share.items() if at[0] == row) == 1)
        solver.Add(sum(int(problem.bytes_CO[at]) * one for at, one in share.items()) <= problem.most_bytes)
        if problem.most_loss is not None and problem.loss_CO is not None:
            solver.Add(sum(float(problem.loss_CO[at]) * one for at, one in share.items()) <= problem.most_loss)
        solver.Minimize(sum(float(problem.cost_CO[at]) * one for at, one in share.items()))
        if solver.Solve() == pywraplp.Solver.OPTIMAL:
            assert relaxation(problem) == pytest.approx(solver.Objective().Value(), abs=1e-5)
        else:
            assert relaxation(problem) == np.inf


def test_more_budget_never_raises_the_bound() -> None:
    base = problem_of(3, classes=30)
    bounds = [
        relaxation(Knapsack(bytes_CO=base.bytes_CO, cost_CO=base.cost_CO, most_bytes=most))
        for most in range(100, 900, 25)
    ]
    assert all(later <= earlier + 1e-9 for earlier, later in itertools.pairwise(bounds))


def test_serving_scale_is_within_a_permille_of_its_bound() -> None:
    rng = np.random.default_rng(0)
    bytes_CO = np.cumsum(rng.integers(1, 4, (58 * 256, 4)), axis=1) * 4096
    cost_CO = -np.cumsum(rng.random((58 * 256, 4)) / np.arange(1, 5), axis=1) * rng.random((58 * 256, 1))
    problem = Knapsack(bytes_CO=bytes_CO, cost_CO=cost_CO, most_bytes=int(bytes_CO.mean(axis=1).sum()))
    result = solve_greedy(problem)
    assert result.gap is not None
    assert result.gap < 1e-3
    again = solve_greedy(problem)
    np.testing.assert_array_equal(result.choice_C, again.choice_C)


def test_limits_that_nothing_keeps() -> None:
    bytes_CO, cost_CO = np.array([[5, 9]]), np.array([[1.0, 0.0]])
    result = solve_greedy(Knapsack(bytes_CO=bytes_CO, cost_CO=cost_CO, most_bytes=4))
    assert (result.status, result.stopped_by, result.choice_C) == ("infeasible", "infeasible", None)
    assert "raise the budget" in result.message
    lossy = Knapsack(bytes_CO=bytes_CO, cost_CO=cost_CO, most_bytes=9, loss_CO=np.array([[3.0, 2.0]]), most_loss=1.0)
    assert solve_cpsat_knapsack(lossy, time_limit_s=5).status == "infeasible"
    with pytest.raises(UsageError, match="class without options"):
        Knapsack(bytes_CO=np.array([[-1, -1]]), cost_CO=cost_CO, most_bytes=4)
    with pytest.raises(UsageError, match="without a loss_CO"):
        Knapsack(bytes_CO=bytes_CO, cost_CO=cost_CO, most_bytes=4, most_loss=1.0)
