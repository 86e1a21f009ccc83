"""A bound on the iteration time with any cache: every reuse of a plane costs memory for as long as the plane waits.

A plane that is in memory at one use without being read has been kept since its use before, or for good. All planes
kept at a moment fit into the memory, so the reads saved are a fractional knapsack over uses, of weight bytes times gap,
in memory times iterations. Residency is the special case that keeps all gaps of a plane, Belady's cache another.

Legend: L routing sites, B iterations, E experts, K planes, U uses of a plane.
"""

import numpy as np
import numpy.typing as npt

from solvers.bits.options import LevelOptions

__all__ = ["any_cache_bound_ns"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

STEPS = 40
SAFETY = 1e-9


def any_cache_bound_ns(
    options: LevelOptions, plane_bytes_K: tuple[int, ...], *, memory_bytes: int, start_LB: FloatArray
) -> float:
    """Mean nanoseconds of an iteration that no residency, cache, order and buffer beat, without prefetch.

    For options with a single ceiling, replayed from an empty cache. start_LB: shares of the disk as in
    `shadow`, where the ascent begins. Complexity: O(steps U log U). Guarantee: holds whatever the steps.
    """
    assert len(options.need_MLBX) == 1
    sites, iterations, experts = options.shape_LBE
    levels = options.loads_OK.shape[1]
    need_LXB = options.need_MLBX[0].transpose(0, 2, 1) > 0
    site_U, plane_U, iteration_U = np.nonzero(need_LXB)
    gap_U = _gaps(site_U * (experts * levels) + plane_U, iteration_U, iterations)
    weight_U = gap_U * np.asarray(plane_bytes_K, dtype=np.int64)[plane_U % levels]
    input_U = options.input_ns_K[plane_U % levels] * options.tail_LB[site_U, iteration_U]
    room = memory_bytes * iterations
    compute_LB = options.compute_MLBE[0].sum(axis=-1)
    at_U = site_U * iterations + iteration_U
    share_LB, best, best_share_LB, target, theta, waited = start_LB, -np.inf, start_LB, np.inf, 1.0, 0
    for _ in range(STEPS):
        value_U = share_LB.reshape(-1)[at_U] * input_U
        order = np.argsort(-value_U / weight_U, kind="stable")
        free_U = np.zeros(len(at_U))
        kept = np.clip((room - (np.cumsum(weight_U[order]) - weight_U[order])) / weight_U[order], 0.0, 1.0)
        free_U[order] = kept
        input_LB = np.bincount(at_U, weights=input_U * (1 - free_U), minlength=sites * iterations)
        input_LB = input_LB.reshape(sites, iterations)
        value = float(((1 - share_LB) * compute_LB + share_LB * input_LB).sum())
        target = min(target, float(np.maximum(compute_LB, input_LB).sum()))
        waited = 0 if value > best * (1 + 1e-6) or not np.isfinite(best) else waited + 1
        if value > best:
            best, best_share_LB = value, share_LB
        if waited > 5:
            theta, waited, share_LB = theta / 2, 0, best_share_LB
        slope_LB = input_LB - compute_LB
        slope_LB[((share_LB <= 0) & (slope_LB < 0)) | ((share_LB >= 1) & (slope_LB > 0))] = 0
        norm = float((slope_LB**2).sum())
        if norm == 0 or target - best <= SAFETY * abs(target):
            break
        share_LB = np.clip(share_LB + theta * max(target - value, 0.0) / norm * slope_LB, 0.0, 1.0)
    return options.outside_ns + best * (1 - SAFETY) / max(1, iterations)


def _gaps(group_U: IntArray, iteration_U: IntArray, iterations: int) -> IntArray:
    """Iterations since the same plane's use before, uses sorted by plane; the first closes the circle with its last."""
    if not len(group_U):
        return np.zeros(0, dtype=np.int64)
    first_U = np.r_[True, group_U[1:] != group_U[:-1]]
    gap_U = np.diff(iteration_U, prepend=0)
    starts = np.flatnonzero(first_U)
    ends = np.r_[starts[1:], len(group_U)] - 1
    gap_U[starts] = iteration_U[starts] + iterations - iteration_U[ends]
    return gap_U
