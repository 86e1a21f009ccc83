"""Which physical slot serves each (token, expert) pair: the engines' replica choices and ours.

Legend: E logical experts, N replicas of one expert, P slots, R ranks, S source ranks, T tokens, K top-k.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.modes import ReplicaChoice

__all__ = ["LayerSlots", "choose_slots", "layer_slots", "serve_sets", "served_share"]

IntArray = npt.NDArray[np.int64]
FIBONACCI_32 = np.uint64(2654435769)
LOW_32 = np.uint64(0xFFFFFFFF)


@dataclass(frozen=True, slots=True)
class LayerSlots:
    """One layer of a plan, turned round: from expert to slots.

    slot_EN int64, -1 padded; count_E replicas per expert (0 where an expert has no slot); rank_P rank of each slot;
    share_P share of its expert's tokens each slot should get; node_R node of each rank.
    """

    slot_EN: IntArray
    count_E: IntArray
    rank_P: IntArray
    share_P: npt.NDArray[np.float64]
    node_R: IntArray

    @property
    def num_ranks(self) -> int:
        """R, ranks."""
        return len(self.node_R)


def layer_slots(
    slot_expert_P: IntArray,
    num_experts: int,
    num_ranks: int,
    ranks_per_node: int,
    share_P: npt.NDArray[np.float64] | None = None,
) -> LayerSlots:
    """The inverse of one row of a plan. Slots holding -1 are empty."""
    num_slots = len(slot_expert_P)
    used = np.flatnonzero(slot_expert_P >= 0)
    order = used[np.argsort(slot_expert_P[used], kind="stable")]
    expert = slot_expert_P[order]
    count_E = np.bincount(expert, minlength=num_experts)
    first_E = np.concatenate(([0], np.cumsum(count_E)[:-1]))
    slot_EN = np.full((num_experts, max(1, int(count_E.max(initial=1)))), -1, dtype=np.int64)
    slot_EN[expert, np.arange(len(order)) - first_E[expert]] = order
    if share_P is None:
        share_P = np.zeros(num_slots)
        share_P[used] = 1.0 / count_E[slot_expert_P[used]]
    ranks = np.arange(num_ranks)
    return LayerSlots(
        slot_EN=slot_EN,
        count_E=count_E.astype(np.int64),
        rank_P=np.arange(num_slots) // (num_slots // num_ranks),
        share_P=share_P,
        node_R=ranks // ranks_per_node,
    )


def choose_slots(
    slots: LayerSlots,
    choice: ReplicaChoice,
    expert_TK: npt.NDArray[np.integer],
    source_T: IntArray,
    token_T: IntArray,
) -> IntArray:
    """The slot that serves each chosen expert, int64 (T, K); -1 where expert_TK is not a placed expert.

    `source_T` is the rank a token's attention runs on, `token_T` its index (for the hashing rules). The rules:

    visit_first       experts with one slot first. Then an expert with a replica on a rank so visited is served there.
                      While experts remain, the rank that holds most of them serves all that it holds; of equal ranks
                      the token's source rank, else one by hash. Every hash draws in proportion to `share_P`.
                      Stateless: every rank computes the same answer. Ours; see docs/decisions/0004 and 0007.
    nearest           SGLang static: per source rank, a replica on that rank, else on its node, else a fixed fair draw.
    local_or_uniform  SGLang dynamic: the local replica if there is one, else uniform over all.
    token_hash        vLLM: (token * 2654435769 mod 2^32) mod replicas.
    fixed_source      vllm-ascend: source rank mod replicas.
    round_robin       TensorRT-LLM: each source rank deals its tokens to the replicas in turn, from its own index on.
    """
    num_experts = len(slots.count_E)
    legal_TK = (expert_TK >= 0) & (expert_TK < num_experts)
    expert = np.where(legal_TK, expert_TK, 0).astype(np.int64)
    slot_TK = slots.slot_EN[expert, 0]
    slot_TK[~legal_TK] = -1
    several_TK = legal_TK & (slots.count_E[expert] > 1)
    if not several_TK.any():
        return slot_TK
    if choice == "visit_first":
        _visit_first(slots, expert, legal_TK, several_TK, source_T, token_T, slot_TK)
        return slot_TK
    row, column = np.nonzero(several_TK)
    chosen = expert[row, column]
    count = slots.count_E[chosen]
    source = source_T[row]
    if choice == "token_hash":
        pick = ((token_T[row].astype(np.uint64) * FIBONACCI_32) & LOW_32).astype(np.int64) % count
    elif choice == "fixed_source":
        pick = source % count
    elif choice == "round_robin":
        pick = (_turn(chosen, source) + source) % count
    elif choice == "nearest":
        pick = _nearest_table(slots)[source, chosen]
    else:
        candidate_N = slots.slot_EN[chosen]
        local = (slots.rank_P[candidate_N] == source[:, None]) & (candidate_N >= 0)
        uniform = (_unit_hash(token_T[row], chosen) * count).astype(np.int64)
        pick = np.where(local.any(axis=1), local.argmax(axis=1), uniform)
    slot_TK[row, column] = slots.slot_EN[chosen, pick]
    return slot_TK


def serve_sets(slots: LayerSlots, choice: ReplicaChoice, expert_HK: npt.NDArray[np.integer]) -> IntArray:
    """The slot that serves each expert of each set of a profile, (H, K), where source ranks are unknown.

    visit_first with source ranks dealt by hash of the set's index; every other choice as a uniform draw by that hash.
    """
    index_H = np.arange(len(expert_HK))
    if choice != "visit_first":
        return choose_slots(slots, "local_or_uniform", expert_HK, np.full_like(index_H, -1), index_H)
    source_H = (_unit_hash(index_H, np.full_like(index_H, len(slots.count_E))) * slots.num_ranks).astype(np.int64)
    return choose_slots(slots, "visit_first", expert_HK, source_H, index_H)


def served_share(slots: LayerSlots, slot_HK: IntArray, weight_H: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Share of its expert's tokens that each slot serves when sets are served so, (P,); as planned where unused."""
    used = slot_HK >= 0
    weight_HK = np.broadcast_to(weight_H[:, None], slot_HK.shape)
    load_P = np.bincount(slot_HK[used], weights=weight_HK[used], minlength=len(slots.rank_P))
    exists = slots.slot_EN >= 0
    total_E = np.where(exists, load_P[slots.slot_EN], 0.0).sum(axis=1)
    share_P = slots.share_P.copy()
    expert, replica = np.nonzero(exists & (total_E[:, None] > 0))
    slot = slots.slot_EN[expert, replica]
    share_P[slot] = load_P[slot] / total_E[expert]
    return share_P


