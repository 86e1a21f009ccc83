"""One objective for all solvers of a problem, and the score of any placement under it, on the profile's own requests.

The goal follows from how tokens travel:

    ranks   per_rank, one network        mean ranks touched
    nodes   per_node, several nodes      ranks touched + w * nodes touched, w the ratio of the links' rates
    cut     coherent, one node           share of transitions whose two experts lie on different ranks
    hops    coherent, several nodes      that, + the share whose two experts lie on different nodes
    par     per_expert, allgather, or a profile without what the others need: mean over layers of max / mean rank load

Means over layers, each layer's tokens counting alike, as the solvers and the certificates have it (which is what
placer.core.evaluate_profile says wherever every layer has the same tokens).

Legend: L layers, H expert sets, E experts, K top-k, P slots, R ranks, N nodes.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from placer.core.evaluate import par
from placer.core.evaluate_profile import serve_layer
from placer.core.problem import PlacementProblem
from placer.core.profile import ExpertSets
from placer.core.replicas import LayerSlots, layer_slots
from solvers.touch.anneal import touched
from solvers.touch.objective import node_price

__all__ = ["Goal", "GoalKind", "Score", "goal_name", "goal_of", "repeats", "score"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

GoalKind = Literal["ranks", "nodes", "cut", "hops", "par"]

HOPS = 1.0
"""Weight of a cut between nodes on top of the one between ranks: ExFlow's hops, 1 in the node and 2 across."""

TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class Goal:
    """What is minimised: its kind, the name that results carry, and the price of nodes against ranks."""

    kind: GoalKind
    name: str
    node_weight: float = 0.0


@dataclass(frozen=True, slots=True)
class Score:
    """`objective` as the goal has it, `par` as served, `feasible`: within the cap, and replicas on distinct ranks."""

    objective: float
    par: float
    feasible: bool


def goal_of(problem: PlacementProblem) -> Goal:
    """The objective that the problem's mode and profile call for."""
    profile, cluster, mode = problem.profile, problem.cluster, problem.mode
    if mode == "coherent" and profile.transition_LEE is not None and profile.transition_LEE.any():
        return Goal("cut", "cut") if cluster.nodes == 1 else Goal("hops", goal_name("hops", HOPS), HOPS)
    if mode in ("per_rank", "per_node", "coherent") and profile.sets:
        weight = node_price(problem)
        kind: GoalKind = "nodes" if weight > 0 else "ranks"
        return Goal(kind, goal_name(kind, weight), weight)
    return Goal("par", "par")


def goal_name(kind: GoalKind, node_weight: float = 0.0) -> str:
    """What results call an objective; the touching solvers' own names where it is theirs."""
    if kind == "par":
        return "par"
    base, node = ("cut", "cut_nodes") if kind in ("cut", "hops") else ("ranks_touched", "nodes_touched")
    return f"{base} + {node_weight:.3g} * {node}" if node_weight > 0 else base


def score(
    problem: PlacementProblem,
    slot_expert_LP: IntArray,
    share_LP: FloatArray | None = None,
    goal: Goal | None = None,
) -> Score:
    """The score of a placement that serves every expert, replicas serving what the problem's replica choice gives them.

    `share_LP` as in placer.core.Plan; `goal` is the problem's own where it is left out. Exact without replicas; with
    them as placer.core.evaluate_profile estimates. Complexity O(L (H K + E R)), with a cut O(L E^2 R) more.
    """
    goal = goal or goal_of(problem)
    profile, cluster = problem.profile, problem.cluster
    experts, ranks = profile.model.num_experts, cluster.num_ranks
    touch = goal.kind in ("ranks", "nodes")
    costs: list[float] = []
    share_LRE = np.zeros((len(slot_expert_LP), ranks, experts))
    for layer, row in enumerate(slot_expert_LP):
        given = None if share_LP is None else share_LP[layer]
        slots = layer_slots(row, experts, ranks, cluster.ranks_per_node, given)
        share_P = slots.share_P
        if (slots.count_E > 1).any() and profile.sets:
            served = serve_layer(slots, problem.replica_choice, profile.sets[layer].split_heavy())
            share_P = served.share_P
            costs.append((served.ranks + goal.node_weight * served.nodes) / max(1, served.tokens))
        elif touch:
            costs.append(_touched(slots, profile.sets[layer], cluster.nodes, goal.node_weight))
        used = row >= 0
        np.add.at(share_LRE[layer], (slots.rank_P[used], row[used]), share_P[used])
    load_LR = np.einsum("le,lre->lr", profile.load_LE.astype(np.float64), share_LRE)
    balance = float(par(load_LR, cluster.speed_R).mean())
    objective = balance
    if touch:
        objective = float(np.mean(costs))
    elif goal.kind in ("cut", "hops"):
        objective = _cut(problem, share_LRE, goal.node_weight)
    within = problem.max_par is None or balance <= problem.max_par + TOLERANCE
    return Score(objective, balance, within and not repeats(slot_expert_LP, ranks))


def repeats(slot_expert_LP: IntArray, num_ranks: int) -> bool:
    """Whether some rank holds an expert twice in a layer, which is a slot wasted and what `check` refuses."""
    layers = len(slot_expert_LP)
    ordered = np.sort(slot_expert_LP.reshape(layers, num_ranks, -1), axis=2)
    return bool(((ordered[:, :, 1:] == ordered[:, :, :-1]) & (ordered[:, :, 1:] >= 0)).any())


def _touched(slots: LayerSlots, sets: ExpertSets, nodes: int, node_weight: float) -> float:
    """Mean ranks (and nodes) touched by the sets of a layer without replicas."""
    slot_E = slots.slot_EN[:, 0]
    rank_E = np.where(slot_E >= 0, slots.rank_P[slot_E], 0)
    cost = float(touched(sets.expert_HK, sets.weight_H, rank_E, slots.num_ranks))
    if node_weight > 0:
        cost += node_weight * float(touched(sets.expert_HK, sets.weight_H, slots.node_R[rank_E], nodes))
    return cost / max(1, int(sets.weight_H[(sets.expert_HK >= 0).any(axis=1)].sum()))


def _cut(problem: PlacementProblem, share_LRE: FloatArray, node_weight: float) -> float:
    """Share of transitions that change rank (+ node_weight * node)."""
    flow_LEE = problem.profile.transition_LEE
    assert flow_LEE is not None
    total = float(flow_LEE.sum())
    node_share_LNE = share_LRE.reshape(len(share_LRE), problem.cluster.nodes, -1, share_LRE.shape[2]).sum(axis=2)
    cut = 0.0
    for share_LGE, weight in ((share_LRE, 1.0), (node_share_LNE, node_weight)):
        if weight > 0:
            kept = sum(
                float(np.sum((before @ flow) * after))
                for before, flow, after in zip(share_LGE[:-1], flow_LEE, share_LGE[1:], strict=True)
            )
            cut += weight * (1.0 - kept / total)
    return cut
