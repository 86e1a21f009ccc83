"""Bound on PAR: arguments about single experts, recomputed from the loads, so the certificate carries no data.

For one layer with rank loads that add up to `total` on R ranks, S slots each, `spare` = R S - E redundant slots:

    mean       some rank carries at least total / R
    heaviest   an expert lies on at most min(R, spare + 1) distinct ranks, so one of them carries at least that share
    company    without spare slots the heaviest expert's rank also holds S - 1 others, at least the S - 1 lightest
    pigeonhole without spare slots two of the R + 1 heaviest share a rank, with at least the S - 2 lightest of all

Legend: L layers, E experts, R ranks.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from placer.core.problem import PlacementProblem

__all__ = ["least_par", "par_bound"]


def par_bound(
    problem: PlacementProblem, arrays: Mapping[str, npt.NDArray[np.float64]], numbers: Mapping[str, float]
) -> float:
    """Least mean over layers of max / mean rank load that any placement with equal shares can have."""
    if problem.cluster.speed_R is not None:
        raise UsageError("the bound on PAR is for ranks of equal speed; the cluster has rank_speed")
    if problem.allow_empty_slots:
        raise UsageError("the bound on PAR is for equal slots per rank; this problem allows empty ones")
    ranks, spare = problem.cluster.num_ranks, problem.redundant
    load_LE = problem.profile.load_LE.astype(np.float64)
    return float(np.mean([least_par(load_E, ranks, problem.slots_per_rank, spare) for load_E in load_LE]))


def least_par(load_E: npt.NDArray[np.float64], ranks: int, per_rank: int, spare: int) -> float:
    """Max / mean rank load that one layer has at least, by the four arguments; 1 where nothing is loaded."""
    total = load_E.sum()
    if total == 0:
        return 1.0
    rising = np.sort(load_E)
    peak = max(total / ranks, rising[-1] / min(ranks, spare + 1))
    if spare == 0:
        peak = max(peak, rising[-1] + rising[: per_rank - 1].sum())
        if len(rising) > ranks:
            pair = rising[-ranks] + rising[-ranks - 1]
            peak = max(peak, pair + rising[: max(0, per_rank - 2)].sum())
    return float(peak * ranks / total)
