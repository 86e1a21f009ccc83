"""From a plan and routed tokens to traffic: who sends how many copies to whom, in every dispatch mode.

Legend: T tokens, K top-k, W windows (iterations), R ranks, P slots. All counts are token copies, not bytes.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.modes import DispatchMode
from placer.core.plan import Plan
from placer.core.replicas import LayerSlots, choose_slots, layer_slots

__all__ = ["LayerTraffic", "assign_layer", "layer_traffic", "source_ranks"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LayerTraffic:
    """What one layer moves and computes in each window under `mode`.

    legs_WRR      one (W, R, R) array per dispatch leg, in order; entry [w, a, b] = copies that rank a sends to rank b.
                  per_node has two legs (over the network to the entry rank, then inside the node), the others one.
    returns_WRR   the combine legs, in order.
    tokens_WP     (token, expert) pairs each slot computes.
    home_WR       tokens whose attention runs on each rank.
    ranks_touched, nodes_touched, pairs, placed_tokens   totals over all windows;
                  placed_tokens = tokens with any expert.
    """

    mode: DispatchMode
    legs_WRR: tuple[IntArray, ...]
    returns_WRR: tuple[IntArray, ...]
    tokens_WP: IntArray
    home_WR: IntArray
    ranks_touched: int
    nodes_touched: int
    pairs: int
    placed_tokens: int


def source_ranks(request_id_T: npt.NDArray[np.integer], num_ranks: int) -> IntArray:
    """The default request placement: the i-th distinct request (by id) runs its attention on rank i mod R, (T,).

    With fewer requests than ranks (a trace without request ids is one request) tokens are dealt in turn instead.
    """
    ids, index = np.unique(request_id_T, return_inverse=True)
    if len(ids) < num_ranks:
        return np.arange(len(request_id_T), dtype=np.int64) % num_ranks
    return (index.reshape(-1) % num_ranks).astype(np.int64)


def assign_layer(
    plan: Plan, layer: int, expert_TK: npt.NDArray[np.integer], source_T: IntArray, token_T: IntArray
) -> tuple[IntArray, LayerSlots]:
    """Serving slot of every (token, expert) pair of row `layer`, (T, K), -1 where none; and the layer's slot tables."""
    share = None if plan.replica_share_LP is None else plan.replica_share_LP[layer]
    slots = layer_slots(plan.slot_expert_LP[layer], plan.num_experts, plan.num_ranks, plan.ranks_per_node, share)
    return choose_slots(slots, plan.replica_choice, expert_TK, source_T, token_T), slots


def layer_traffic(
    slots: LayerSlots,
    mode: DispatchMode,
    slot_TK: IntArray,
    location_T: IntArray,
    window_T: IntArray,
    num_windows: int,
) -> tuple[LayerTraffic, IntArray]:
    """Traffic of one layer, and where each token is afterwards (T,).

    `location_T` is the rank that holds the token before the layer: its source rank, or in `coherent` mode the rank of
    its first expert in the layer before. In `coherent` mode with k > 1 the copies go to every rank touched and the
    partial results meet on the rank of the first (heaviest) expert; for k = 1 that is ExFlow's single all-to-all.
    """
    num_ranks, num_slots = slots.num_ranks, len(slots.rank_P)
    node_R = slots.node_R
    placed_TK = slot_TK >= 0
    token, _ = np.nonzero(placed_TK)
    slot = slot_TK[placed_TK]
    rank = slots.rank_P[slot]
    touched_TR = np.zeros((len(slot_TK), num_ranks), dtype=bool)
    touched_TR[token, rank] = True
    visitor, visited = np.nonzero(touched_TR)
    num_nodes = int(node_R[-1]) + 1
    touched_TN = touched_TR if num_nodes == num_ranks else np.zeros((len(slot_TK), num_nodes), dtype=bool)
    if touched_TN is not touched_TR:
        touched_TN[visitor, node_R[visited]] = True

    def matrix(tokens: IntArray, senders: IntArray, receivers: IntArray) -> IntArray:
        key = (window_T[tokens] * num_ranks + senders) * num_ranks + receivers
        count = np.bincount(key, minlength=num_windows * num_ranks * num_ranks)
        return count.reshape(num_windows, num_ranks, num_ranks).astype(np.int64)

    def without_self(tokens: IntArray, senders: IntArray, receivers: IntArray) -> IntArray:
        away = senders != receivers
        return matrix(tokens[away], senders[away], receivers[away])

    after_T = location_T
    legs: tuple[IntArray, ...]
    returns: tuple[IntArray, ...]
    if mode == "per_expert":
        legs = (without_self(token, location_T[token], rank),)
        returns = (legs[0].transpose(0, 2, 1),)
    elif mode == "per_rank":
        legs = (without_self(visitor, location_T[visitor], visited),)
        returns = (legs[0].transpose(0, 2, 1),)
    elif mode == "per_node":
        ranks_per_node = num_ranks // num_nodes
        traveller, node = np.nonzero(touched_TN)
        home = location_T[traveller]
        entry = np.where(node == node_R[home], home, node * ranks_per_node + home % ranks_per_node)
        across = without_self(traveller, home, entry)
        home = location_T[visitor]
        node = node_R[visited]
        entry = np.where(node == node_R[home], home, node * ranks_per_node + home % ranks_per_node)
        inside = without_self(visitor, entry, visited)
        legs = (across, inside)
        returns = (inside.transpose(0, 2, 1), across.transpose(0, 2, 1))
    elif mode == "coherent":
        first_T = placed_TK.argmax(axis=1)
        first_slot = slot_TK[np.arange(len(slot_TK)), first_T]
        after_T = np.where(first_slot >= 0, slots.rank_P[first_slot], location_T)
        legs = (without_self(visitor, location_T[visitor], visited),)
        returns = (without_self(visitor, visited, after_T[visitor]),)
    else:
        everyone = _home(location_T, window_T, num_windows, num_ranks)
        spread = np.repeat(everyone[:, :, None], num_ranks, axis=2)
        spread[:, np.arange(num_ranks), np.arange(num_ranks)] = 0
        legs = (spread,)
        returns = (spread.transpose(0, 2, 1),)

    tokens_WP = np.bincount(window_T[token] * num_slots + slot, minlength=num_windows * num_slots)
    traffic = LayerTraffic(
        mode=mode,
        legs_WRR=legs,
        returns_WRR=returns,
        tokens_WP=tokens_WP.reshape(num_windows, num_slots).astype(np.int64),
        home_WR=_home(location_T, window_T, num_windows, num_ranks),
        ranks_touched=len(visitor),
        nodes_touched=int(touched_TN.sum()),
        pairs=len(slot),
        placed_tokens=int(placed_TK.any(axis=1).sum()),
    )
    return traffic, after_T


def _home(location_T: IntArray, window_T: IntArray, num_windows: int, num_ranks: int) -> IntArray:
    count = np.bincount(window_T * num_ranks + location_T, minlength=num_windows * num_ranks)
    return count.reshape(num_windows, num_ranks).astype(np.int64)
