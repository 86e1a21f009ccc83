"""A path of legal placements of one layer from the current one to the target, the most useful changes first.

A step makes one rank hold one more expert of its target: by an exchange with a rank that must give it up (two copies),
or in the place of an expert that has replicas elsewhere (one copy). Some such step exists until the target is reached.

Gains are estimated on the heaviest expert sets, replicas being served on a rank that is visited anyway; whoever uses
the path judges its placements exactly.

Legend: H expert sets, K top-k, E experts, R ranks, C slots per rank, I (expert, set) incidences, Q steps.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["greedy_path"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
BoolArray = npt.NDArray[np.bool_]


@njit(cache=True)
def _groups_touched(
    expert_K: npt.NDArray[np.int16],
    rank_ER: npt.NDArray[np.int16],
    count_E: IntArray,
    node_R: IntArray,
    node_weight: float,
    seen_R: BoolArray,
    seen_N: BoolArray,
) -> float:  # pragma: no cover - compiled
    """Ranks touched by a set, + node_weight * nodes: single experts first, then replicas nearest to those."""
    cost = 0.0
    for turn in range(2):
        for expert in expert_K:
            if expert < 0 or count_E[expert] == 0 or (count_E[expert] > 1) != (turn == 1):
                continue
            rank = rank_ER[expert, 0]
            for n in range(count_E[expert]):
                if seen_R[rank_ER[expert, n]]:
                    rank = rank_ER[expert, n]
                    break
            if not seen_R[rank]:
                seen_R[rank] = True
                cost += 1.0
                if not seen_N[node_R[rank]]:
                    seen_N[node_R[rank]] = True
                    cost += node_weight
    for expert in expert_K:
        if expert >= 0:
            for n in range(count_E[expert]):
                seen_R[rank_ER[expert, n]] = False
                seen_N[node_R[rank_ER[expert, n]]] = False
    return cost


@njit(cache=True)
def _drop(expert: int, rank: int, rank_ER: npt.NDArray[np.int16], count_E: IntArray) -> None:  # pragma: no cover
    count_E[expert] -= 1
    found = False
    for n in range(count_E[expert]):
        found = found or rank_ER[expert, n] == rank
        if found:
            rank_ER[expert, n] = rank_ER[expert, n + 1]


@njit(cache=True)
def _put(expert: int, rank: int, rank_ER: npt.NDArray[np.int16], count_E: IntArray) -> None:  # pragma: no cover
    # ranks stay in ascending order: a step that is taken back leaves nothing behind
    at = count_E[expert]
    while at > 0 and rank_ER[expert, at - 1] > rank:
        rank_ER[expert, at] = rank_ER[expert, at - 1]
        at -= 1
    rank_ER[expert, at] = rank
    count_E[expert] += 1


@njit(cache=True)
def _step(
    gives: int,
    gets: int,
    rank: int,
    other: int,
    rank_ER: npt.NDArray[np.int16],
    count_E: IntArray,
) -> None:  # pragma: no cover - compiled
    """`rank` drops `gives` and holds `gets`; where `other` >= 0 it drops `gets` and holds `gives`."""
    _drop(gives, rank, rank_ER, count_E)
    if other >= 0:
        _drop(gets, other, rank_ER, count_E)
        _put(gives, other, rank_ER, count_E)
    _put(gets, rank, rank_ER, count_E)


@njit(cache=True)
def _loads(
    load_E: FloatArray, rank_ER: npt.NDArray[np.int16], count_E: IntArray, load_R: FloatArray
) -> None:  # pragma: no cover - compiled
    """Fills load_R, replicas sharing equally."""
    load_R[:] = 0.0
    for expert in range(len(count_E)):
        for n in range(count_E[expert]):
            load_R[rank_ER[expert, n]] += load_E[expert] / count_E[expert]


@njit(cache=True)
def greedy_path(
    now_RC: IntArray,
    target_RE: BoolArray,
    real_experts: int,
    load_E: FloatArray,
    scale_R: FloatArray,
    benefit_ER: FloatArray,
    expert_HK: npt.NDArray[np.int16],
    weight_H: IntArray,
    first_E: IntArray,
    set_I: npt.NDArray[np.int32],
    node_R: IntArray,
    node_weight: float,
    par_weight: float,
) -> IntArray:  # pragma: no cover - compiled
    """held_QRC: the placement after every step, the first `now_RC`, the last the target.

    Cost of a placement: groups touched by the sets + par_weight * max over ranks of (load * scale) - sum of the
    benefit of every expert on its rank. The step of largest saving per copy sent is taken, or of least loss. Experts
    from `real_experts` on are empty slots: they weigh nothing, cost no copy and vanish where no rank is to have them.
    Complexity O(Q (D C + R) R + evaluations of the sets of two experts), D experts that are not in place.
    """
    ranks, width = now_RC.shape
    experts = target_RE.shape[1]
    held_RC = now_RC.copy()
    held_RE = np.zeros((ranks, experts), dtype=np.bool_)
    rank_ER = np.full((experts, ranks), -1, dtype=np.int16)
    count_E = np.zeros(experts, dtype=np.int64)
    for rank in range(ranks):
        for expert in held_RC[rank]:
            held_RE[rank, expert] = True
            _put(expert, rank, rank_ER, count_E)
    start_RE = held_RE.copy()
    seen_R, seen_N = np.zeros(ranks, dtype=np.bool_), np.zeros(int(node_R.max()) + 1, dtype=np.bool_)
    cost_H = np.zeros(len(weight_H))
    for h in range(len(weight_H)):
        cost_H[h] = _groups_touched(expert_HK[h], rank_ER, count_E, node_R, node_weight, seen_R, seen_N)
    # an estimate stays good until one of its two ranks changes
    cache = np.zeros((ranks * width, ranks * width + experts))
    stamp = np.full(cache.shape, -1, dtype=np.int64)
    changed_R = np.zeros(ranks, dtype=np.int64)
    load_R, new_load_R = np.zeros(ranks), np.zeros(ranks)
    wanted_E = np.zeros(experts, dtype=np.bool_)
    total = 0
    for rank in range(ranks):
        for expert in range(experts):
            wanted_E[expert] = wanted_E[expert] or target_RE[rank, expert]
            total += target_RE[rank, expert] and not held_RE[rank, expert]
    path = np.empty((total + 1, ranks, width), dtype=np.int64)
    path[0] = held_RC
    length = 1
    while True:
        _loads(load_E, rank_ER, count_E, load_R)
        peak_now = (load_R * scale_R).max()
        best, best_rank, best_slot, best_other, best_back, best_gets = np.inf, -1, -1, -1, -1, -1
        for rank in range(ranks):
            for gets in range(experts):
                if not target_RE[rank, gets] or held_RE[rank, gets]:
                    continue
                for slot in range(width):
                    gives = held_RC[rank, slot]
                    if target_RE[rank, gives]:
                        continue
                    # option -1: in the place of an expert that can spare this copy; n: from the n-th rank that has it
                    for option in range(-1, count_E[gets]):
                        other, back = -1, -1
                        if option < 0:
                            if count_E[gives] == 1 and (gives < real_experts or wanted_E[gives]):
                                continue
                            key = ranks * width + gets
                        else:
                            other = rank_ER[gets, option]
                            if target_RE[other, gets] or held_RE[other, gives]:
                                continue
                            for position in range(width):
                                if held_RC[other, position] == gets:
                                    back = position
                            key = other * width + back
                        at = rank * width + slot
                        fresh = stamp[at, key] >= changed_R[rank] and (other < 0 or stamp[at, key] >= changed_R[other])
                        copies = 0
                        if gets < real_experts:
                            copies += 1 - start_RE[rank, gets]
                            if other >= 0:
                                copies -= 1 - start_RE[other, gets]
                        if gives < real_experts:
                            copies -= 1 - start_RE[rank, gives]
                            if other >= 0:
                                copies += 1 - start_RE[other, gives]
                        _step(gives, gets, rank, other, rank_ER, count_E)
                        if not fresh:
                            change = 0.0
                            for part in range(2):
                                expert, skip = (gives, gets) if part == 0 else (gets, gives)
                                if expert >= real_experts:
                                    continue
                                for i in range(first_E[expert], first_E[expert + 1]):
                                    h = set_I[i]
                                    twice = False
                                    if part == 1:
                                        for k in range(expert_HK.shape[1]):
                                            twice = twice or expert_HK[h, k] == skip
                                    if not twice:
                                        change += weight_H[h] * (
                                            _groups_touched(
                                                expert_HK[h], rank_ER, count_E, node_R, node_weight, seen_R, seen_N
                                            )
                                            - cost_H[h]
                                        )
                            cache[at, key], stamp[at, key] = change, length
                        change = cache[at, key] + benefit_ER[gives, rank] - benefit_ER[gets, rank]
                        if other >= 0:
                            change += benefit_ER[gets, other] - benefit_ER[gives, other]
                        if par_weight > 0:
                            if other >= 0:
                                shift = load_E[gets] / count_E[gets] - load_E[gives] / count_E[gives]
                                new_load_R[:] = load_R
                                new_load_R[rank] += shift
                                new_load_R[other] -= shift
                            else:
                                _loads(load_E, rank_ER, count_E, new_load_R)
                            change += par_weight * ((new_load_R * scale_R).max() - peak_now)
                        if other >= 0:
                            _step(gets, gives, rank, other, rank_ER, count_E)
                        else:
                            _drop(gets, rank, rank_ER, count_E)
                            _put(gives, rank, rank_ER, count_E)
                        price = max(copies, 0.5)
                        worth = change / price if change < 0 else change * price
                        if worth < best:
                            best, best_rank, best_slot = worth, rank, slot
                            best_other, best_back, best_gets = other, back, gets
        if best_rank < 0:
            return path[:length]
        gives = held_RC[best_rank, best_slot]
        _step(gives, best_gets, best_rank, best_other, rank_ER, count_E)
        held_RC[best_rank, best_slot] = best_gets
        held_RE[best_rank, gives], held_RE[best_rank, best_gets] = False, True
        changed_R[best_rank] = length + 1
        if best_other >= 0:
            held_RC[best_other, best_back] = gives
            held_RE[best_other, best_gets], held_RE[best_other, gives] = False, True
            changed_R[best_other] = length + 1
        for expert in (gives, best_gets):
            if expert < real_experts:
                for i in range(first_E[expert], first_E[expert + 1]):
                    h = set_I[i]
                    cost_H[h] = _groups_touched(expert_HK[h], rank_ER, count_E, node_R, node_weight, seen_R, seen_N)
        path[length] = held_RC
        length += 1
