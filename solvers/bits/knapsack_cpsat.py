"""The multiple-choice knapsack in CP-SAT, in a process of its own: both limits in one model, from the greedy answer.

Legend: C classes, O options.
"""

import math
import time
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import SolverError, UsageError
from solvers.bits.knapsack import Knapsack, KnapsackResult, solve_greedy
from solvers.exact.isolate import IsolationTimeoutError, run_isolated

__all__ = ["search_knapsack", "solve_cpsat_knapsack"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

COST_SCALE, LOSS_SCALE = 2**40, 2**40
TOLERANCE = 1e-9


def solve_cpsat_knapsack(problem: Knapsack, *, time_limit_s: float, seed: int = 0, workers: int = 1) -> KnapsackResult:
    """The cheapest options within both limits, and the larger of CP-SAT's bound and the linear relaxation's.

    Costs that are whole numbers are taken as they are, others rounded to 2^-40 of the sum of the largest; losses are
    rounded up, so an answer always keeps the limit (then CP-SAT's own bound holds for rounded losses only and the
    relaxation's is given). Guarantee: never worse than `solve_greedy`'s answer, bound <= optimum <= objective.
    Raises UsageError for a limit that is no positive number. Complexity: C O booleans, C + 2 rows; NP-hard.
    """
    if workers < 1:
        raise UsageError(f"workers is {workers}; give 1 or more")
    started = time.perf_counter()
    first = solve_greedy(problem)
    if first.status == "infeasible":
        return _renamed(first, started)
    try:
        answer = run_isolated(
            search_knapsack, (problem, first.choice_C, time_limit_s, seed, workers), time_limit_s=time_limit_s
        )
    except IsolationTimeoutError as error:
        return _renamed(first, started, str(error), "time_limit")
    except SolverError as error:
        return _renamed(first, started, str(error), "error")
    state, choice_C, cpsat_bound = answer
    if state == "infeasible" and first.choice_C is None:
        return KnapsackResult(
            solver="cpsat",
            status="infeasible",
            stopped_by="infeasible",
            seconds=time.perf_counter() - started,
            message="no options keep both limits; raise the budget or the loss limit",
        )
    if choice_C is None and first.choice_C is None:
        return _renamed(first, started, f"cpsat: {state}", "time_limit")
    choices = [one for one in (choice_C, first.choice_C) if one is not None]
    best_C = min(choices, key=lambda one: problem.total(problem.cost_CO, one))
    objective = problem.total(problem.cost_CO, best_C)
    bound, bound_by = first.bound, first.bound_by
    if cpsat_bound is not None and (bound is None or cpsat_bound > bound):
        bound, bound_by = cpsat_bound, "cpsat"
    assert bound is not None
    proven = state == "optimal" or objective - bound <= TOLERANCE * max(1.0, abs(objective))
    return KnapsackResult(
        solver="cpsat",
        status="solved",
        stopped_by="optimal" if proven else "time_limit",
        choice_C=best_C,
        objective=objective,
        bound=min(bound, objective),
        bound_by=bound_by,
        seconds=time.perf_counter() - started,
    )


def _renamed(first: KnapsackResult, started: float, message: str = "", stopped_by: Any = None) -> KnapsackResult:
    return KnapsackResult(
        solver="cpsat",
        status=first.status,
        stopped_by=stopped_by or first.stopped_by,
        choice_C=first.choice_C,
        objective=first.objective,
        bound=first.bound,
        bound_by=first.bound_by,
        seconds=time.perf_counter() - started,
        message=message or first.message,
    )


def search_knapsack(
    problem: Knapsack, hint_C: IntArray | None, time_limit_s: float, seed: int, workers: int
) -> tuple[str, IntArray | None, float | None]:
    """One CP-SAT run: optimal, feasible, infeasible or unknown; the options; a lower bound (None where none holds)."""
    from ortools.sat.python import cp_model

    exists_CO = problem.bytes_CO >= 0
    cost_CO, shift_C, scale = _whole_costs(problem)
    model: Any = cp_model.CpModel()
    rows, options = np.nonzero(exists_CO)
    takes = [model.new_bool_var("") for _ in rows]
    edges = np.searchsorted(rows, np.arange(len(exists_CO) + 1))
    for low, high in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True):
        model.add_exactly_one(takes[low:high])

    def linear(table_CO: IntArray) -> Any:
        return cp_model.LinearExpr.weighted_sum(takes, table_CO[rows, options].tolist())

    model.add(linear(problem.bytes_CO) <= problem.most_bytes)
    exact = True
    if problem.most_loss is not None and problem.loss_CO is not None:
        loss_CO, most_loss, exact = _whole_losses(problem)
        model.add(linear(loss_CO) <= most_loss)
    model.minimize(linear(cost_CO))
    if hint_C is not None:
        for take, row, option in zip(takes, rows.tolist(), options.tolist(), strict=True):
            model.add_hint(take, int(hint_C[row] == option))
    solver: Any = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.random_seed = seed
    solver.parameters.num_workers = workers
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return ("infeasible" if exact else "unknown"), None, None
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return "unknown", None, None
    taken = np.array([solver.boolean_value(take) for take in takes])
    choice_C = np.zeros(len(exists_CO), dtype=np.int64)
    choice_C[rows[taken]] = options[taken]
    bound = None
    if exact:
        bound = float(math.ceil(solver.best_objective_bound - 1e-6)) / scale + float(shift_C.sum())
    return ("optimal" if status == cp_model.OPTIMAL and exact else "feasible"), choice_C, bound


def _whole_costs(problem: Knapsack) -> tuple[IntArray, FloatArray, float]:
    """Costs above each class's least, rounded down to whole numbers; what was taken off; and their scale."""
    exists_CO = problem.bytes_CO >= 0
    shift_C = np.where(exists_CO, problem.cost_CO, np.inf).min(axis=1)
    above_CO = np.where(exists_CO, problem.cost_CO - shift_C[:, None], 0.0)
    most = float(above_CO.max(axis=1).sum())
    whole = bool((above_CO == np.floor(above_CO)).all()) and most < COST_SCALE
    scale = 1.0 if whole or most == 0 else COST_SCALE / most
    return np.floor(above_CO * scale).astype(np.int64), shift_C, scale


def _whole_losses(problem: Knapsack) -> tuple[IntArray, int, bool]:
    """Losses above each class's least, rounded up; the limit rounded down; whether both were whole already."""
    assert problem.loss_CO is not None
    assert problem.most_loss is not None
    exists_CO = problem.bytes_CO >= 0
    least_C = np.where(exists_CO, problem.loss_CO, np.inf).min(axis=1)
    above_CO = np.where(exists_CO, problem.loss_CO - least_C[:, None], 0.0)
    most = float(above_CO.max(axis=1).sum())
    room = problem.most_loss - float(least_C.sum())
    if most < LOSS_SCALE and (above_CO == np.floor(above_CO)).all():
        return above_CO.astype(np.int64), math.floor(min(room, most) + TOLERANCE), True
    scale = LOSS_SCALE / most if most else 1.0
    return np.ceil(above_CO * scale).astype(np.int64), math.floor(min(room, most) * scale), False
