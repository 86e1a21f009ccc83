"""EPLB-compatible load balancing: DeepSeek's published rules, so that results can be compared like with like.

Reference: DeepSeek-AI, "Expert Parallelism Load Balancer" (2025), README: redundant experts go one by one to the expert
with the largest load per replica; items go heaviest first to the lightest pack that is not full; the hierarchical form
first packs expert groups to nodes, then replicates inside each node, then packs to ranks.

Legend: L layers, E experts, P slots, R ranks, N nodes, G expert groups.
"""

import time

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.errors import InfeasibleError
from placer.core.problem import PlacementProblem
from solvers.balance.load import load_result
from solvers.result import SolveResult

__all__ = ["eplb_slots", "pack_balanced", "replicate", "solve_eplb", "solve_eplb_hierarchical"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@njit(cache=True)
def pack_balanced(weight_I: FloatArray, num_packs: int) -> IntArray:  # pragma: no cover - compiled
    """Pack of each item, equal counts per pack: heaviest first, to the lightest pack that is not full, (I,)."""
    items = len(weight_I)
    capacity = items // num_packs
    pack_I = np.full(items, -1, dtype=np.int64)
    load = np.zeros(num_packs)
    count = np.zeros(num_packs, dtype=np.int64)
    for item in np.argsort(-weight_I, kind="mergesort"):
        best = -1
        for pack in range(num_packs):
            if count[pack] < capacity and (best < 0 or load[pack] < load[best]):
                best = pack
        pack_I[item] = best
        load[best] += weight_I[item]
        count[best] += 1
    return pack_I


@njit(cache=True)
def replicate(weight_E: FloatArray, num_slots: int) -> tuple[IntArray, IntArray]:  # pragma: no cover - compiled
    """Expert of each slot (P,) and replicas per expert (E,): each extra slot goes to the largest load per replica."""
    experts = len(weight_E)
    slot_expert_P = np.arange(num_slots)
    count_E = np.ones(experts, dtype=np.int64)
    for slot in range(experts, num_slots):
        best = int(np.argmax(weight_E / count_E))
        slot_expert_P[slot] = best
        count_E[best] += 1
    return slot_expert_P, count_E


@njit(cache=True)
def _place(weight_E: FloatArray, num_slots: int, num_ranks: int) -> IntArray:  # pragma: no cover - compiled
    """One layer: replicate, then pack the slots to ranks; slots of a rank are in the order they were packed."""
    slot_expert_P, count_E = replicate(weight_E, num_slots)
    per_slot = weight_E[slot_expert_P] / count_E[slot_expert_P]
    pack_P = pack_balanced(per_slot, num_ranks)
    result = np.empty(num_slots, dtype=np.int64)
    width = num_slots // num_ranks
    filled = np.zeros(num_ranks, dtype=np.int64)
    for item in np.argsort(-per_slot, kind="mergesort"):
        rank = pack_P[item]
        result[rank * width + filled[rank]] = slot_expert_P[item]
        filled[rank] += 1
    return result


@njit(cache=True)
def _place_hierarchical(
    weight_E: FloatArray, num_slots: int, num_ranks: int, num_nodes: int, num_groups: int
) -> IntArray:  # pragma: no cover - compiled
    group_size = len(weight_E) // num_groups
    group_weight = weight_E.reshape(num_groups, group_size).sum(axis=1)
    node_G = pack_balanced(group_weight, num_nodes)
    result = np.empty(num_slots, dtype=np.int64)
    per_node = num_slots // num_nodes
    for node in range(num_nodes):
        local = np.empty(len(weight_E) // num_nodes, dtype=np.int64)
        filled = 0
        for group in np.argsort(-group_weight, kind="mergesort"):
            if node_G[group] == node:
                local[filled : filled + group_size] = np.arange(group * group_size, (group + 1) * group_size)
                filled += group_size
        placed = _place(weight_E[local], per_node, num_ranks // num_nodes)
        result[node * per_node : (node + 1) * per_node] = local[placed]
    return result


def eplb_slots(
    load_LE: npt.NDArray[np.number], num_slots: int, num_ranks: int, num_nodes: int = 1, num_groups: int | None = None
) -> IntArray:
    """slot_expert_LP by EPLB's rules: global, or hierarchical where `num_groups` is given.

    As published it may put two replicas of one expert on one rank; `solve_eplb` keeps that. O(L P (R + E)).
    Raises InfeasibleError where groups, nodes or slots do not divide.
    """
    weight_LE = np.ascontiguousarray(load_LE, dtype=np.float64)
    experts = weight_LE.shape[1]
    if num_slots % num_ranks or num_slots < experts:
        raise InfeasibleError(f"EPLB: {num_slots} slots for {experts} experts on {num_ranks} ranks; they must divide")
    if num_groups is None:
        return np.stack([_place(weight_E, num_slots, num_ranks) for weight_E in weight_LE])
    if experts % num_groups or num_groups % num_nodes or num_ranks % num_nodes or num_slots % num_nodes:
        raise InfeasibleError(
            f"hierarchical EPLB: {experts} experts in {num_groups} groups on {num_nodes} nodes of "
            f"{num_ranks // num_nodes} ranks do not divide; use eplb (global)"
        )
    rows = [_place_hierarchical(weight_E, num_slots, num_ranks, num_nodes, num_groups) for weight_E in weight_LE]
    return np.stack(rows)


def solve_eplb(problem: PlacementProblem) -> SolveResult:
    """Global EPLB on the profile's total load. Guarantee: none; objective PAR, with the load bound."""
    return _solve(problem, "eplb", None)


def solve_eplb_hierarchical(problem: PlacementProblem) -> SolveResult:
    """Hierarchical EPLB with one expert group per node."""
    return _solve(problem, "eplb_hierarchical", problem.cluster.nodes)


def _solve(problem: PlacementProblem, name: str, num_groups: int | None) -> SolveResult:
    started = time.perf_counter()
    cluster = problem.cluster
    slots_LP = eplb_slots(problem.profile.load_LE, problem.num_slots, cluster.num_ranks, cluster.nodes, num_groups)
    return load_result(problem, name, slots_LP, "effort", time.perf_counter() - started)
