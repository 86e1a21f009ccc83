"""Rank labels aligned over layers, so that a token's next expert is more often on the rank it is on.

Permuting the ranks of one layer changes neither load nor ranks touched, only which transitions stay local: on a uniform
network a chain of L - 1 linear assignments is exact for fixed groups (MoETuner's second ILP, made polynomial).

Legend: L layers, P slots, E experts, R ranks.
"""

import numpy as np
import numpy.typing as npt

from solvers.affinity.matching import heaviest_matching

__all__ = ["align_ranks"]

IntArray = npt.NDArray[np.int64]


def align_ranks(slot_expert_LP: IntArray, transition_LEE: IntArray, num_ranks: int) -> IntArray:
    """The old rank for each rank of each layer that keeps the most transitions on one rank, (L, R).

    Apply it with `solvers.ranks.relabel_ranks`, to slots and to shares of slots. Replicas are taken to share their
    expert's transitions equally. Guarantee: optimal for the given groups. O(L (E^2 + R^3)).
    Reference: MoETuner's ILP 2 (arXiv 2502.06643, section 4.2) with equal bandwidths.
    """
    layers, slots = slot_expert_LP.shape
    experts = transition_LEE.shape[1]
    blocks = slot_expert_LP.reshape(layers, num_ranks, slots // num_ranks)
    order_LR = np.tile(np.arange(num_ranks), (layers, 1))
    held_before = _held(blocks[0], experts)
    for layer in range(1, layers):
        held = _held(blocks[layer], experts)
        kept_RR = held_before @ transition_LEE[layer - 1] @ held.T
        order_LR[layer] = heaviest_matching(kept_RR)
        held_before = held[order_LR[layer]]
    return order_LR


def _held(block_RC: IntArray, experts: int) -> npt.NDArray[np.float64]:
    """Share of each expert's tokens served by each rank, (R, E)."""
    held = np.zeros((len(block_RC), experts))
    rank, column = np.nonzero(block_RC >= 0)
    held[rank, block_RC[rank, column]] = 1.0
    share: npt.NDArray[np.float64] = held / np.maximum(1.0, held.sum(axis=0))
    return share
