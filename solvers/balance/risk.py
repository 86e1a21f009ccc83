"""Load balance under drift: the busiest rank by mean load plus z standard deviations over the profile's windows.

    minimise, in each layer, max_r (mean_r + z * std_r),   mean_r and std_r of rank r's load over windows

The deviation is that of the rank's sum, from the covariances of its experts: two experts busy in different windows
belong together. With equal shares a replica of expert e carries load_e / n_e in every window.

Legend: L layers, W windows, E experts, P slots, R ranks, C slots per rank.
"""

import math
import time

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.errors import UsageError
from placer.core.plan import canonical_slots
from placer.core.problem import PlacementProblem
from solvers.balance.load import par_bound, rank_load_LR
from solvers.balance.lpt import lpt_slots
from solvers.result import SolveResult

__all__ = ["risk_LR", "solve_risk"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

GAIN = 1e-12
"""Relative fall of the peak below which a swap is rounding, not progress."""


def solve_risk(problem: PlacementProblem, *, seed: int = 0, z: float = 1.0) -> SolveResult:
    """The best of two swap descents on the risk: from LPT on mean loads, and from LPT on mean + z std of each expert.

    Objective "risk_par": mean over layers of max_r (mean_r + z std_r) / mean rank load. Its bound is the load bound on
    PAR, since no deviation is negative; it ignores the deviations, so the gap it leaves overstates what can be gained.
    With z = 0 the objective is PAR and never above solve_lpt's for the same seed.

    Guarantee: no swap of two slots lowers the busiest rank's risk; replicas on distinct ranks. Deterministic.
    Complexity: O(L (W E^2 + swaps (P C + R E))). Raises UsageError for a z that is negative or not finite.
    Reference: vllm-ascend's FlashLB scores packs by mean + z std; its search over replica counts is not copied.
    """
    if not (math.isfinite(z) and z >= 0):
        raise UsageError(f"z is {z!r}; give standard deviations, 0 or more")
    started = time.perf_counter()
    profile, ranks = problem.profile, problem.cluster.num_ranks
    load_WLE = profile.load_WLE.astype(np.float64)
    careful_LE = load_WLE.mean(axis=0) + z * load_WLE.std(axis=0)
    starts = [lpt_slots(load_LE, problem.num_slots, ranks, seed=seed) for load_LE in (profile.load_LE, careful_LE)]
    rows = []
    for layer in range(profile.model.num_sites):
        mean_E = load_WLE[:, layer].mean(axis=0)
        apart_WE = load_WLE[:, layer] - mean_E
        cov_EE = apart_WE.T @ apart_WE / len(apart_WE)
        found = [_descend(start_LP[layer].reshape(ranks, -1).copy(), mean_E, cov_EE, float(z)) for start_LP in starts]
        rows.append(min(found, key=lambda pair: pair[1])[0].reshape(-1))
    slots_LP = canonical_slots(np.stack(rows), ranks)
    objective = _risk_par(load_WLE, slots_LP, ranks, z)
    bound = min(par_bound(problem), objective)
    return SolveResult(
        solver="risk",
        status="solved",
        stopped_by="optimal" if objective <= bound * (1 + GAIN) else "effort",
        slot_expert_LP=slots_LP,
        objective_name="risk_par",
        objective=objective,
        bound=bound,
        bound_by="load: mean, heaviest, company",
        seconds=time.perf_counter() - started,
        message=f"mean + {z:g} std over {len(load_WLE)} windows",
    )


def risk_LR(load_WLE: npt.NDArray[np.number], slot_expert_LP: IntArray, num_ranks: int, z: float) -> FloatArray:
    """Mean + z standard deviations over windows of each rank's load, replicas sharing equally, (L, R)."""
    load_WLR = np.stack([rank_load_LR(load_LE, slot_expert_LP, num_ranks) for load_LE in load_WLE])
    result: FloatArray = load_WLR.mean(axis=0) + z * load_WLR.std(axis=0)
    return result


def _risk_par(load_WLE: FloatArray, slot_expert_LP: IntArray, num_ranks: int, z: float) -> float:
    peak_L = risk_LR(load_WLE, slot_expert_LP, num_ranks, z).max(axis=1)
    mean_L = load_WLE.mean(axis=0).sum(axis=1) / num_ranks
    return float(np.where(mean_L > 0, peak_L / np.where(mean_L > 0, mean_L, 1.0), 1.0).mean())


@njit(cache=True)
def _holds(held_RC: IntArray, rank: int, expert: int) -> bool:  # pragma: no cover - compiled
    found = False
    for held in held_RC[rank]:
        found = found or held == expert
    return found


@njit(cache=True)
def _descend(
    held_RC: IntArray, mean_E: FloatArray, cov_EE: FloatArray, z: float
) -> tuple[IntArray, float]:  # pragma: no cover - compiled
    """Best swap with the rank of the largest risk until none lowers the pair's larger risk; the ranks and that risk."""
    ranks, width = held_RC.shape
    experts = len(mean_E)
    count_E = np.zeros(experts)
    for rank in range(ranks):
        for position in range(width):
            count_E[held_RC[rank, position]] += 1
    share_E = mean_E / count_E
    cov = cov_EE.copy()
    for one in range(experts):
        for two in range(experts):
            cov[one, two] /= count_E[one] * count_E[two]
    mean_R, var_R = np.zeros(ranks), np.zeros(ranks)
    # with_RE: covariance of a rank's load with one replica of an expert
    with_RE = np.zeros((ranks, experts))
    for rank in range(ranks):
        for position in range(width):
            mean_R[rank] += share_E[held_RC[rank, position]]
            with_RE[rank] += cov[held_RC[rank, position]]
        for position in range(width):
            var_R[rank] += with_RE[rank, held_RC[rank, position]]
    risk_R = mean_R + z * np.sqrt(np.maximum(0.0, var_R))
    for _ in range(40 * ranks * width):
        top = int(np.argmax(risk_R))
        best = risk_R[top] * (1 - GAIN)
        best_mine, best_rank, best_other = -1, -1, -1
        for mine in range(width):
            out = held_RC[top, mine]
            for rank in range(ranks):
                if rank == top or _holds(held_RC, rank, out):
                    continue
                for other in range(width):
                    back = held_RC[rank, other]
                    shift = share_E[back] - share_E[out]
                    both = cov[out, out] + cov[back, back] - 2 * cov[out, back]
                    here_var = var_R[top] + both + 2 * (with_RE[top, back] - with_RE[top, out])
                    there_var = var_R[rank] + both + 2 * (with_RE[rank, out] - with_RE[rank, back])
                    here = mean_R[top] + shift + z * np.sqrt(max(0.0, here_var))
                    there = mean_R[rank] - shift + z * np.sqrt(max(0.0, there_var))
                    if max(here, there) < best and not _holds(held_RC, top, back):
                        best = max(here, there)
                        best_mine, best_rank, best_other = mine, rank, other
        if best_mine < 0:
            break
        out, back = held_RC[top, best_mine], held_RC[best_rank, best_other]
        held_RC[top, best_mine], held_RC[best_rank, best_other] = back, out
        mean_R[top] += share_E[back] - share_E[out]
        mean_R[best_rank] += share_E[out] - share_E[back]
        with_RE[top] += cov[back] - cov[out]
        with_RE[best_rank] += cov[out] - cov[back]
        for rank in (top, best_rank):
            var_R[rank] = 0.0
            for position in range(width):
                var_R[rank] += with_RE[rank, held_RC[rank, position]]
            risk_R[rank] = mean_R[rank] + z * np.sqrt(max(0.0, var_R[rank]))
    return held_RC, float(risk_R.max())
