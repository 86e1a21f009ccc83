"""Set partitioning of one layer: every block of C experts that a rank could hold is a column, its visits the cost.

    min sum_z visit(z) x_z    with every expert in exactly one chosen block; x_z = 0 where the load of z is above t

The LP is solved by column generation over all blocks, so its bound is exact; it is within a few tenths of a per cent of
the integer optimum on real routing, and the blocks whose reduced cost is beyond the incumbent's gap can be left out.

Legend: E experts, R ranks, C slots per rank, Z blocks, H expert sets.
"""

from itertools import chain, combinations
from math import comb
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["MOST_EXPERTS", "Relaxation", "best_partition", "every_block", "relax", "visits"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

MOST_EXPERTS = 64
ROUNDS, NEW_COLUMNS = 400, 200
ARTIFICIAL = 64.0
MOST_EFFORT = 2.0
"""CP-SAT's own measure, about seconds: what is not proven by then is rarely proven in ten times as much."""
TOLERANCE = 1e-9
SCALE = 10**7


class Relaxation(NamedTuple):
    """LP of one layer under one threshold: bound, the prices pi_E that prove it, reduced cost of every block."""

    bound: float
    price_E: FloatArray
    reduced_Z: FloatArray


def every_block(experts: int, width: int) -> IntArray:
    """All blocks of `width` experts, (Z, C), lexicographic."""
    flat = np.fromiter(chain.from_iterable(combinations(range(experts), width)), dtype=np.int64)
    return flat.reshape(comb(experts, width), width)


@njit(cache=True)
def _visits(block_Z: npt.NDArray[np.uint64], set_H: npt.NDArray[np.uint64], weight_H: FloatArray) -> FloatArray:
    visit_Z = np.zeros(len(block_Z))
    for z in range(len(block_Z)):
        total = 0.0
        for h in range(len(set_H)):
            if block_Z[z] & set_H[h]:
                total += weight_H[h]
        visit_Z[z] = total
    return visit_Z


def visits(block_ZC: IntArray, expert_HK: npt.NDArray[np.int16], weight_H: npt.NDArray[np.int64]) -> FloatArray:
    """Share of the sets' tokens that visit each block, (Z,). At most 64 experts: sets are bits of one word."""
    share_H = weight_H / max(1, int(weight_H.sum()))
    return _visits(_words(block_ZC), _words(expert_HK.astype(np.int64)), share_H)


def _words(expert_NK: IntArray) -> npt.NDArray[np.uint64]:
    bits = np.where(expert_NK >= 0, np.uint64(1) << np.maximum(expert_NK, 0).astype(np.uint64), np.uint64(0))
    words: npt.NDArray[np.uint64] = np.bitwise_or.reduce(bits, axis=1)
    return words


def relax(cost_Z: FloatArray, block_ZC: IntArray, experts: int) -> Relaxation:
    """LP over the blocks with finite cost. Where they cannot cover the experts the bound is large, not infinite."""
    from ortools.linear_solver import pywraplp

    ranks = experts // block_ZC.shape[1]
    solver = pywraplp.Solver.CreateSolver("GLOP")
    cover = [solver.Constraint(1, 1) for _ in range(experts)]
    objective = solver.Objective()
    objective.SetMinimization()

    def add_column(rows: list[int], coefficient: float, cost: float) -> None:
        column = solver.NumVar(0, solver.infinity(), "")
        objective.SetCoefficient(column, cost)
        for row in rows:
            cover[row].SetCoefficient(column, coefficient)

    for expert in range(experts):
        add_column([expert], 1.0, ARTIFICIAL)
        add_column([expert], -1.0, ARTIFICIAL)
    given = np.zeros(len(cost_Z), dtype=bool)
    wanted = np.argsort(cost_Z, kind="stable")[:NEW_COLUMNS]
    price_E, reduced_Z = np.zeros(experts), cost_Z.copy()
    for _ in range(ROUNDS):
        for z in wanted[~given[wanted] & np.isfinite(cost_Z[wanted])].tolist():
            add_column(block_ZC[z].tolist(), 1.0, float(cost_Z[z]))
            given[z] = True
        if solver.Solve() != solver.OPTIMAL:
            break
        price_E = np.array([row.dual_value() for row in cover])
        reduced_Z = cost_Z - price_E[block_ZC].sum(axis=1)
        wanted = np.argpartition(reduced_Z, min(NEW_COLUMNS, len(reduced_Z) - 1))[:NEW_COLUMNS]
        wanted = wanted[(reduced_Z[wanted] < -TOLERANCE) & ~given[wanted]]
        if not len(wanted):
            break
    return Relaxation(float(price_E.sum() + ranks * min(0.0, float(reduced_Z.min()))), price_E, reduced_Z)


def best_partition(
    cost_Z: FloatArray, block_ZC: IntArray, experts: int, column_N: IntArray, time_limit_s: float, seed: int
) -> tuple[IntArray | None, bool]:
    """Cheapest choice of disjoint blocks among the columns given, (R, C), and whether it is proven the cheapest."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    chosen = [model.new_bool_var("") for _ in column_N]
    holds: list[list[cp_model.IntVar]] = [[] for _ in range(experts)]
    for variable, z in zip(chosen, column_N.tolist(), strict=True):
        for expert in block_ZC[z].tolist():
            holds[expert].append(variable)
    if not all(holds):
        return None, True
    for variables in holds:
        model.add_exactly_one(variables)
    model.minimize(sum(round(float(cost_Z[z]) * SCALE) * x for x, z in zip(chosen, column_N.tolist(), strict=True)))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    # the clock stops slow machines only: elsewhere the same seed gives the same answer
    solver.parameters.max_deterministic_time = MOST_EFFORT
    solver.parameters.num_workers = 1
    solver.parameters.random_seed = seed
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        return None, status == cp_model.INFEASIBLE
    picked = [z for variable, z in zip(chosen, column_N.tolist(), strict=True) if solver.boolean_value(variable)]
    return block_ZC[picked], status == cp_model.OPTIMAL
