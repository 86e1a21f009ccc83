"""Bound on the cut of affinity: how few transitions between consecutive layers can change rank (and node).

For one pair of layers let s_ij = 1 where expert i of layer l and expert j of layer l + 1 share a group (a rank, or a
node); w_ij counts the tokens that go from i to j. With G groups of C experts each, S = (s_ij) satisfies

    every row and column of S sums to C; 0 <= s <= 1
    S = X Y^T for group indicators X, Y: it has exactly G singular values, all C, one of them on the all-ones vectors
    the partners of i in layer l + 1 are all of its group's experts there, so (ranks only)
        PAR of layer l + 1 >= sum_j p_j s_ij for every i, and PAR of layer l >= sum_i p_i s_ij for every j,
        p = load of an expert over the mean rank load of its layer

    partners of one expert are partners of each other's partners: s_ij + s_ij' + s_i'j - s_i'j' <= 2     ("biclique")

For any u, v, any matrix Z ("split"), any tau, mu, nu >= 0 and any price >= the sum of the multipliers of every layer:

    sum_ij w_ij s_ij <= sum_ij max(0, w - Z - B - u_i - v_j - mu_i p_j - nu_j p_i) + C (sum u + sum v) + 2 sum tau
                        + sum(Z) / G + C * (sum of the G - 1 largest singular values of the centred Z)
                        + price * (L cap) - sum over layers of (price - its multipliers) * its least PAR
    where B gathers +-tau of every cut on its four arcs, sum over layers of PAR <= L cap, and PAR is at least what
    single experts force (`par.py`).

u, v alone are the duals of the b-matching (exact at C = 1); Z = w alone is the spectral bound; both together the
nuclear + box bound; mu, nu, price the load-aware Lagrangian; tau what makes it near exact for a pair with few experts
per rank. With redundant slots (S slots a rank, D of them redundant
in a layer) an expert with n replicas has at most n S partners: then u, v >= 0, no Z, tau, mu, nu, and C sum u becomes
S (sum u + D max u).

Arrays: rank_u_LE, rank_v_LE, mu_LE, nu_LE (L - 1, E), rank_split_LEE (L - 1, E, E), rank_tau_N with rank_biclique_N5
(pair, i, i', j, j' of each); node_ in place of rank_ likewise, without load. Numbers: price (transitions per unit of
PAR), node_weight.
Objective: share of transitions that change rank + node_weight * share that change node.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from placer.core.certificates.par import least_par
from placer.core.certificates.read import FloatArray, multiplier, number
from placer.core.errors import UsageError, ViolationError
from placer.core.problem import PlacementProblem

__all__ = ["kept_bound"]

ROUNDING = 1e-10


def kept_bound(
    problem: PlacementProblem, arrays: Mapping[str, npt.NDArray[np.float64]], numbers: Mapping[str, float]
) -> float:
    """Least cut (share of transitions that change rank, + node_weight * node) that the multipliers prove."""
    profile, cluster = problem.profile, problem.cluster
    if profile.transition_LEE is None or not profile.transition_LEE.sum():
        raise UsageError("the profile has no transitions between layers; a bound on them says nothing")
    if problem.allow_empty_slots:
        raise UsageError("the bound on the cut is for equal slots per rank; this problem allows empty ones")
    flow_LEE = profile.transition_LEE.astype(np.float64)
    total = float(flow_LEE.sum())
    pairs, experts = flow_LEE.shape[:2]
    price, node_weight = number(numbers, "price"), number(numbers, "node_weight")
    mu_LE = multiplier(arrays, "mu_LE", (pairs, experts), sign=True)
    nu_LE = multiplier(arrays, "nu_LE", (pairs, experts), sign=True)
    kept = _level(problem, arrays, "rank", cluster.num_ranks, flow_LEE - _load_charge(problem, mu_LE, nu_LE))
    kept += _load_terms(problem, mu_LE, nu_LE, price)
    cut = (total - min(kept + ROUNDING * total, total)) / total
    if node_weight > 0:
        kept_node = _level(problem, arrays, "node", cluster.nodes, flow_LEE)
        cut += node_weight * (total - min(kept_node + ROUNDING * total, total)) / total
    return cut


def _level(
    problem: PlacementProblem,
    arrays: Mapping[str, npt.NDArray[np.float64]],
    level: str,
    groups: int,
    flow_LEE: FloatArray,
) -> float:
    """Upper bound on the flow inside groups, all pairs of layers together."""
    pairs, experts = flow_LEE.shape[:2]
    redundant = problem.redundant
    u_LE = multiplier(arrays, f"{level}_u_LE", (pairs, experts), sign=redundant > 0)
    v_LE = multiplier(arrays, f"{level}_v_LE", (pairs, experts), sign=redundant > 0)
    split_LEE = arrays.get(f"{level}_split_LEE")
    flow_LEE, paid = _bicliques(arrays, level, flow_LEE, redundant)
    capacity = problem.num_slots // groups
    kept = paid + capacity * float(u_LE.sum() + v_LE.sum())
    if redundant:
        kept += capacity * redundant * float(u_LE.max(axis=1).sum() + v_LE.max(axis=1).sum())
        if split_LEE is not None:
            raise ViolationError(f"certificate array {level}_split_LEE needs a placement without redundant slots")
    if split_LEE is not None and split_LEE.shape != flow_LEE.shape:
        raise ViolationError(f"certificate array {level}_split_LEE is {split_LEE.shape}; needs {flow_LEE.shape}")
    for row in range(pairs):
        rest = flow_LEE[row] - u_LE[row][:, None] - v_LE[row][None, :]
        if split_LEE is not None:
            split = split_LEE[row].astype(np.float64)
            rest -= split
            centred = split - split.mean(axis=0) - split.mean(axis=1)[:, None] + split.mean()
            singular = np.linalg.svd(centred, compute_uv=False)
            kept += float(split.sum()) / groups + capacity * float(singular[: groups - 1].sum())
        kept += float(np.maximum(rest, 0.0).sum())
    return kept


def _bicliques(
    arrays: Mapping[str, npt.NDArray[np.float64]], level: str, flow_LEE: FloatArray, redundant: int
) -> tuple[FloatArray, float]:
    """The flow less what the biclique multipliers take from it, and what they cost."""
    tau_N, at_N5 = arrays.get(f"{level}_tau_N"), arrays.get(f"{level}_biclique_N5")
    if tau_N is None or at_N5 is None:
        return flow_LEE, 0.0
    if redundant:
        raise ViolationError(f"certificate array {level}_tau_N needs a placement without redundant slots")
    if tau_N.ndim != 1 or at_N5.shape != (len(tau_N), 5) or (tau_N < 0).any():
        raise ViolationError(
            f"certificate arrays {level}_tau_N, {level}_biclique_N5: one row per multiplier, none negative"
        )
    pair, one, other, two, next_ = at_N5.astype(np.int64).T
    experts = flow_LEE.shape[1]
    limits = np.array([len(flow_LEE), experts, experts, experts, experts])
    if (at_N5 < 0).any() or (at_N5 >= limits).any() or (one == other).any() or (two == next_).any():
        raise ViolationError(
            f"certificate array {level}_biclique_N5 names a pair or expert that is not there, or one twice"
        )
    left_LEE = flow_LEE.copy()
    for before, after, sign in ((one, two, 1.0), (one, next_, 1.0), (other, two, 1.0), (other, next_, -1.0)):
        np.add.at(left_LEE, (pair, before, after), -sign * tau_N)
    return left_LEE, 2.0 * float(tau_N.sum())


def _shares(problem: PlacementProblem) -> FloatArray:
    """Load of each expert over the mean rank load of its layer, (L, E)."""
    load_LE = problem.profile.load_LE.astype(np.float64)
    return load_LE * problem.cluster.num_ranks / np.maximum(1.0, load_LE.sum(axis=1, keepdims=True))


def _load_charge(problem: PlacementProblem, mu_LE: FloatArray, nu_LE: FloatArray) -> FloatArray:
    """What the load multipliers take from each pair's flow, (L - 1, E, E)."""
    share_LE = _shares(problem)
    charge: FloatArray = mu_LE[:, :, None] * share_LE[1:, None, :] + share_LE[:-1, :, None] * nu_LE[:, None, :]
    return charge


