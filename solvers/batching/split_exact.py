"""ExpertFlow's split of two batches by CP-SAT: the optimum of small ones, and a bound for larger ones.

Legend: T tokens of both batches, X (site, expert), W words.
"""

import math
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from ortools.sat.python import cp_model

from placer.core.errors import SolverError, UsageError
from placer.core.plan import relative_gap
from solvers.batching.routes import Words
from solvers.batching.split import split_cost, split_tokens
from solvers.exact.isolate import IsolationTimeoutError, run_isolated

__all__ = ["SplitResult", "solve_split"]

BoolArray = npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SplitResult:
    """A split (which tokens go to the second batch), the experts it touches, and what no split can go below."""

    second_T: BoolArray
    objective: int
    bound: int
    seconds: float

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective."""
        return relative_gap(float(self.objective), float(self.bound))


def solve_split(
    route_TW: Words,
    *,
    time_limit_s: float,
    given_T: BoolArray | None = None,
    seed: int = 0,
    workers: int = 1,
) -> SplitResult:
    """The split that touches the fewest experts, or the best found in the time, with the bound that was proved.

    Parameters as in `split_tokens`, whose answer is the hint and is returned where CP-SAT has found nothing better.
    A back end that is killed for time leaves the heuristic's split and the plain bound (an expert that is used at all
    is touched once; twice where more tokens use it than a batch holds). Raises UsageError for a bad limit or `given_T`,
    SolverError for a back end that fails.

    Notes
    -----
    Complexity: T + 2 X' booleans and T X / X' implications an expert, with equal columns merged into X'; NP-hard.
    Guarantee: bound <= optimum <= objective, objective <= the given split's.
    """
    if not math.isfinite(time_limit_s) or time_limit_s <= 0 or workers < 1:
        raise UsageError(f"time_limit_s is {time_limit_s!r} and workers {workers}; give a positive time and 1 or more")
    started = time.perf_counter()
    tokens = len(route_TW)
    if given_T is None:
        given_T = np.arange(tokens) >= (tokens + 1) // 2
    best_T = split_tokens(route_TW, np.random.default_rng(seed), given_T=given_T)
    best, size = split_cost(route_TW, best_T), int(given_T.sum())
    bit_TX = np.unpackbits(np.ascontiguousarray(route_TW).view(np.uint8), axis=1).astype(np.bool_)
    column_XT, weight_X = np.unique(bit_TX[:, bit_TX.any(axis=0)].T, axis=0, return_counts=True)
    used_X = column_XT.sum(axis=1)
    bound = int(weight_X @ (1 + (used_X > max(size, tokens - size)))) if len(weight_X) else 0
    if bound < best:
        try:
            found, proved = run_isolated(
                search_split,
                (column_XT, weight_X, size, best_T, time_limit_s, seed, workers),
                time_limit_s=time_limit_s,
            )
        except IsolationTimeoutError:
            found, proved = None, bound
        if found is not None and (cost := split_cost(route_TW, found)) < best:
            best_T, best = found, cost
        bound = max(bound, min(best, proved))
    return SplitResult(second_T=best_T, objective=best, bound=bound, seconds=time.perf_counter() - started)


def search_split(
    column_XT: BoolArray,
    weight_X: npt.NDArray[np.int64],
    size: int,
    hint_T: BoolArray,
    time_limit_s: float,
    seed: int,
    workers: int,
) -> tuple[BoolArray | None, int]:
    """CP-SAT's split (None: none found) and bound; runs in a process of its own. Raises SolverError."""
    model = cp_model.CpModel()
    tokens = column_XT.shape[1]
    second = [model.new_bool_var(f"second_{token}") for token in range(tokens)]
    model.add(sum(second) == size)
    if 2 * size == tokens:
        # the two batches may change names
        model.add(second[0] == int(hint_T[0]))
    touched = []
    for row, column_T in enumerate(column_XT):
        users = np.flatnonzero(column_T).tolist()
        one, two = model.new_bool_var(f"first_touches_{row}"), model.new_bool_var(f"second_touches_{row}")
        for token in users:
            model.add_implication(second[token], two)
            model.add_implication(second[token].negated(), one)
        model.add_bool_or([one, two])
        touched += [int(weight_X[row]) * one, int(weight_X[row]) * two]
    model.minimize(sum(touched))
    for token in range(tokens):
        model.add_hint(second[token], int(hint_T[token]))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.random_seed = seed % 2**31
    solver.parameters.num_workers = workers
    status = solver.solve(model)
    if status in (cp_model.MODEL_INVALID, cp_model.INFEASIBLE):
        raise SolverError(f"solve_split: CP-SAT says {solver.status_name(status)} of a split that exists")
    found = None
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found = np.array([bool(solver.value(variable)) for variable in second])
    return found, max(0, math.ceil(solver.best_objective_bound - 1e-6))
