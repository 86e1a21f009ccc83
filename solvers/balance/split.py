"""Shares of replicas for a given placement: tokens split over replicas so that the busiest rank is as light as can be.

    min M   s.t.  sum over the slots p of expert e of x_p = load_e,  sum over the slots of rank r of x_p <= M,  x >= 0

A placement lives for minutes, loads drift within seconds: the split is what can follow. Where the loads are the ones
the placement was made for there is little left to gain.

Legend: L layers, E experts, P slots, R ranks.
"""

import time

import numpy as np
import numpy.typing as npt
from ortools.linear_solver import pywraplp

from placer.core.errors import SolverError, UsageError
from placer.core.problem import PlacementProblem
from solvers.balance.eplb import eplb_slots
from solvers.balance.load import mean_par, par_bound
from solvers.result import SolveResult

__all__ = ["equal_shares", "shared_load_LR", "solve_lplb", "split_layers", "split_tokens"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def split_tokens(load_E: npt.NDArray[np.number], slot_expert_P: IntArray, num_ranks: int) -> FloatArray:
    """Share of its expert's tokens that each slot should get, (P,): adds up to 1 per expert, 0 in empty slots.

    Replicas may lie on one rank. An expert without load splits equally. Never a busier rank than equal shares give.

    Guarantee: the least possible busiest rank for this placement and these loads, to GLOP's tolerance (1e-7 of the
    mean rank load). Deterministic. Complexity: a linear program of one column per replica of a replicated expert and
    one row per such expert and rank. Raises UsageError for an expert with load but no slot or a load below 0.
    Reference: DeepSeek-AI, LPLB (2025); MicroMoE's token scheduling (arXiv 2511.16947) is the same program.
    """
    load = np.asarray(load_E, dtype=np.float64)
    bad_E = ~(np.isfinite(load) & (load >= 0))
    if bad_E.any():
        raise UsageError(f"load_E has {load[bad_E][0]}; give finite loads, 0 or more")
    used = slot_expert_P >= 0
    count_E = np.bincount(slot_expert_P[used], minlength=len(load))
    if len(count_E) > len(load):
        raise UsageError(f"slot_expert_P has expert {len(count_E) - 1}; load_E knows {len(load)}")
    if lost := np.flatnonzero((count_E == 0) & (load > 0)).tolist():
        raise UsageError(f"expert {lost[0]} has load and no slot; give a placement of every expert")
    equal_P = equal_shares(slot_expert_P)
    free_P = used & (count_E[slot_expert_P] > 1) & (load[slot_expert_P] > 0)
    mean = float(load.sum()) / num_ranks
    if not free_P.any():
        return equal_P
    rank_P = np.arange(len(slot_expert_P)) // (len(slot_expert_P) // num_ranks)
    fixed_P = np.where(used & ~free_P, equal_P * load[slot_expert_P], 0.0) / mean
    fixed_R: FloatArray = np.bincount(rank_P, weights=fixed_P, minlength=num_ranks).astype(np.float64)
    tokens_P = _program(load / mean, slot_expert_P, np.flatnonzero(free_P), rank_P, fixed_R)
    total_E = np.bincount(slot_expert_P[free_P], weights=tokens_P[free_P], minlength=len(load))
    share_P = equal_P.copy()
    share_P[free_P] = tokens_P[free_P] / total_E[slot_expert_P[free_P]]
    busiest = [shared_load_LR(load[None], slot_expert_P[None], s[None], num_ranks).max() for s in (share_P, equal_P)]
    return share_P if busiest[0] < busiest[1] else equal_P


def split_layers(load_LE: npt.NDArray[np.number], slot_expert_LP: IntArray, num_ranks: int) -> FloatArray:
    """replica_share_LP of a placement for the loads given, layer by layer, (L, P)."""
    rows = zip(load_LE, slot_expert_LP, strict=True)
    return np.stack([split_tokens(load_E, slot_expert_P, num_ranks) for load_E, slot_expert_P in rows])


def equal_shares(slot_expert_P: IntArray) -> FloatArray:
    """1 / replicas of its expert for every slot, 0 where the slot is empty, (P,)."""
    used = slot_expert_P >= 0
    count_E = np.bincount(slot_expert_P[used])
    share_P: FloatArray = np.where(used, 1.0 / np.maximum(1, count_E[slot_expert_P]), 0.0)
    return share_P


def shared_load_LR(
    load_LE: npt.NDArray[np.number], slot_expert_LP: IntArray, share_LP: FloatArray, num_ranks: int
) -> FloatArray:
    """Load of each rank when slots serve their shares, (L, R)."""
    load_LP = np.where(slot_expert_LP >= 0, np.take_along_axis(load_LE, slot_expert_LP, axis=1) * share_LP, 0.0)
    result: FloatArray = load_LP.reshape(len(load_LP), num_ranks, -1).sum(axis=2)
    return result


def solve_lplb(problem: PlacementProblem) -> SolveResult:
    """EPLB's placement with the linear program's shares on the profile's own loads.

    Objective "par": mean over layers of max / mean rank load when every slot serves its share. The program does so; of
    placer's replica choices visit_first does, for tokens that visit no replica's rank anyway. The load bound holds for
    any shares: an expert on n ranks puts at least load / n on one of them. Guarantee: never above EPLB's PAR.
    """
    started = time.perf_counter()
    load_LE, ranks = problem.profile.load_LE, problem.cluster.num_ranks
    slots_LP = eplb_slots(load_LE, problem.num_slots, ranks)
    share_LP = split_layers(load_LE, slots_LP, ranks)
    objective = mean_par(shared_load_LR(load_LE, slots_LP, share_LP, ranks))
    bound = min(par_bound(problem), objective)
    return SolveResult(
        solver="lplb",
        status="solved",
        stopped_by="optimal" if objective <= bound * (1 + 1e-12) else "effort",
        slot_expert_LP=slots_LP,
        replica_share_LP=share_LP,
        objective_name="par",
        objective=objective,
        bound=bound,
        bound_by="load: mean, heaviest, company",
        seconds=time.perf_counter() - started,
    )


def _program(
    load_E: FloatArray, slot_expert_P: IntArray, free: IntArray, rank_P: IntArray, fixed_R: FloatArray
) -> FloatArray:
    """Tokens of each free slot (0 elsewhere) that make the busiest rank lightest, (P,)."""
    solver = pywraplp.Solver.CreateSolver("GLOP")
    infinity = solver.infinity()
    peak = solver.NumVar(float(fixed_R.max()), infinity, "peak")
    rows_R = [solver.Constraint(-infinity, -float(fixed)) for fixed in fixed_R]
    for row in rows_R:
        row.SetCoefficient(peak, -1.0)
    rows_E = {int(e): solver.Constraint(float(load_E[e]), float(load_E[e])) for e in np.unique(slot_expert_P[free])}
    columns = []
    for slot in free.tolist():
        tokens = solver.NumVar(0.0, infinity, f"x{slot}")
        rows_R[int(rank_P[slot])].SetCoefficient(tokens, 1.0)
        rows_E[int(slot_expert_P[slot])].SetCoefficient(tokens, 1.0)
        columns.append(tokens)
    solver.Minimize(peak)
    status = solver.Solve()
    if status != pywraplp.Solver.OPTIMAL:
        raise SolverError(f"GLOP ended with status {status} on a linear program that always has an optimum")
    tokens_P = np.zeros(len(slot_expert_P))
    tokens_P[free] = [max(0.0, column.solution_value()) for column in columns]
    return tokens_P
