"""Bound on ranks touched: how few ranks (and nodes) the experts of a token can lie on, mean over tokens and layers.

For one layer let s_ef = 1 where experts e and f share a group. Slopes on the pairs of every set h give

    groups touched by h  >=  intercept_h - sum over pairs e, f of h of slope_h,ef s_ef

since at any placement the pairs of h that are together are those of one of its partitions, and the intercept is the
least over all of them (`touched_sets.py`). Summed over sets, weight_h each, the layer touches at least
sum_h weight_h intercept_h - sum_{e<f} A_ef s_ef with A_ef = sum_h weight_h slope_h,ef. Slopes are free for every set,
so this is as tight as the convex hull of each set's partitions. What remains is to bound sum_{e<f} A_ef s_ef from above
over G groups of C experts (X = S + I is then the matrix of an equipartition):

    rows       sum_f s_ef = C - 1                                              multiplier u_e, any sign
    box        0 <= s_ef <= 1                                                  sum of positive parts
    triangle   s_ef + s_eg - s_fg <= 1                                         multiplier tau >= 0
    spectrum   X has eigenvalue C on the all-ones vector and on G - 1 further dimensions, 0 elsewhere: for symmetric Z
               <Z, X> <= sum(Z) / G + C * (sum of the G - 1 largest eigenvalues of Z orthogonal to all-ones)
    load       PAR >= p_e + sum_f p_f s_ef for every e, p = load / mean rank load    multiplier q_e >= 0, ranks only

The load enters through a price per unit of PAR that is the same for all layers, as the cap is on their mean:
mean of touched >= mean over layers of min(touched + price * PAR) - price * cap, with PAR >= 1 for what q leaves unused.

With redundant slots two experts are "together" where some rank holds both; an expert with n replicas has at most
min(n (S - 1), E - 1) others beside it (S slots a rank) and n <= G, and all experts together have D replicas: u >= 0, no
triangle, spectrum, load; (C - 1) sum u becomes the most that sum_e u_e min(n_e (S - 1), E - 1) can be, which replicas
given one by one to where they add most reach, as it is concave. No replica choice can do better than to use every pair
that is together.

Arrays: rank_slope_HK (slopes per member) or rank_slope_HQ (per pair), all layers' sets end to end, any sign without and
>= 0 with redundant slots, pairs of absent members 0; rank_u_LE (L, E), rank_spectrum_LEE (L, E, E), rank_triangle_N4
(layer, e, f, g of each multiplier) with rank_tau_N, load_q_LE (L, E); the same with node_ for nodes, without load.
Numbers: price (ranks touched per unit of PAR), node_weight. Multipliers are in tokens, load_q_LE in ranks touched.
Objective: ranks touched + node_weight * nodes touched. Reference for the spectrum: Donath and Hoffman (1973).
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from placer.core.certificates.read import FloatArray, multiplier, number, top_eigenvalues_sum
from placer.core.certificates.touched_sets import member_intercepts, pair_intercepts, pair_slopes, together_weights
from placer.core.errors import UsageError, ViolationError
from placer.core.problem import PlacementProblem

__all__ = ["touched_bound"]

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
    if price > 0 and problem.max_par is None:
        raise ViolationError(f"certificate number price is {price:g}; without a load cap PAR has no price")
    bound_L = _level(problem, arrays, "rank", problem.cluster.num_ranks, price)
    bound = float(bound_L.mean()) - price * (problem.max_par or 0.0)
    if node_weight > 0:
        bound += node_weight * float(_level(problem, arrays, "node", problem.cluster.nodes, 0.0).mean())
    return bound - ROUNDING


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
    slope_HK, slope_HQ = _slopes(problem, arrays, level)
    u_LE = multiplier(arrays, f"{level}_u_LE", (layers, experts), sign=redundant > 0)
    q_LE = multiplier(arrays, "load_q_LE" if level == "rank" else "", (layers, experts), sign=True)
    spectrum_LEE = arrays.get(f"{level}_spectrum_LEE")
    tau_N = arrays.get(f"{level}_tau_N")
    if redundant and (spectrum_LEE is not None or tau_N is not None or q_LE.any()):
        raise ViolationError("certificate: triangles, spectrum and load need a placement without redundant slots")
    if q_LE.any() and problem.cluster.speed_R is not None:
        raise UsageError("the certificate's load multipliers are for ranks of equal speed; the cluster has rank_speed")
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
        rows = slice(stop_L[layer] - len(weight_H), stop_L[layer])
        if slope_HK is not None:
            intercept_H = member_intercepts(sets.expert_HK, slope_HK[rows], capacity, groups)
            slope = pair_slopes(sets.expert_HK, slope_HK[rows])
        elif slope_HQ is not None:
            slope = slope_HQ[rows]
            intercept_H = pair_intercepts(sets.expert_HK, slope, capacity, groups)
        together_EE = together_weights(sets.expert_HK, weight_H, slope, experts)
        most = _rows_cost(u_LE[layer], capacity - 1, redundant, groups)
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


def _slopes(
    problem: PlacementProblem, arrays: Mapping[str, npt.NDArray[np.float64]], level: str
) -> tuple[FloatArray | None, FloatArray | None]:
    """(slopes per member, None) or (None, slopes per pair), all layers' sets end to end."""
    sets = sum(len(layer.weight_H) for layer in problem.profile.sets)
    columns = {layer.expert_HK.shape[1] for layer in problem.profile.sets}
    if len(columns) > 1:
        raise UsageError("the bound on ranks touched needs sets with as many columns in every layer")
    top_k, sign = columns.pop(), problem.redundant > 0
    if f"{level}_slope_HQ" not in arrays:
        return multiplier(arrays, f"{level}_slope_HK", (sets, top_k), sign=sign), None
    if f"{level}_slope_HK" in arrays:
        raise ViolationError(f"certificate has both {level}_slope_HK and {level}_slope_HQ; give one")
    return None, multiplier(arrays, f"{level}_slope_HQ", (sets, top_k * (top_k - 1) // 2), sign=sign)


def _rows_cost(u_E: FloatArray, room: int, redundant: int, groups: int) -> float:
    """Most that the multipliers of the rows can weigh: `room` others for every copy of an expert."""
    if redundant == 0:
        return room * float(u_E.sum())
    others = len(u_E) - 1
    cost = min(room, others) * float(u_E.sum())
    gain = [u_E * min(room, max(0, others - copies * room)) for copies in range(1, groups)]
    return cost + float(np.sort(np.concatenate([*gain, np.zeros(redundant)]))[::-1][:redundant].sum())


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