def _load_terms(problem: PlacementProblem, mu_LE: FloatArray, nu_LE: FloatArray, price: float) -> float:
    """price * L cap less the PAR that every layer has anyway and no multiplier uses, after a look at the signs."""
    used_L = np.zeros(len(mu_LE) + 1)
    used_L[1:] += mu_LE.sum(axis=1)
    used_L[:-1] += nu_LE.sum(axis=1)
    if not used_L.any():
        return 0.0
    if problem.cluster.speed_R is not None:
        raise UsageError("the certificate's load multipliers are for ranks of equal speed; the cluster has rank_speed")
    if problem.max_par is None or problem.redundant:
        raise ViolationError("certificate arrays mu_LE, nu_LE need a load cap and a placement without redundant slots")
    if (used_L > price * (1 + ROUNDING)).any():
        raise ViolationError(
            f"certificate number price is {price:g}, but a layer's multipliers add up to {used_L.max():g}"
        )
    load_LE = problem.profile.load_LE.astype(np.float64)
    ranks, per_rank = problem.cluster.num_ranks, problem.slots_per_rank
    least_L = np.array([least_par(load_E, ranks, per_rank, 0) for load_E in load_LE])
    return price * len(used_L) * problem.max_par - float((price - used_L).clip(min=0.0) @ least_L)