def _visit_first(
    slots: LayerSlots,
    expert_TK: IntArray,
    legal_TK: npt.NDArray[np.bool_],
    several_TK: npt.NDArray[np.bool_],
    source_T: IntArray,
    token_T: IntArray,
    slot_TK: IntArray,
) -> None:
    """Fills slot_TK where several_TK: one vectorised step for the ranks visited anyway, one per further rank."""
    hit_T = np.flatnonzero(several_TK.any(axis=1))
    expert_TK, open_TK = expert_TK[hit_T], several_TK[hit_T]
    visited_TR = np.zeros((len(hit_T), slots.num_ranks), dtype=bool)
    row, column = np.nonzero(legal_TK[hit_T] & ~open_TK & (slot_TK[hit_T] >= 0))
    visited_TR[row, slots.rank_P[slot_TK[hit_T[row], column]]] = True
    row, column = np.nonzero(open_TK)
    candidate_N = slots.slot_EN[expert_TK[row, column]]
    seen_N = visited_TR[row[:, None], slots.rank_P[candidate_N]] & (candidate_N >= 0)
    served = seen_N.any(axis=1)
    row, column = row[served], column[served]
    hashed = _unit_hash(token_T[hit_T[row]], expert_TK[row, column])
    slot_TK[hit_T[row], column] = _draw(slots, candidate_N[served], seen_N[served], hashed)
    open_TK[row, column] = False
    share_ER = np.zeros((len(slots.count_E), slots.num_ranks))
    expert, replica = np.nonzero(slots.slot_EN >= 0)
    slot = slots.slot_EN[expert, replica]
    np.add.at(share_ER, (expert, slots.rank_P[slot]), np.maximum(slots.share_P[slot], 1e-9))
    # each expert's ranks once, and the share it has there, in rank order
    ranks_E = (share_ER > 0).sum(axis=1)
    rank_EN = np.argsort(share_ER == 0, axis=1, kind="stable")[:, : int(ranks_E.max(initial=1))]
    row = np.flatnonzero(open_TK.any(axis=1))
    while len(row):
        at, column = np.nonzero(open_TK[row])
        expert = expert_TK[row[at], column]
        pair, nth = np.nonzero(np.arange(rank_EN.shape[1]) < ranks_E[expert, None])
        rank = rank_EN[expert[pair], nth]
        key, shape, size = at[pair] * slots.num_ranks + rank, (len(row), slots.num_ranks), len(row) * slots.num_ranks
        held_R = np.bincount(key, minlength=size).reshape(shape)
        share_R = np.bincount(key, weights=share_ER[expert[pair], rank], minlength=size).reshape(shape)
        best_R = held_R == held_R.max(axis=1, keepdims=True)
        first = expert_TK[row, np.where(open_TK[row], expert_TK[row], len(slots.count_E)).argmin(axis=1)]
        ladder = np.cumsum(np.where(best_R, share_R, 0.0), axis=1)
        level = _unit_hash(token_T[hit_T[row]], first)[:, None] * ladder[:, -1:]
        rank = (ladder <= level).sum(axis=1)
        source = source_T[hit_T[row]]
        rank = np.where((source >= 0) & best_R[np.arange(len(row)), source], source, rank)
        at, column = np.nonzero(open_TK[row] & (share_ER[expert_TK[row], rank[:, None]] > 0))
        expert, token = expert_TK[row[at], column], hit_T[row[at]]
        candidate_N = slots.slot_EN[expert]
        here_N = (slots.rank_P[candidate_N] == rank[at, None]) & (candidate_N >= 0)
        slot_TK[token, column] = _draw(slots, candidate_N, here_N, _unit_hash(token_T[token], expert))
        open_TK[row[at], column] = False
        row = row[open_TK[row].any(axis=1)]


