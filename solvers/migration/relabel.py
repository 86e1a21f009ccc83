"""Rank labels that keep the most experts where they are: the same placement for the fewest moves.

Ranks of one kind are interchangeable, so a new placement may be given any labels. Which labels keep most of the current
placement is a linear assignment; with several nodes whole nodes are exchanged, and ranks inside them, so that the nodes
a token touches stay the same: an assignment of nodes whose weights are assignments of ranks.

Legend: L layers, P slots, E experts, R ranks (labels), N nodes, C slots per rank.
"""

import numpy as np
import numpy.typing as npt
from ortools.graph.python import linear_sum_assignment

from placer.core.errors import MismatchError
from placer.core.migration import Moves, held_LRE, moves
from solvers.ranks import relabel_ranks

__all__ = ["relabel"]

IntArray = npt.NDArray[np.int64]


def relabel(
    current_LP: IntArray,
    target_LP: IntArray,
    num_ranks: int,
    *,
    ranks_per_node: int | None = None,
    common: bool = False,
    kind_R: IntArray | None = None,
) -> tuple[IntArray, Moves]:
    """`target_LP` with its ranks relabelled to be reached from `current_LP` in the fewest moves, and those moves.

    Every layer gets labels of its own unless `common` (for `coherent` dispatch, where layers must agree). Ranks of
    different `kind_R` (R,), int64, do not take each other's label. The slots inside a rank keep their order.
    Guarantee: optimal for the given groups. Complexity O(L (R^2 E / 64 + R^3 + N^2 C^3)).
    Raises MismatchError for placements of different numbers of layers.
    """
    if len(current_LP) != len(target_LP):
        raise MismatchError(
            f"the current plan has {len(current_LP)} layers, the new one {len(target_LP)}; give plans of one model"
        )
    experts = int(max(current_LP.max(initial=0), target_LP.max(initial=0))) + 1
    now_LRE = held_LRE(current_LP, num_ranks, experts).astype(np.float32)
    new_LRE = held_LRE(target_LP, num_ranks, experts).astype(np.float32)
    # overlap[l, a, b]: experts kept if block b of the target gets label a
    overlap_LRR = np.rint(now_LRE @ new_LRE.transpose(0, 2, 1)).astype(np.int64)
    if kind_R is not None:
        never = 1 + int(overlap_LRR.sum())
        overlap_LRR -= never * (kind_R[:, None] != kind_R[None, :])
    width = ranks_per_node or num_ranks
    if common:
        order_LR = np.tile(_nested(overlap_LRR.sum(axis=0), width), (len(target_LP), 1))
    else:
        order_LR = np.stack([_nested(overlap_RR, width) for overlap_RR in overlap_LRR])
    relabelled = relabel_ranks(target_LP, order_LR)
    return relabelled, moves(current_LP, relabelled, num_ranks, ranks_per_node)


def _nested(overlap_RR: IntArray, width: int) -> IntArray:
    """block_R: which block each label gets, whole nodes of `width` ranks together."""
    nodes = len(overlap_RR) // width
    if nodes == 1 or width == 1:
        return _assign(overlap_RR)
    inner = np.empty((nodes, nodes, width), dtype=np.int64)
    value_NN = np.empty((nodes, nodes), dtype=np.int64)
    rows = np.arange(width)
    for label in range(nodes):
        for block in range(nodes):
            part = overlap_RR[label * width : (label + 1) * width, block * width : (block + 1) * width]
            inner[label, block] = _assign(part)
            value_NN[label, block] = part[rows, inner[label, block]].sum()
    node_N = _assign(value_NN)
    return np.concatenate([node_N[label] * width + inner[label, node_N[label]] for label in range(nodes)])


def _assign(value: IntArray) -> IntArray:
    """The column of each row in an assignment of largest value; the identity where that is one."""
    size = len(value)
    if not value.any():
        return np.arange(size)
    # one unit for the identity, too little to outweigh a move: a placement that stays is not relabelled
    cost = (value.max() - value) * (size + 1) - np.eye(size, dtype=np.int64)
    solver = linear_sum_assignment.SimpleLinearSumAssignment()
    row, column = np.indices(value.shape)
    solver.add_arcs_with_cost(row.ravel(), column.ravel(), np.ascontiguousarray(cost.ravel()))
    assert solver.solve() == solver.OPTIMAL
    return np.array([solver.right_mate(at) for at in range(size)], dtype=np.int64)
