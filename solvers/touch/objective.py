"""What the touching solvers minimise: ranks touched, and nodes at the price of their links.

Legend: H expert sets.
"""

import numpy as np

from placer.core.problem import PlacementProblem

__all__ = ["capacity_bound", "node_price", "touch_objective"]


def capacity_bound(problem: PlacementProblem, slots: int) -> float:
    """Mean groups (ranks, nodes) of `slots` slots touched is at least this: k distinct experts fill ceil(k / slots)."""
    per_layer = []
    for sets in problem.profile.sets:
        size_H = (sets.expert_HK >= 0).sum(axis=1)
        weight = sets.weight_H * (size_H > 0)
        least = -(-size_H // slots)
        per_layer.append(float((least * weight).sum() / max(1, weight.sum())))
    return float(np.mean(per_layer))


def touch_objective(problem: PlacementProblem) -> tuple[str, float]:
    """Name of what both touching solvers minimise, and a lower bound on it."""
    weight = node_price(problem)
    name = "ranks_touched" if weight == 0 else f"ranks_touched + {weight:.3g} * nodes_touched"
    most = int(problem.room_LR.max())
    on_ranks = capacity_bound(problem, most)
    on_nodes = capacity_bound(problem, most * problem.cluster.ranks_per_node)
    return name, on_ranks + weight * on_nodes


def node_price(problem: PlacementProblem) -> float:
    """What touching one more node costs against one more rank: the ratio of their links' bytes per second."""
    cluster = problem.cluster
    if problem.mode != "per_node" or cluster.nodes == 1:
        return 0.0
    return cluster.intra.gbytes_per_s / cluster.inter.gbytes_per_s
