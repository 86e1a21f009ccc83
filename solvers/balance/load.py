"""Rank load of a placement, and lower bounds on the busiest rank that need no solver.

Legend: L layers, E experts, P slots, R ranks, C slots per rank.
"""

import numpy as np
import numpy.typing as npt

from placer.core.evaluate import par
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


def mean_par(load_LR: FloatArray, speed_R: FloatArray | None = None) -> float:
    """Max / mean rank load (load / speed, where given), mean over layers; a layer without load counts 1."""
    return float(par(load_LR, speed_R).mean())


def max_load_bound(
    load_E: npt.NDArray[np.integer],
    num_ranks: int,
    slots_per_rank: int,
    speed_R: FloatArray | None = None,
    *,
    uneven: bool = False,
) -> float:
    """A load (over the mean speed: a time) that some rank must carry in any placement of one layer with equal shares.

    The largest of three arguments. Mean: the loads add up to the total. Heaviest: an expert on n ranks puts at least
    load / n on one of them, and n is at most min(R, redundant + 1). Company: without redundancy the heaviest expert's
    rank also holds at least the C - 1 lightest experts (not where ranks may hold fewer: `uneven`).
    With speeds the loads add up over the sum of speeds, the heaviest expert is on the fastest ranks in proportion to
    their speeds, and company is on the fastest rank. Complexity O(E log E).
    """
    experts = len(load_E)
    if speed_R is not None or uneven:
        return _unlike_bound(load_E, num_ranks, slots_per_rank, speed_R, uneven)
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


def _unlike_bound(
    load_E: npt.NDArray[np.integer], num_ranks: int, slots_per_rank: int, speed_R: FloatArray | None, uneven: bool
) -> float:
    experts = len(load_E)
    fast_R = np.ones(num_ranks) if speed_R is None else np.sort(speed_R / speed_R.mean())[::-1]
    ordered = np.sort(load_E)[::-1].astype(np.float64)
    redundant = 0 if uneven else num_ranks * slots_per_rank - experts
    least = [float(ordered.sum()) / num_ranks, float(ordered[0]) / float(fast_R[: min(num_ranks, redundant + 1)].sum())]
    if redundant == 0:
        others = 0 if uneven else slots_per_rank - 1
        least.append(float(ordered[0] + ordered[experts - others :].sum()) / fast_R[0])
        if experts > num_ranks:
            rest = float(ordered[experts - max(0, others - 1) :].sum())
            least.append(float(ordered[num_ranks - 1] + ordered[num_ranks] + rest) / fast_R[0])
    return max(least)


def par_bound(problem: PlacementProblem) -> float:
    """No placement with equal shares has a smaller mean over layers of max / mean rank load (or load / speed)."""
    ranks, width, speed_R = problem.cluster.num_ranks, problem.slots_per_rank, problem.cluster.speed_R
    ratios = []
    for load_E in problem.profile.load_LE:
        mean = load_E.sum() / ranks
        ratios.append(max_load_bound(load_E, ranks, width, speed_R, uneven=problem.uneven) / mean if mean > 0 else 1.0)
    return float(np.mean(ratios))


def load_result(
    problem: PlacementProblem,
    solver: str,
    slot_expert_LP: npt.NDArray[np.int64],
    stopped_by: StoppedBy,
    seconds: float = 0.0,
) -> SolveResult:
    """A SolveResult whose objective is PAR (mean over layers) with the load bound beside it."""
    cluster = problem.cluster
    objective = mean_par(rank_load_LR(problem.profile.load_LE, slot_expert_LP, cluster.num_ranks), cluster.speed_R)
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
