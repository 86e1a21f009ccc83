"""MoETuner's second integer program on a network of one bandwidth, solved exactly in polynomial time.

    min sum_l max over c, c' on different ranks of flow[l, c, c']

Relabelling the ranks of layer l + 1, and of all layers after it alike, does not disturb the pairs of layers before it,
so the pairs separate. In one pair every row and every column of the flow can have one entry on one rank and no more:
the largest entry left over is at least the second largest of every row and column. That bound T is met: the entries
above T lie at most one to a row and a column, so they are a partial matching, which can always be completed.

Legend: L routing sites, C clusters (as many as ranks).
"""

import numpy as np
import numpy.typing as npt

from solvers.affinity.matching import heaviest_matching

__all__ = ["assign_ranks_uniform", "heaviest_unavoidable"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]


def assign_ranks_uniform(flow_LCC: FloatArray) -> tuple[IntArray, float]:
    """Rank of each cluster, (L, C), and sum over layer pairs of the largest flow between two ranks, in flow's unit.

    `flow_LCC` (L - 1, C, C), not negative, is what goes from cluster c of layer l to cluster c' of layer l + 1. Layer 0
    keeps its labels. Among the optimal labellings the one that keeps the most flow on its rank is taken, pair by pair.

    Guarantee: optimal for the given clusters. Complexity: O(L C^3).
    Reference: MoETuner (arXiv 2502.06643, section 4.2), ILP 2 with equal B, without its whole-model memory row.
    """
    pairs, clusters, _ = flow_LCC.shape
    rank_LC = np.empty((pairs + 1, clusters), dtype=np.int64)
    rank_LC[0] = np.arange(clusters)
    objective = 0.0
    for pair, flow_CC in enumerate(flow_LCC):
        partner_C = _partners(flow_CC)
        rank_LC[pair + 1, partner_C] = rank_LC[pair]
        objective += float(_without_partners(flow_CC, partner_C).max())
    return rank_LC, objective


def heaviest_unavoidable(flow_CC: FloatArray) -> float:
    """The least possible largest flow between two ranks in one pair of layers: the second largest of some line."""
    if len(flow_CC) < 2:
        return 0.0
    return max(float(np.sort(flow_CC, axis=axis).take(-2, axis=axis).max()) for axis in (0, 1))


def _partners(flow_CC: FloatArray) -> IntArray:
    """The cluster of the next layer that shares a rank with each cluster, (C,)."""
    partner_C = np.full(len(flow_CC), -1, dtype=np.int64)
    above, onto = np.nonzero(flow_CC > heaviest_unavoidable(flow_CC))
    partner_C[above] = onto
    rows = np.flatnonzero(partner_C < 0)
    columns = np.setdiff1d(np.arange(len(flow_CC)), onto)
    if len(rows):
        partner_C[rows] = columns[heaviest_matching(flow_CC[np.ix_(rows, columns)])]
    return partner_C


def _without_partners(flow_CC: FloatArray, partner_C: IntArray) -> FloatArray:
    rest_CC = flow_CC.copy()
    rest_CC[np.arange(len(rest_CC)), partner_C] = 0.0
    return rest_CC
