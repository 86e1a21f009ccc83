"""Annealing with replicas on exact expert sets: which expert to replicate and where, as tokens will choose replicas.

Legend: H expert sets, K top-k, E experts, R ranks, N nodes, C slots per rank, I (expert, set) incidences.
At most 64 ranks: the ranks of an expert are the bits of one word.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["MAX_RANKS", "anneal_replicas", "serve_sets"]

MAX_RANKS = 64
IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Sets = npt.NDArray[np.int16]
ONE = np.uint64(1)


@njit(cache=True)
def _bit(rank: int) -> np.uint64:  # pragma: no cover - compiled
    return ONE << np.uint64(rank)


@njit(cache=True)
def _serve(
    expert_K: Sets,
    draw_K: npt.NDArray[np.uint32],
    rank_ER: npt.NDArray[np.int16],
    count_E: IntArray,
    mask_E: npt.NDArray[np.uint64],
    node_R: IntArray,
    visit_first: bool,
    pool_K: npt.NDArray[np.uint64],
) -> tuple[int, int]:  # pragma: no cover - compiled
    """Ranks and nodes touched by one set; fills pool_K with the ranks that share each expert's tokens.

    As placer.core.replicas: experts with one slot first; then, in order, a replica on a rank visited already where
    `visit_first`, else one by hash. The ranks touched follow one draw of the hash; the load is shared over all that
    could be drawn, or the search would learn the draws.
    """
    visited, nodes, ranks_touched, nodes_touched = np.uint64(0), np.uint64(0), 0, 0
    for turn in range(2):
        for k in range(len(expert_K)):
            expert = expert_K[k]
            if expert < 0 or (count_E[expert] > 1) != (turn == 1):
                continue
            rank = rank_ER[expert, 0]
            pool = mask_E[expert]
            if turn == 1:
                if visit_first and pool & visited:
                    pool = pool & visited
                options = 0
                for n in range(count_E[expert]):
                    if pool & _bit(rank_ER[expert, n]):
                        options += 1
                skip = draw_K[k] % options
                for n in range(count_E[expert]):
                    if pool & _bit(rank_ER[expert, n]):
                        if skip == 0:
                            rank = rank_ER[expert, n]
                            break
                        skip -= 1
            pool_K[k] = pool
            if not visited & _bit(rank):
                visited |= _bit(rank)
                ranks_touched += 1
                if not nodes & _bit(node_R[rank]):
                    nodes |= _bit(node_R[rank])
                    nodes_touched += 1
    return ranks_touched, nodes_touched


@njit(cache=True)
def _add_load(load_R: FloatArray, pool: np.uint64, amount: float) -> None:  # pragma: no cover - compiled
    """Adds `amount`, shared equally over the ranks in `pool`."""
    options = 0
    for rank in range(len(load_R)):
        if pool & _bit(rank):
            options += 1
    for rank in range(len(load_R)):
        if pool & _bit(rank):
            load_R[rank] += amount / options


@njit(cache=True)
def _tables(
    held_RC: IntArray, experts: int
) -> tuple[npt.NDArray[np.int16], IntArray, npt.NDArray[np.uint64]]:  # pragma: no cover - compiled
    ranks = held_RC.shape[0]
    rank_ER = np.full((experts, ranks), -1, dtype=np.int16)
    count_E = np.zeros(experts, dtype=np.int64)
    mask_E = np.zeros(experts, dtype=np.uint64)
    for rank in range(ranks):
        for expert in held_RC[rank]:
            rank_ER[expert, count_E[expert]] = rank
            count_E[expert] += 1
            mask_E[expert] |= _bit(rank)
    return rank_ER, count_E, mask_E


@njit(cache=True)
def _move(
    expert: int,
    old: int,
    new: int,
    rank_ER: npt.NDArray[np.int16],
    count_E: IntArray,
    mask_E: npt.NDArray[np.uint64],
) -> None:  # pragma: no cover - compiled
    """One replica of `expert` leaves rank `old` (-1: none does) and one comes to rank `new` (-1: none does)."""
    if old >= 0:
        for n in range(count_E[expert]):
            if rank_ER[expert, n] == old:
                for later in range(n, count_E[expert] - 1):
                    rank_ER[expert, later] = rank_ER[expert, later + 1]
                break
        count_E[expert] -= 1
        mask_E[expert] &= ~_bit(old)
    if new >= 0:
        # ranks stay in ascending order, so that equal placements are served alike
        at = count_E[expert]
        while at > 0 and rank_ER[expert, at - 1] > new:
            rank_ER[expert, at] = rank_ER[expert, at - 1]
            at -= 1
        rank_ER[expert, at] = new
        count_E[expert] += 1
        mask_E[expert] |= _bit(new)


@njit(cache=True)
def serve_sets(
    held_RC: IntArray,
    experts: int,
    node_R: IntArray,
    expert_HK: Sets,
    weight_H: IntArray,
    draw_HK: npt.NDArray[np.uint32],
    visit_first: bool,
) -> tuple[float, float, FloatArray]:  # pragma: no cover - compiled
    """Weighted ranks and nodes touched over all sets, and load_ER: tokens of each expert that each rank serves."""
    rank_ER, count_E, mask_E = _tables(held_RC, experts)
    load_ER = np.zeros((experts, len(node_R)))
    pool_K = np.zeros(expert_HK.shape[1], dtype=np.uint64)
    ranks_touched, nodes_touched = 0.0, 0.0
    for h in range(len(weight_H)):
        ranks, nodes = _serve(expert_HK[h], draw_HK[h], rank_ER, count_E, mask_E, node_R, visit_first, pool_K)
        ranks_touched += ranks * weight_H[h]
        nodes_touched += nodes * weight_H[h]
        for k in range(expert_HK.shape[1]):
            if expert_HK[h, k] >= 0:
                _add_load(load_ER[expert_HK[h, k]], pool_K[k], weight_H[h])
    return ranks_touched, nodes_touched, load_ER


@njit(cache=True)
def anneal_replicas(
    held_RC: IntArray,
    experts: int,
    node_R: IntArray,
    expert_HK: Sets,
    weight_H: IntArray,
    draw_HK: npt.NDArray[np.uint32],
    first_E: IntArray,
    set_I: npt.NDArray[np.int32],
    visit_first: bool,
    node_weight: float,
    par_weight: float,
    evaluations: int,
    hot: float,
    cold: float,
    rng: np.random.Generator,
) -> IntArray:  # pragma: no cover - compiled
    """Best held_RC found: ranks touched + node_weight * nodes touched + par_weight * max / mean load, over all sets.

    Moves: exchange two slots of different ranks; or give a slot of an expert with several replicas to another expert.
    Stops after `evaluations` sets were served anew; the temperature falls geometrically with that count.
    """
    held_RC = held_RC.copy()
    ranks, width = held_RC.shape
    sets, top_k = expert_HK.shape
    rank_ER, count_E, mask_E = _tables(held_RC, experts)
    pool_HK = np.zeros((sets, top_k), dtype=np.uint64)
    cost_H = np.zeros(sets)
    load_R = np.zeros(ranks)
    for h in range(sets):
        r, n = _serve(expert_HK[h], draw_HK[h], rank_ER, count_E, mask_E, node_R, visit_first, pool_HK[h])
        cost_H[h] = (r + node_weight * n) * weight_H[h]
        for k in range(top_k):
            if expert_HK[h, k] >= 0:
                _add_load(load_R, pool_HK[h, k], weight_H[h])
    scale = par_weight * ranks / max(load_R.sum(), 1e-300)
    cost, par_cost = cost_H.sum(), load_R.max() * scale
    best, best_RC = cost + par_cost, held_RC.copy()
    room = 1
    for expert in range(experts):
        room = max(room, first_E[expert + 1] - first_E[expert])
    touched_H = np.zeros(2 * room, dtype=np.int64)
    new_cost = np.zeros(2 * room)
    new_pool = np.zeros((2 * room, top_k), dtype=np.uint64)
    done, idle = 0, 0
    while done < evaluations and idle < 10_000:
        idle += 1
        temperature = hot * (cold / hot) ** (done / evaluations)
        a, i = int(rng.integers(0, ranks)), int(rng.integers(0, width))
        one = held_RC[a, i]
        b, j, two = -1, -1, -1
        if rng.random() < 0.5:
            b, j = int(rng.integers(0, ranks)), int(rng.integers(0, width))
            two = held_RC[b, j]
            if a == b or one == two or mask_E[one] & _bit(b) or mask_E[two] & _bit(a):
                continue
            _move(one, a, b, rank_ER, count_E, mask_E)
            _move(two, b, a, rank_ER, count_E, mask_E)
        else:
            two = int(rng.integers(0, experts))
            if count_E[one] == 1 or mask_E[two] & _bit(a):
                continue
            _move(one, a, -1, rank_ER, count_E, mask_E)
            _move(two, -1, a, rank_ER, count_E, mask_E)
        idle = 0
        new_load_R = load_R.copy()
        change, count = 0.0, 0
        for part in range(2):
            expert, skip = (one, two) if part == 0 else (two, one)
            for at in range(first_E[expert], first_E[expert + 1]):
                h = set_I[at]
                twice = False
                if part == 1:
                    for k in range(top_k):
                        if expert_HK[h, k] == skip:
                            twice = True
                if twice:
                    continue
                pool_K = new_pool[count]
                r, n = _serve(expert_HK[h], draw_HK[h], rank_ER, count_E, mask_E, node_R, visit_first, pool_K)
                touched_H[count] = h
                new_cost[count] = (r + node_weight * n) * weight_H[h]
                change += new_cost[count] - cost_H[h]
                for k in range(top_k):
                    if expert_HK[h, k] >= 0 and pool_K[k] != pool_HK[h, k]:
                        _add_load(new_load_R, pool_HK[h, k], -weight_H[h])
                        _add_load(new_load_R, pool_K[k], weight_H[h])
                count += 1
        done += count + 1
        new_par = new_load_R.max() * scale
        total = change + new_par - par_cost
        if total > 0 and rng.random() >= np.exp(-total / temperature):
            if b >= 0:
                _move(one, b, a, rank_ER, count_E, mask_E)
                _move(two, a, b, rank_ER, count_E, mask_E)
            else:
                _move(two, a, -1, rank_ER, count_E, mask_E)
                _move(one, -1, a, rank_ER, count_E, mask_E)
            continue
        held_RC[a, i] = two
        if b >= 0:
            held_RC[b, j] = one
        for at in range(count):
            cost_H[touched_H[at]] = new_cost[at]
            pool_HK[touched_H[at]] = new_pool[at]
        load_R, cost, par_cost = new_load_R, cost + change, new_par
        if cost + par_cost < best - 1e-9 * abs(best):
            best, best_RC = cost + par_cost, held_RC.copy()
    return best_RC
