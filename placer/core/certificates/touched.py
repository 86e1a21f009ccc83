"""Bound on ranks touched: how few ranks (and nodes) the experts of a token can lie on, mean over tokens and layers.

For one layer let s_ef = 1 where experts e and f share a group. A set of k experts whose members lie in groups of sizes
m_1, m_2, ... touches g groups and has p = sum m (m - 1) / 2 pairs together; over all partitions of k into at most G
parts of at most C the points (p, g) have a lower convex hull phi_k. So for any slope b_h >= 0 of every set h

    groups touched by h  >=  intercept(k, b_h) - b_h * p_h,     intercept(k, b) = min over partitions of g + b p

and sum_h weight_h b_h p_h = sum_{e<f} A_ef s_ef with A_ef = sum over sets with both of weight_h b_h. Slopes are free
for every set, so the bound is as tight as the convex hull, not one chord for all. What remains is to bound
sum_{e<f} A_ef s_ef over G groups of C experts (X = S + I is then the matrix of an equipartition):

    rows       sum_f s_ef = C - 1                                              multiplier u_e, any sign
    box        0 <= s_ef <= 1                                                  sum of positive parts
    triangle   s_ef + s_eg - s_fg <= 1                                         multiplier tau >= 0
    spectrum   X has eigenvalue C on the all-ones vector and on G - 1 further dimensions, 0 elsewhere: for symmetric Z
               <Z, X> <= sum(Z) / G + C * (sum of the G - 1 largest eigenvalues of Z orthogonal to all-ones)
    load       PAR >= p_e + sum_f p_f s_ef for every e, p = load / mean rank load    multiplier q_e >= 0, ranks only

The load enters through a price per unit of PAR that is the same for all layers, as the cap is on their mean:
mean of touched >= mean over layers of min(touched + price * PAR) - price * cap, with PAR >= 1 for what q leaves unused.

With redundant slots two experts are "together" where some rank holds both; an expert with n replicas has at most
n (S - 1) others beside it (S slots a rank, D redundant): u >= 0, no triangle, spectrum, load; (C - 1) sum u becomes
(S - 1) (sum u + D max u). No replica choice can do better than to use every pair that is together.

Arrays: rank_slope_H (all layers' sets end to end), rank_u_LE (L, E), rank_spectrum_LEE (L, E, E), rank_triangle_N4
(layer, e, f, g of each multiplier) with rank_tau_N, load_q_LE (L, E); the same with node_ for nodes, without load.
Numbers: price (ranks touched per unit of PAR), node_weight. Multipliers are in tokens, load_q_LE in ranks touched.
Objective: ranks touched + node_weight * nodes touched. Reference for the spectrum: Donath and Hoffman (1973).
"""

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt

from placer.core.certificates.read import FloatArray, multiplier, number, top_eigenvalues_sum
from placer.core.errors import UsageError, ViolationError
from placer.core.problem import PlacementProblem

__all__ = ["partition_points", "touched_bound"]

ROUNDING = 1e-10


def touched_bound(
    problem: PlacementProblem, arrays: Mapping[str, npt.NDArray[np.float64]], numbers: Mapping[str, float]
) -> float:
    """Least mean ranks touched (+ node_weight * nodes touched) that the multipliers prove."""
    if not problem.profile.sets:
        raise UsageError("the profile has load counts only, no expert sets; a bound on ranks touched needs them")
    if problem.allow_empty_slots:
        raise UsageError("the bound on ranks touched is for equal slots per rank; this problem allows empty ones")
    price, node_weight = number(numbers, "price"), number(numbers, "node_weight")
    bound_L = _level(problem, arrays, "rank", problem.cluster.num_ranks, price)
    bound = float(bound_L.mean()) - price * (problem.max_par or 0.0)
    if node_weight > 0:
        bound += node_weight * float(_level(problem, arrays, "node", problem.cluster.nodes, 0.0).mean())
    return bound - ROUNDING


