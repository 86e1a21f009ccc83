"""Bound on ranks touched by set partitioning: every way to fill one rank has a price, and the prices add up.

The tokens that visit a rank holding the block z of C experts are those with any expert in z, visit(z) of them in all. A
placement without replicas is R disjoint blocks, and its ranks touched are the sum of visit(z) / tokens over them. So if
expert prices pi satisfy

    sum of pi_e over z  <=  visit(z) / tokens       for every block z of C experts whose load is at most t

then every placement of the layer with PAR <= t touches at least sum_e pi_e ranks (weak duality of the set partitioning
LP). All blocks are looked at; one that breaks the inequality by d lowers the bound by R d instead of being believed.

A load cap is on the mean over layers, so it enters through a price per unit of PAR: with thresholds t_1 < ... < t_M and
a last step without any, a layer whose PAR lies between t_(m-1) and t_m costs at least bound(t_m) + price * t_(m-1).

    mean of touched  >=  mean over layers of min over m of (bound(t_m) + price * max(1, t_(m-1)))  -  price * cap

Arrays: block_price_LME (layers, steps, E), ranks touched per expert; block_threshold_LM (layers, steps - 1), ascending,
load of a block over the mean rank load. Numbers: price. Objective: ranks_touched.

Legend: L layers, M steps, E experts, R ranks, C slots per rank, Z blocks, H expert sets.
"""

from collections.abc import Iterator, Mapping
from itertools import combinations, islice
from math import comb
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.certificates.read import FloatArray, multiplier, number
from placer.core.errors import UsageError, ViolationError
from placer.core.problem import PlacementProblem

__all__ = ["MOST_BLOCKS", "blocks_bound"]

MOST_BLOCKS = 2_000_000
CHUNK = 2048
EXACT_IN_SINGLE = 1 << 24
ROUNDING = 1e-9


def blocks_bound(
    problem: PlacementProblem, arrays: Mapping[str, npt.NDArray[np.float64]], numbers: Mapping[str, float]
) -> float:
    """Least mean ranks touched that the prices prove. Cost O(L comb(E, C) H)."""
    profile, ranks, width = problem.profile, problem.cluster.num_ranks, problem.slots_per_rank
    layers, experts = profile.load_LE.shape
    if not profile.sets:
        raise UsageError("the profile has load counts only, no expert sets; a bound on ranks touched needs them")
    if problem.redundant or problem.allow_empty_slots:
        raise UsageError("the set partitioning bound is for equal slots per rank and no redundant ones")
    if problem.cluster.speed_R is not None and numbers.get("price", 0.0) > 0:
        raise UsageError("the certificate's price of PAR is for ranks of equal speed; the cluster has rank_speed")
    if comb(experts, width) > MOST_BLOCKS:
        raise UsageError(
            f"{comb(experts, width)} blocks of {width} of {experts} experts; at most {MOST_BLOCKS} are checked"
        )
    price_LME = arrays.get("block_price_LME")
    if price_LME is None or price_LME.ndim != 3 or price_LME.shape[::2] != (layers, experts):
        raise ViolationError(f"certificate array block_price_LME must be ({layers}, steps, {experts})")
    steps = price_LME.shape[1]
    threshold_LM = multiplier(arrays, "block_threshold_LM", (layers, steps - 1), sign=True)
    if (np.diff(threshold_LM, axis=1) < 0).any():
        raise ViolationError("certificate array block_threshold_LM must ascend")
    price = number(numbers, "price")
    if price > 0 and problem.max_par is None:
        raise ViolationError("certificate number price needs a load cap")
    load_LE = profile.load_LE.astype(np.float64)
    share_LE = load_LE * ranks / np.maximum(1.0, load_LE.sum(axis=1, keepdims=True))
    least_L = np.empty(layers)
    for layer, sets in enumerate(profile.sets):
        excess_M = np.zeros(steps)
        limit_M = np.append(threshold_LM[layer], np.inf)
        hit_HE, tokens = _members(sets.expert_HK, experts), max(1, int(sets.weight_H.sum()))
        # whole numbers below 2^24 add up exactly in single precision, twice as fast
        weight_H: npt.NDArray[Any] = sets.weight_H.astype(np.float32 if tokens < EXACT_IN_SINGLE else np.float64)
        for block_ZC in _blocks(experts, width):
            visit_Z = _visits(block_ZC, hit_HE, weight_H) / tokens
            load_Z = share_LE[layer][block_ZC].sum(axis=1)
            over_ZM = price_LME[layer].T[block_ZC].sum(axis=1) - visit_Z[:, None]
            over_ZM[load_Z[:, None] > limit_M[None, :] + ROUNDING] = 0.0
            np.maximum(excess_M, over_ZM.max(axis=0), out=excess_M)
        bound_M = price_LME[layer].sum(axis=1) - ranks * excess_M
        least_L[layer] = (bound_M + price * np.maximum(1.0, np.insert(threshold_LM[layer], 0, 1.0))).min()
    return float(least_L.mean()) - price * (problem.max_par or 0.0) - ROUNDING


def _blocks(experts: int, width: int) -> Iterator[npt.NDArray[np.int64]]:
    every = combinations(range(experts), width)
    while chunk := list(islice(every, CHUNK)):
        yield np.array(chunk, dtype=np.int64)


def _members(expert_HK: npt.NDArray[np.int16], experts: int) -> npt.NDArray[np.float32]:
    hit_HE = np.zeros((len(expert_HK), experts), dtype=np.float32)
    row, column = np.nonzero(expert_HK >= 0)
    hit_HE[row, expert_HK[row, column]] = 1.0
    return hit_HE


def _visits(block_ZC: npt.NDArray[np.int64], hit_HE: npt.NDArray[np.float32], weight_H: npt.NDArray[Any]) -> FloatArray:
    """Tokens with an expert in each block, (Z,)."""
    member_ZE = np.zeros((len(block_ZC), hit_HE.shape[1]), dtype=np.float32)
    member_ZE[np.arange(len(block_ZC))[:, None], block_ZC] = 1.0
    hit_ZH = member_ZE @ hit_HE.T
    np.minimum(hit_ZH, 1.0, out=hit_ZH)
    return np.asarray(hit_ZH.astype(weight_H.dtype, copy=False) @ weight_H, dtype=np.float64)
