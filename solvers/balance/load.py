"""Rank load of a placement, and lower bounds on the busiest rank that need no solver.

Legend: L layers, E experts, P slots, R ranks, C slots per rank.
"""

import numpy as np
import numpy.typing as npt

from placer.core.problem import PlacementProblem
from solvers.result import SolveResult, StoppedBy

__all__ = ["load_result", "max_load_bound", "mean_par", "par_bound", "rank_load_LR"]

FloatArray = npt.NDArray[np.float64]


def rank_load_LR(load_LE: npt.NDArray[np.number], slot_expert_LP: npt.NDArray[np.int64], num_ranks: int) -> FloatArray:
    """Expected load of each rank when the replicas of an expert share its tokens equally, (L, R)."""
    layers, experts = load_LE.shape
    rows = np.arange(layers)[:, None]
    used = slot_expert_LP >= 0
    count_LE = np.zeros((layers, experts), dtype=np.int64)
    np.add.at(count_LE, (np.broadcast_to(rows, used.shape)[used], slot_expert_LP[used]), 1)
    load_LP = np.where(used, load_LE[rows, slot_expert_LP] / np.maximum(1, count_LE[rows, slot_expert_LP]), 0.0)
    result: FloatArray = load_LP.reshape(layers, num_ranks, -1).sum(axis=2)
    return result


def mean_par(load_LR: FloatArray) -> float:
    """Max / mean rank load, mean over layers; a layer without load counts 1."""
    mean = load_LR.mean(axis=1)
    return float(np.where(mean > 0, load_LR.max(axis=1) / np.where(mean > 0, mean, 1), 1.0).mean())


def max_load_bound(load_E: npt.NDArray[np.integer], num_ranks: int, slots_per_rank: int) -> float:
    """A load that some rank must carry in any placement of one layer with equal shares.

    The largest of three arguments. Mean: the loads add up to the total. Heaviest: an expert on n ranks puts at least
    load / n on one of them, and n is at most min(R, redundant + 1). Company: without redundancy the heaviest expert's
    rank also holds at least the C - 1 lightest experts. Complexity O(E log E).
    """
    experts = len(load_E)
    redundant = num_ranks * slots_per_rank - experts
    ordered = np.sort(load_E)[::-1].astype(np.float64)
    mean = float(ordered.sum()) / num_ranks
    heaviest = float(ordered[0]) / min(num_ranks, redundant + 1)
    company = float(ordered[0] + ordered[experts - (slots_per_rank - 1) :].sum()) if redundant == 0 else 0.0
    if redundant == 0 and experts > num_ranks:
        # two of the R + 1 heaviest experts share a rank (pigeonhole), at least the two lightest of them,
        # together with at least the C - 2 lightest of all
        rest = float(ordered[experts - (slots_per_rank - 2) :].sum()) if slots_per_rank > 2 else 0.0
        company = max(company, float(ordered[num_ranks - 1] + ordered[num_ranks]) + rest)
    return max(mean, heaviest, company)


def par_bound(problem: PlacementProblem) -> float:
    """No placement with equal shares has a smaller mean over layers of max / mean rank load."""
    ranks, width = problem.cluster.num_ranks, problem.slots_per_rank
    ratios = []
    for load_E in problem.profile.load_LE:
        mean = load_E.sum() / ranks
        ratios.append(max_load_bound(load_E, ranks, width) / mean if mean > 0 else 1.0)
    return float(np.mean(ratios))


def load_result(
    problem: PlacementProblem,
    solver: str,
    slot_expert_LP: npt.NDArray[np.int64],
    stopped_by: StoppedBy,
    seconds: float = 0.0,
) -> SolveResult:
    """A SolveResult whose objective is PAR (mean over layers) with the load bound beside it."""
    objective = mean_par(rank_load_LR(problem.profile.load_LE, slot_expert_LP, problem.cluster.num_ranks))
    bound = min(par_bound(problem), objective)
    proven = objective <= bound * (1 + 1e-12)
    return SolveResult(
        solver=solver,
        status="solved",
        stopped_by="optimal" if proven else stopped_by,
        slot_expert_LP=slot_expert_LP,
        objective_name="par",
        objective=objective,
        bound=bound,
        bound_by="load: mean, heaviest, company",
        seconds=seconds,
    )