def partition_points(size: int, largest: int, parts: int) -> list[tuple[int, int]]:
    """(pairs together, groups touched) of every split of `size` experts into at most `parts` groups of `largest`."""
    return sorted({(sum(m * (m - 1) // 2 for m in split), len(split)) for split in _splits(size, largest, parts)})


def _splits(size: int, largest: int, parts: int) -> Iterator[tuple[int, ...]]:
    if size == 0:
        yield ()
    elif parts > 0:
        for first in range(min(size, largest), 0, -1):
            for rest in _splits(size - first, first, parts - 1):
                yield (first, *rest)


def _level(
    problem: PlacementProblem,
    arrays: Mapping[str, npt.NDArray[np.float64]],
    level: str,
    groups: int,
    price: float,
) -> FloatArray:
    """Bound on groups touched + price * PAR per token, (L,)."""
    profile = problem.profile
    layers, experts = profile.load_LE.shape
    capacity, redundant = problem.num_slots // groups, problem.redundant
    stop_L = np.cumsum([len(sets.weight_H) for sets in profile.sets])
    slope_H = multiplier(arrays, f"{level}_slope_H", (int(stop_L[-1]),), sign=True)
    u_LE = multiplier(arrays, f"{level}_u_LE", (layers, experts), sign=redundant > 0)
    q_LE = multiplier(arrays, "load_q_LE" if level == "rank" else "", (layers, experts), sign=True)
    spectrum_LEE = arrays.get(f"{level}_spectrum_LEE")
    tau_N = arrays.get(f"{level}_tau_N")
    if redundant and (spectrum_LEE is not None or tau_N is not None or q_LE.any()):
        raise ViolationError("certificate: triangles, spectrum and load need a placement without redundant slots")
    if q_LE.any() and problem.cluster.speed_R is not None:
        raise UsageError("the certificate's load multipliers are for ranks of equal speed; the cluster has rank_speed")
    if q_LE.any() and problem.max_par is None:
        raise ViolationError("certificate array load_q_LE needs a load cap")
    if (q_LE.sum(axis=1) > price * (1 + ROUNDING)).any():
        raise ViolationError(f"certificate number price is {price:g}, but a layer's load_q_LE adds up to more")
    if spectrum_LEE is not None and spectrum_LEE.shape != (layers, experts, experts):
        raise ViolationError(f"certificate array {level}_spectrum_LEE is {spectrum_LEE.shape}")
    charge_LEE, paid_L = _triangles(arrays, level, layers, experts)
    load_LE = profile.load_LE.astype(np.float64)
    share_LE = load_LE * problem.cluster.num_ranks / np.maximum(1.0, load_LE.sum(axis=1, keepdims=True))
    bound_L = np.zeros(layers)
    for layer, sets in enumerate(profile.sets):
        weight_H = sets.weight_H.astype(np.float64)
        tokens = max(1.0, float(weight_H.sum()))
        slope = slope_H[stop_L[layer] - len(weight_H) : stop_L[layer]]
        size_H = (sets.expert_HK >= 0).sum(axis=1)
        intercept_H = _intercepts(size_H, slope, min(capacity, experts), groups)
        together_EE = _pairs(sets.expert_HK, weight_H * slope, experts)
        most = (capacity - 1) * (float(u_LE[layer].sum()) + redundant * float(u_LE[layer].max()))
        rest = together_EE - u_LE[layer][:, None] - u_LE[layer][None, :] - charge_LEE[layer]
        cross = q_LE[layer][:, None] * share_LE[layer][None, :] * tokens
        rest -= cross + cross.T
        if spectrum_LEE is not None:
            z = spectrum_LEE[layer].astype(np.float64)
            z = (z + z.T) / 2
            rest -= z
            largest = float(z.sum()) / groups + capacity * top_eigenvalues_sum(z, groups - 1)
            most += (largest - float(np.trace(z))) / 2
        most += float(paid_L[layer]) + float(np.maximum(rest, 0.0)[np.triu_indices(experts, 1)].sum())
        load = float(q_LE[layer] @ share_LE[layer]) + max(0.0, price - float(q_LE[layer].sum()))
        bound_L[layer] = (float(intercept_H @ weight_H) - most) / tokens + load
    return bound_L


def _intercepts(size_H: npt.NDArray[np.int64], slope_H: FloatArray, largest: int, groups: int) -> FloatArray:
    """min over partitions of groups touched + slope * pairs together, for each set."""
    intercept_H = np.zeros(len(size_H))
    for size in np.unique(size_H):
        here = size_H == size
        points = partition_points(int(size), largest, groups)
        intercept_H[here] = np.min([touched + slope_H[here] * pairs for pairs, touched in points], axis=0)
    return intercept_H


def _pairs(expert_HK: npt.NDArray[np.int16], weight_H: FloatArray, experts: int) -> FloatArray:
    """Weight of the sets that hold both experts, (E, E), symmetric."""
    member_HE = np.zeros((len(expert_HK), experts), dtype=np.float32)
    pair_EE = np.zeros((experts, experts))
    row, column = np.nonzero(expert_HK >= 0)
    member_HE[row, expert_HK[row, column]] = 1.0
    step = 1 << 14
    for start in range(0, len(expert_HK), step):
        part = member_HE[start : start + step].astype(np.float64)
        pair_EE += (part * weight_H[start : start + step, None]).T @ part
    np.fill_diagonal(pair_EE, 0.0)
    return pair_EE


def _triangles(
    arrays: Mapping[str, npt.NDArray[np.float64]], level: str, layers: int, experts: int
) -> tuple[FloatArray, FloatArray]:
    """What the triangle multipliers take from each pair, (L, E, E) symmetric, and what they cost, (L,)."""
    charge_LEE, paid_L = np.zeros((layers, experts, experts)), np.zeros(layers)
    tau_N = arrays.get(f"{level}_tau_N")
    if tau_N is None:
        return charge_LEE, paid_L
    at_N4 = arrays.get(f"{level}_triangle_N4")
    if at_N4 is None or at_N4.shape != (len(tau_N), 4) or (tau_N < 0).any():
        raise ViolationError(
            f"certificate arrays {level}_tau_N, {level}_triangle_N4: one row per multiplier, none negative"
        )
    layer, e, f, g = at_N4.astype(np.int64).T
    limits = np.array([layers, experts, experts, experts])
    if (at_N4 < 0).any() or (at_N4 >= limits).any() or (e == f).any() or (e == g).any() or (f == g).any():
        raise ViolationError(
            f"certificate array {level}_triangle_N4 names a layer or expert that is not there, or one twice"
        )
    np.add.at(paid_L, layer, tau_N)
    for one, two, sign in ((e, f, 1.0), (e, g, 1.0), (f, g, -1.0)):
        np.add.at(charge_LEE, (layer, one, two), sign * tau_N)
        np.add.at(charge_LEE, (layer, two, one), sign * tau_N)
    return charge_LEE, paid_L
