"""The most flow kept on its rank, exactly, for layers with few experts: a dynamic program over layers.

The cut counts only whether two experts of neighbouring layers share a rank, so all layers so far may be relabelled
together and the best that a prefix of layers can keep depends on the last layer's partition alone, not on its labels:

    V[0, b] = 0,    V[l+1, b] = max over partitions a of V[l, a] + max over label matchings m of sum_r W_l[a_r, b_m(r)]

with W_l[a_r, b_s] the flow from the experts of group r to those of group s. 8 experts on 4 ranks are 105 partitions,
which no integer program makes use of. PAR too is a property of the partition, so a cap on it is a price (chain_cap).

Legend: L layers, E logical experts, R ranks, B partitions.
"""

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from placer.core.plan import canonical_slots
from placer.core.problem import PlacementProblem
from solvers.exact.chain_cap import capped_path, least_cost
from solvers.exact.chain_table import (
    MOST_PARTITIONS,
    Partitions,
    best_matching,
    kept_table,
    number_of_partitions,
    partitions_of,
)
from solvers.result import SolveResult

__all__ = ["solve_chain"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

NAME = "chain"
BOUND_BY = "chain: exact dynamic program over layers"
TOLERANCE = 5e-10
"""Half of what checkers of the cap forgive, so that the rounding of their sums has the other half."""


def solve_chain(problem: PlacementProblem, *, progress: Callable[[int, int], None] | None = None) -> SolveResult:
    """The placement with the smallest "cut": share of the transitions between consecutive layers that change rank.

    Parameters
    ----------
    problem
        no replicas, transitions in the profile (unless it has one layer), at most MOST_PARTITIONS partitions of a
        layer's experts; `max_par` caps the mean over layers of max / mean rank load
    progress
        called with layers done and layers; again from the first for each search under a cap

    Returns stopped_by "optimal", with bound = objective, always without a cap and nearly always with one; else "effort"
    with the proven bound. Status "infeasible" where no placement meets the cap (proven).

    Raises
    ------
    UsageError
        for replicas, missing transitions or layers with too many partitions

    Notes
    -----
    Complexity: O(L B^2 R 2^R) time and 8 L B^2 bytes; B = E! / (C!^R R!), so 105 for Mixtral on 4 ranks. One expert a
    rank is one partition at any size: L - 1 assignments, O(L E^3).
    Guarantee: bound <= optimum <= objective. The network between ranks is not looked at: every other rank is as far.
    """
    _check(problem)
    started = time.perf_counter()
    profile, ranks = problem.profile, problem.cluster.num_ranks
    layers, experts = profile.model.num_sites, profile.model.num_experts
    partitions = partitions_of(experts, ranks)
    par_LB = _par_LB(profile.load_LE, partitions)
    cap = np.inf if problem.max_par is None else (problem.max_par + TOLERANCE) * layers
    if (least := least_cost(par_LB)) > cap:
        return SolveResult(
            solver=NAME,
            status="infeasible",
            stopped_by="infeasible",
            seconds=time.perf_counter() - started,
            message=f"no placement without replicas has a mean PAR below {least / layers:.4f} and the cap is "
            f"{problem.max_par:g}; raise --max-par",
        )
    weight_LEE = profile.transition_LEE if profile.transition_LEE is not None else np.zeros((0, experts, experts))
    weight_LEE = weight_LEE.astype(np.int64)
    states = len(partitions.group_BR)
    kept_LBB = np.zeros((layers - 1, states, states), dtype=np.int64)
    for layer, weight_EE in enumerate(weight_LEE):
        kept_LBB[layer] = kept_table(weight_EE, partitions)
        if progress is not None:
            progress(layer + 2, layers)
    path = capped_path(kept_LBB, par_LB, cap, progress)
    total = int(weight_LEE.sum())
    return SolveResult(
        solver=NAME,
        status="solved",
        stopped_by="optimal" if path.gain == path.bound else "effort",
        slot_expert_LP=_slots(path.state_L, partitions, weight_LEE),
        objective_name="cut",
        objective=(total - path.gain) / max(1, total),
        bound=(total - path.bound) / max(1, total),
        bound_by=BOUND_BY,
        seconds=time.perf_counter() - started,
    )


def _check(problem: PlacementProblem) -> None:
    model, ranks = problem.profile.model, problem.cluster.num_ranks
    if problem.redundant:
        raise UsageError(f"chain places no replicas and redundant is {problem.redundant}; use --redundant 0")
    if problem.max_par is not None and problem.cluster.speed_R is not None:
        raise UsageError("chain caps load as if all ranks were equally fast; use coactivation with rank_speed")
    if model.num_sites > 1 and problem.profile.transition_LEE is None:
        raise UsageError("the profile has no transitions between layers, which chain keeps on one rank")
    if number_of_partitions(model.num_experts, ranks) > MOST_PARTITIONS:
        raise UsageError(
            f"{model.num_experts} experts on {ranks} ranks have more than the {MOST_PARTITIONS} partitions that chain "
            "takes (8 on 4 have 105); use another solver"
        )


def _par_LB(load_LE: IntArray, partitions: Partitions) -> FloatArray:
    """Max / mean rank load of each partition in each layer; 1 where nothing was routed."""
    load_LBR = (load_LE @ partitions.subset_UE.T)[:, partitions.group_BR].astype(np.float64)
    mean_LB = load_LBR.mean(axis=2)
    par_LB: FloatArray = np.where(mean_LB > 0, load_LBR.max(axis=2) / np.where(mean_LB > 0, mean_LB, 1.0), 1.0)
    return par_LB


def _slots(state_L: IntArray, partitions: Partitions, weight_LEE: IntArray) -> IntArray:
    """The partitions with each layer's groups named after those of the layer before that they keep most of."""
    ranks = partitions.group_BR.shape[1]
    member_LRE = partitions.subset_UE[partitions.group_BR[state_L]]
    for layer, weight_EE in enumerate(weight_LEE):
        after_R = best_matching(member_LRE[layer] @ weight_EE @ member_LRE[layer + 1].T)
        member_LRE[layer + 1] = member_LRE[layer + 1][after_R]
    order_LP = np.argsort(-member_LRE, axis=2, kind="stable")[:, :, : member_LRE.shape[2] // ranks]
    return canonical_slots(order_LP.reshape(len(state_L), -1).astype(np.int64), ranks)
