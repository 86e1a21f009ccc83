"""Which ranks share a node: groups of experts that tokens choose together are gathered, whatever their labels are.

Renaming the ranks of a layer changes neither ranks touched nor load, only nodes touched, so where ranks are equal it is
free.

Legend: E experts, R ranks, N nodes.
"""

import numpy as np
import numpy.typing as npt

from placer.core.problem import PlacementProblem
from solvers.touch.anneal import anneal_layer, touched
from solvers.touch.layer import TouchLayer

__all__ = ["gather_in_nodes"]

IntArray = npt.NDArray[np.int64]

STEPS_PER_RANK = 2_000


def gather_in_nodes(
    problem: PlacementProblem, item: TouchLayer, rank_E: IntArray, rng: np.random.Generator
) -> IntArray:
    """The same groups under other rank labels, (E,), with no more nodes touched.

    Groups are annealed into nodes by their pairs, as experts are into ranks. Unchanged on one node, with one rank a
    node, or where ranks differ. Complexity O(R^2) a step of R * STEPS_PER_RANK.
    """
    cluster = problem.cluster
    ranks, per_node = cluster.num_ranks, cluster.ranks_per_node
    if cluster.nodes == 1 or per_node == 1 or problem.uneven or cluster.speed_R is not None:
        return rank_E
    member_ER = np.eye(ranks)[rank_E]
    pair_RR = member_ER.T @ item.pair_EE @ member_ER
    np.fill_diagonal(pair_RR, 0.0)
    company = float(np.sort(pair_RR, axis=1)[:, 1 - per_node :].sum(axis=1).mean())
    node_R, _ = anneal_layer(
        cluster.node_R,
        np.zeros(cluster.nodes, dtype=np.int64),
        np.ones(cluster.nodes),
        ranks,
        np.zeros((ranks, 0)),
        np.zeros(0),
        item.sets.expert_HK,
        item.sets.weight_H,
        item.first_E,
        item.set_I,
        pair_RR,
        0.0,
        1.0,
        STEPS_PER_RANK * ranks,
        0.3 * company,
        0.01 * company,
        rng,
    )
    label_R = np.argsort(np.argsort(node_R, kind="stable"), kind="stable")
    found_E = label_R[rank_E]

    def nodes(one_E: IntArray) -> float:
        return touched(item.sets.expert_HK, item.sets.weight_H, cluster.node_R[one_E], cluster.nodes)

    return found_E if nodes(found_E) <= nodes(rank_E) else rank_E
