"""Placements in the forms that searches work on: the rank of each expert, and blocks of slots under other labels.

Legend: L layers, E experts, P slots, R ranks.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.plan import canonical_slots

__all__ = ["rank_of_expert", "relabel_ranks", "slots_of_ranks"]

IntArray = npt.NDArray[np.int64]


def slots_of_ranks(rank_LE: IntArray, num_ranks: int, width: int | None = None) -> IntArray:
    """slot_expert_LP of a placement given as the rank of each expert, equal counts per rank.

    With `width` counts may differ: every rank has so many slots, and -1 in those it does not use.
    """
    order_LE = np.argsort(rank_LE, axis=1, kind="stable")
    if width is None:
        return canonical_slots(order_LE, num_ranks)
    slots = np.full((len(rank_LE), num_ranks, width), -1, dtype=np.int64)
    for layer, (rank_E, order_E) in enumerate(zip(rank_LE, order_LE, strict=True)):
        ranks = rank_E[order_E]
        slots[layer, ranks, np.arange(len(ranks)) - np.searchsorted(ranks, ranks)] = order_E
    return slots.reshape(len(rank_LE), -1)


def rank_of_expert(slots_LP: IntArray, num_ranks: int, experts: int) -> IntArray:
    """Rank of each expert of a placement without replicas, (L, E)."""
    # empty slots (-1) come first
    return np.argsort(slots_LP, axis=1, kind="stable")[:, -experts:] // (slots_LP.shape[1] // num_ranks)


def relabel_ranks(array_LP: npt.NDArray[Any], order_LR: IntArray) -> npt.NDArray[Any]:
    """Slots, or shares of slots, with the block of old rank order[l, r] on rank r of layer l, (L, P)."""
    layers, ranks = order_LR.shape
    blocks = array_LP.reshape(layers, ranks, -1)
    return np.take_along_axis(blocks, order_LR[:, :, None], axis=1).reshape(array_LP.shape)