def _draw(
    slots: LayerSlots, candidate_N: IntArray, pool_N: npt.NDArray[np.bool_], hashed: npt.NDArray[np.float64]
) -> IntArray:
    """One slot of each row's pool, by its hash in [0, 1), in proportion to the shares."""
    ladder = np.cumsum(np.where(pool_N, np.maximum(slots.share_P[candidate_N], 1e-9), 0.0), axis=1)
    pick = (ladder <= hashed[:, None] * ladder[:, -1:]).sum(axis=1)
    return np.asarray(candidate_N[np.arange(len(pick)), pick])


def _unit_hash(token: IntArray, expert: IntArray) -> npt.NDArray[np.float64]:
    """A number in [0, 1) from (token, expert): the finaliser of MurmurHash3, so that neighbours differ."""
    with np.errstate(over="ignore"):
        x = token.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + expert.astype(np.uint64)
        x = (x ^ (x >> np.uint64(33))) * np.uint64(0xFF51AFD7ED558CCD)
        x = (x ^ (x >> np.uint64(33))) * np.uint64(0xC4CEB9FE1A85EC53)
        x = x ^ (x >> np.uint64(33))
    return (x >> np.uint64(11)).astype(np.float64) * 2.0**-53


def _turn(expert: IntArray, source: IntArray) -> IntArray:
    """How many earlier entries have the same (expert, source): the round-robin counters."""
    key = expert * (int(source.max(initial=0)) + 1) + source
    order = np.argsort(key, kind="stable")
    key_sorted = key[order]
    starts = np.flatnonzero(np.concatenate(([True], key_sorted[1:] != key_sorted[:-1])))
    length = np.diff(np.concatenate((starts, [len(key)])))
    turn = np.empty(len(key), dtype=np.int64)
    turn[order] = np.arange(len(key)) - np.repeat(starts, length)
    return turn


def _nearest_table(slots: LayerSlots) -> IntArray:
    """pick_SE: which replica source rank s uses for expert e. The fixed draw is seeded with 42, as SGLang's is."""
    rng = np.random.default_rng(42)
    num_experts = len(slots.count_E)
    table = np.zeros((slots.num_ranks, num_experts), dtype=np.int64)
    for expert in np.flatnonzero(slots.count_E > 1):
        count = int(slots.count_E[expert])
        rank_N = slots.rank_P[slots.slot_EN[expert, :count]]
        fair = rng.permutation(np.resize(np.arange(count), slots.num_ranks))
        for source in range(slots.num_ranks):
            same_rank = np.flatnonzero(rank_N == source)
            same_node = np.flatnonzero(slots.node_R[rank_N] == slots.node_R[source])
            if len(same_rank):
                table[source, expert] = same_rank[0]
            elif len(same_node):
                table[source, expert] = same_node[fair[source] % len(same_node)]
            else:
                table[source, expert] = fair[source]
    return table
