"""A placement carried over to more or fewer ranks with the fewest experts moved and equal counts on the new ranks.

ElasticMoE adds and removes accelerators while it serves; attention and caches stay, experts are "globally remapped to
balance counts with least transfer". The paper gives no formula; this one is exact: per layer a transportation problem
in which an expert that stays costs 0 and one that is sent costs 1.

Legend: L layers, E experts, P slots, R ranks before, N ranks after, C slots of a rank after.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from ortools.graph.python import min_cost_flow

from placer.core.errors import InfeasibleError, UsageError
from placer.core.migration import Moves, held_LRE, moves

__all__ = ["Rescaled", "fewest_moves", "rescale"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Rescaled:
    """A placement on new ranks and how to get there.

    slot_expert_LP  int64 (L, N * C), block n on rank `ranks[n]`; -1 where the counts do not come out even
    moves           with rank ids as in `ranks` and the placement before
    bound_L         copies that must be sent in any balanced placement (closed form, no replicas: equal to the moves)
    """

    slot_expert_LP: IntArray
    ranks: tuple[int, ...]
    moves: Moves
    bound_L: IntArray


def rescale(slot_expert_LP: IntArray, num_ranks: int, ranks: Sequence[int]) -> Rescaled:
    """The placement on ids `ranks` (old ids 0 to num_ranks - 1 stay, larger ones are new) with the fewest moves.

    Every expert keeps its number of replicas, or gets as many as there are ranks; counts on two ranks differ by one at
    most. Guarantee: optimal (min-cost flow, integral). Complexity O(L) flows of E + N nodes and E N arcs.
    Reference: ElasticMoE (arXiv 2510.02613), the minimal-cost plan of its scaling; the formula is ours.
    Raises UsageError for ids that repeat or are negative.
    """
    ids = np.array(ranks, dtype=np.int64)
    if not len(ids) or (ids < 0).any() or len(np.unique(ids)) != len(ids):
        raise UsageError(f"ranks is {list(ranks)}; give at least one rank id, from 0, none twice")
    now_LRE = held_LRE(slot_expert_LP, num_ranks)
    layers, _, experts = now_LRE.shape
    stay_LNE = np.zeros((layers, len(ids), experts), dtype=bool)
    old = ids < num_ranks
    stay_LNE[:, old] = now_LRE[:, ids[old]]
    need_LE = np.minimum(now_LRE.sum(axis=1), len(ids))
    width = -(-int(need_LE.sum(axis=1).max()) // len(ids))
    slots = np.full((layers, len(ids), width), -1, dtype=np.int64)
    for layer in range(layers):
        for row, held_E in enumerate(_balance(stay_LNE[layer], need_LE[layer])):
            here = np.flatnonzero(held_E)
            slots[layer, row, : len(here)] = here
    bound_L = np.array([fewest_moves(stay, need) for stay, need in zip(stay_LNE, need_LE, strict=True)])
    span = max(num_ranks, int(ids.max()) + 1)
    before = np.full((layers, span, slot_expert_LP.shape[1] // num_ranks), -1, dtype=np.int64)
    before[:, :num_ranks] = slot_expert_LP.reshape(layers, num_ranks, -1)
    after = np.full((layers, span, width), -1, dtype=np.int64)
    after[:, ids] = slots
    needed = moves(before.reshape(layers, -1), after.reshape(layers, -1), span)
    return Rescaled(slots.reshape(layers, -1), tuple(ids.tolist()), needed, bound_L)


def fewest_moves(stay_NE: npt.NDArray[np.bool_], need_E: IntArray) -> int:
    """A lower bound on the copies sent, exact without replicas.

    Copies whose rank is removed, plus what a rank that stays holds above its quota; the quotas that are larger by one
    go to the ranks that hold most. (`stay_NE`: what the new ranks hold already.)
    """
    ranks, total = len(stay_NE), int(need_E.sum())
    held_N = np.sort(stay_NE.sum(axis=1))[::-1]
    quota_N = total // ranks + (np.arange(ranks) < total % ranks)
    # every copy that a rank can keep is one that need not be sent
    return total - int(np.minimum(held_N, quota_N).sum())


def _balance(stay_NE: npt.NDArray[np.bool_], need_E: IntArray) -> npt.NDArray[np.bool_]:
    """held_NE with column sums `need_E`, row sums that differ by one at most, the fewest entries not in `stay_NE`."""
    ranks, experts = stay_NE.shape
    total = int(need_E.sum())
    flow = min_cost_flow.SimpleMinCostFlow()
    rank, expert = (index.ravel() for index in np.indices(stay_NE.shape))
    arcs = flow.add_arcs_with_capacity_and_unit_cost(
        expert, experts + rank, np.ones(len(rank), dtype=np.int64), 1 - stay_NE.ravel().astype(np.int64)
    )
    every = experts + np.arange(ranks)
    spare = experts + ranks
    flow.add_arcs_with_capacity_and_unit_cost(
        every, np.full(ranks, spare), np.ones(ranks, dtype=np.int64), np.zeros(ranks, dtype=np.int64)
    )
    supply = np.concatenate((need_E, np.full(ranks, -(total // ranks)), [-(total % ranks)]))
    flow.set_nodes_supplies(np.arange(len(supply)), supply)
    if flow.solve() != flow.OPTIMAL:
        raise InfeasibleError(f"{total} copies cannot be spread evenly over {ranks} ranks, replicas on distinct ones")
    return np.asarray(flow.flows(arcs)).reshape(ranks, experts) > 0
