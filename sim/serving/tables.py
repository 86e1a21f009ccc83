"""A plan turned round for the counting kernels: for every layer and expert its slots, for every slot its rank.

Legend: L layers, E experts, N replicas of one expert, P slots, R ranks, S source ranks.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from placer.core.modes import DISPATCH_MODES, REPLICA_CHOICES, DispatchMode
from placer.core.plan import Plan
from placer.core.replicas import choose_slots, layer_slots

__all__ = ["SlotTables", "slot_tables"]

LEAST_SHARE = 1e-9
"""A replica that is planned to serve nothing may still have to, as in placer.core.replicas."""


class SlotTables(NamedTuple):
    """Read-only arrays of one plan.

    slot_LEN            slots of each expert, -1 padded        count_LE   how many it has
    weight_LEN          share of the expert's tokens that each of those slots should get
    held_LEN, held_weight_LEN   the same by distinct rank, in rank order; -1 padded
    fixed_LSE           the slot where it depends on source rank and expert only (nearest, fixed_source), else (0, 0, 0)
    rank_P, node_R      rank of each slot, node of each rank
    mode, choice        positions in DISPATCH_MODES and REPLICA_CHOICES
    """

    slot_LEN: npt.NDArray[np.int32]
    count_LE: npt.NDArray[np.int32]
    weight_LEN: npt.NDArray[np.float64]
    held_LEN: npt.NDArray[np.int32]
    held_weight_LEN: npt.NDArray[np.float64]
    fixed_LSE: npt.NDArray[np.int32]
    rank_P: npt.NDArray[np.int32]
    node_R: npt.NDArray[np.int32]
    mode: int
    choice: int


def slot_tables(plan: Plan, mode: DispatchMode) -> SlotTables:
    """The tables of `plan` under `mode`. Memory O(L E N), and O(L R E) for nearest and fixed_source."""
    layers, slots = plan.slot_expert_LP.shape
    experts, ranks = plan.num_experts, plan.num_ranks
    count_LE = np.zeros((layers, experts), dtype=np.int32)
    for layer, slot_expert_P in enumerate(plan.slot_expert_LP):
        count_LE[layer] = np.bincount(slot_expert_P[slot_expert_P >= 0], minlength=experts)
    most = max(1, int(count_LE.max()))
    shape = (layers, experts, most)
    slot_LEN, held_LEN = (np.full(shape, -1, dtype=np.int32) for _ in range(2))
    weight_LEN, held_weight_LEN = np.zeros(shape), np.zeros(shape)
    tabulated = plan.replica_choice in ("nearest", "fixed_source") and most > 1
    fixed_LSE = np.full((layers, ranks, experts) if tabulated else (0, 0, 0), -1, dtype=np.int32)
    for layer in range(layers):
        share = None if plan.replica_share_LP is None else plan.replica_share_LP[layer]
        table = layer_slots(plan.slot_expert_LP[layer], experts, ranks, plan.ranks_per_node, share)
        slot_LEN[layer, :, : table.slot_EN.shape[1]] = table.slot_EN
        weight_LEN[layer] = np.where(slot_LEN[layer] >= 0, np.maximum(table.share_P[slot_LEN[layer]], LEAST_SHARE), 0.0)
        _by_rank(slot_LEN[layer], weight_LEN[layer], table.rank_P, held_LEN[layer], held_weight_LEN[layer])
        if tabulated:
            source, expert = (grid.reshape(-1) for grid in np.mgrid[:ranks, :experts])
            chosen = choose_slots(table, plan.replica_choice, expert[:, None], source, source)
            fixed_LSE[layer] = chosen.reshape(ranks, experts)
    return SlotTables(
        slot_LEN=slot_LEN,
        count_LE=count_LE,
        weight_LEN=weight_LEN,
        held_LEN=held_LEN,
        held_weight_LEN=held_weight_LEN,
        fixed_LSE=fixed_LSE,
        rank_P=(np.arange(slots) // (slots // ranks)).astype(np.int32),
        node_R=(np.arange(ranks) // plan.ranks_per_node).astype(np.int32),
        mode=DISPATCH_MODES.index(mode),
        choice=REPLICA_CHOICES.index(plan.replica_choice),
    )


def _by_rank(
    slot_EN: npt.NDArray[np.int32],
    weight_EN: npt.NDArray[np.float64],
    rank_P: npt.NDArray[np.int64],
    held_EN: npt.NDArray[np.int32],
    held_weight_EN: npt.NDArray[np.float64],
) -> None:
    """Fills the last two: slots are in slot order, hence in rank order, and those of one rank lie side by side."""
    place_E = np.full(len(slot_EN), -1)
    last_E = np.full(len(slot_EN), -1)
    for replica in range(slot_EN.shape[1]):
        expert = np.flatnonzero(slot_EN[:, replica] >= 0)
        rank = rank_P[slot_EN[expert, replica]]
        place_E[expert] += rank != last_E[expert]
        last_E[expert] = rank
        held_EN[expert, place_E[expert]] = rank
        held_weight_EN[expert, place_E[expert]] += weight_EN[expert, replica]
