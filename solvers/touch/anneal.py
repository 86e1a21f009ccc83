"""Annealing on exact expert sets: what exchanging two experts does to ranks touched, nodes touched and load.

Legend: H expert sets, K top-k, E experts, R ranks, N nodes, B draws of the load, I (expert, set) incidences.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["anneal_layer", "incidence", "pair_weights", "touched"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


PARTED = 0.4
"""Ranks that a parted pair is taken to cost at least, before the sets are looked at; 0.3 to 0.6 find equal costs."""


def pair_weights(expert_HK: npt.NDArray[np.int16], weight_H: IntArray | FloatArray, num_experts: int) -> FloatArray:
    """Tokens that chose both experts, (E, E), symmetric, diagonal 0."""
    top_k = expert_HK.shape[1]
    pair = np.zeros(num_experts * num_experts)
    for i in range(top_k):
        for j in range(i + 1, top_k):
            both = (expert_HK[:, i] >= 0) & (expert_HK[:, j] >= 0)
            code = expert_HK[both, i].astype(np.int64) * num_experts + expert_HK[both, j]
            pair += np.bincount(code, weights=weight_H[both], minlength=len(pair))
    upper = pair.reshape(num_experts, num_experts)
    return upper + upper.T


def incidence(expert_HK: npt.NDArray[np.int16], num_experts: int) -> tuple[IntArray, npt.NDArray[np.int32]]:
    """Sets of each expert in CSR form: first_E (E + 1,) into set_I (I,)."""
    flat = expert_HK.reshape(-1)
    where = np.flatnonzero(flat >= 0)
    order = where[np.argsort(flat[where], kind="stable")]
    first = np.concatenate(([0], np.cumsum(np.bincount(flat[where], minlength=num_experts))))
    return first.astype(np.int64), (order // expert_HK.shape[1]).astype(np.int32)


@njit(cache=True)
def touched(
    expert_HK: npt.NDArray[np.int16], weight_H: IntArray, group_E: IntArray, num_groups: int
) -> float:  # pragma: no cover - compiled
    """Weighted sum over sets of the distinct groups (ranks or nodes) their experts lie in."""
    total = 0.0
    seen = np.full(num_groups, -1, dtype=np.int64)
    for h in range(len(weight_H)):
        for k in range(expert_HK.shape[1]):
            expert = expert_HK[h, k]
            if expert >= 0 and seen[group_E[expert]] != h:
                seen[group_E[expert]] = h
                total += weight_H[h]
    return total


@njit(cache=True)
def _leave_and_enter(
    mover: int,
    partner: int,
    old: int,
    new: int,
    first_E: IntArray,
    set_I: npt.NDArray[np.int32],
    expert_HK: npt.NDArray[np.int16],
    weight_H: IntArray,
    count_HG: npt.NDArray[np.uint8],
) -> int:  # pragma: no cover - compiled
    """Change of weighted groups touched when `mover` goes from group `old` to `new` and `partner` the other way.

    Sets that hold both are unchanged, so they are left out; calling this for each of the two gives the whole change.
    """
    change = 0
    for i in range(first_E[mover], first_E[mover + 1]):
        h = set_I[i]
        leaves = count_HG[h, old] == 1
        enters = count_HG[h, new] == 0
        if leaves == enters:
            # a set with both experts has its partner in `new`, so it never enters; check only where it would count
            continue
        both = False
        for k in range(expert_HK.shape[1]):
            if expert_HK[h, k] == partner:
                both = True
                break
        if not both:
            change += -weight_H[h] if leaves else weight_H[h]
    return change


@njit(cache=True)
def _shift(
    mover: int, old: int, new: int, first_E: IntArray, set_I: npt.NDArray[np.int32], count_HG: npt.NDArray[np.uint8]
) -> None:  # pragma: no cover - compiled
    for i in range(first_E[mover], first_E[mover + 1]):
        count_HG[set_I[i], old] -= 1
        count_HG[set_I[i], new] += 1


@njit(cache=True)
def _counts(
    expert_HK: npt.NDArray[np.int16], group_E: IntArray, num_groups: int
) -> npt.NDArray[np.uint8]:  # pragma: no cover - compiled
    count_HG = np.zeros((expert_HK.shape[0], num_groups), dtype=np.uint8)
    for h in range(expert_HK.shape[0]):
        for k in range(expert_HK.shape[1]):
            if expert_HK[h, k] >= 0:
                count_HG[h, group_E[expert_HK[h, k]]] += 1
    return count_HG


@njit(cache=True)
def _busiest(load_RB: FloatArray, top_3B: IntArray) -> None:  # pragma: no cover - compiled
    """Fills top_3B with the busiest ranks of each draw, busiest first."""
    places = len(top_3B)
    for b in range(load_RB.shape[1]):
        found = 0
        for rank in range(len(load_RB)):
            at = found
            while at > 0 and load_RB[top_3B[at - 1, b], b] < load_RB[rank, b]:
                if at < places:
                    top_3B[at, b] = top_3B[at - 1, b]
                at -= 1
            if at < places:
                top_3B[at, b] = rank
                found = min(places, found + 1)


@njit(cache=True)
def anneal_layer(
    rank_E: IntArray,
    node_R: IntArray,
    slow_R: FloatArray,
    real_experts: int,
    draw_EB: FloatArray,
    price_B: FloatArray,
    expert_HK: npt.NDArray[np.int16],
    weight_H: IntArray,
    first_E: IntArray,
    set_I: npt.NDArray[np.int32],
    pair_EE: FloatArray,
    node_weight: float,
    pair_value: float,
    steps: int,
    hot: float,
    cold: float,
    rng: np.random.Generator,
) -> tuple[IntArray, float]:  # pragma: no cover - compiled
    """Best assignment found and its cost: ranks touched + node_weight * nodes touched + sum over draws of price * PAR.

    PAR of a draw is its max / mean rank load, a rank's load times slow_R = mean speed / speed. Experts from
    `real_experts` on are empty slots: no load, in no set, never exchanged with each other. Exchanges of two experts on
    different ranks, Metropolis acceptance, temperature falling geometrically from `hot` to `cold`. One step costs
    O(R B + sets of the two experts).
    With a `pair_value` above 0 the sets are not looked at: two experts of one token that are together are taken to save
    it that many ranks (nodes are left out too); a step then costs O(B), which is how large layers are started.
    """
    experts, ranks, draws = len(rank_E), len(node_R), draw_EB.shape[1]
    rank_E = rank_E.copy()
    node_E = node_R[rank_E]
    nodes = int(node_R.max()) + 1
    exact = pair_value <= 0
    if not exact:
        node_weight = 0.0
    count_HR = _counts(expert_HK, rank_E, ranks) if exact else np.zeros((0, ranks), dtype=np.uint8)
    count_HN = _counts(expert_HK, node_E, nodes) if node_weight > 0 else np.zeros((0, 1), dtype=np.uint8)
    load_RB = np.zeros((ranks, draws))
    for expert in range(experts):
        load_RB[rank_E[expert]] += draw_EB[expert]
    total_B = np.empty(draws)
    for b in range(draws):
        total_B[b] = load_RB[:, b].sum()
    for rank in range(ranks):
        load_RB[rank] *= slow_R[rank]
    scale_B = np.empty(draws)
    par_cost = 0.0
    for b in range(draws):
        scale_B[b] = price_B[b] * ranks / max(total_B[b], 1e-300)
        par_cost += load_RB[:, b].max() * scale_B[b]
    # of the three busiest ranks at least one stays as it is when two exchange experts
    top_3B = np.zeros((min(3, ranks), draws), dtype=np.int64)
    _busiest(load_RB, top_3B)
    cost = touched(expert_HK, weight_H, rank_E, ranks) if exact else 0.0
    # near_ER: tokens that chose expert e together with some expert on rank r, pairs counted
    near_ER = np.zeros((experts, ranks))
    for expert in range(experts):
        for other in range(experts):
            near_ER[expert, rank_E[other]] += pair_EE[expert, other]
    if node_weight > 0:
        cost += node_weight * touched(expert_HK, weight_H, node_E, nodes)
    best_cost, best_E = cost + par_cost, rank_E.copy()
    for step in range(steps):
        temperature = hot * (cold / hot) ** (step / steps)
        one, two = rng.integers(0, real_experts), rng.integers(0, experts)
        mine, yours = rank_E[one], rank_E[two]
        if mine == yours:
            continue
        new_par = 0.0
        for b in range(draws):
            if scale_B[b] > 0:
                shift = draw_EB[two, b] - draw_EB[one, b]
                peak = max(load_RB[mine, b] + shift * slow_R[mine], load_RB[yours, b] - shift * slow_R[yours])
                for place in range(len(top_3B)):
                    rank = top_3B[place, b]
                    if rank != mine and rank != yours:
                        peak = max(peak, load_RB[rank, b])
                        break
                new_par += peak * scale_B[b]
        par_change = new_par - par_cost
        most = -temperature * np.log(rng.random())
        across = node_weight > 0 and node_R[mine] != node_R[yours]
        # load and pairs are cheap, sets are not. A pair brought together saves at most one rank, and pairs parted
        # cost at least about PARTED each (exactly 1 for k = 2): most hopeless exchanges stop here
        pairs = near_ER[one, yours] - near_ER[one, mine] + near_ER[two, mine] - near_ER[two, yours]
        pairs -= 2 * pair_EE[one, two]
        if exact and not across and par_change - (pairs if pairs > 0 else PARTED * pairs) > most:
            continue
        change = -pair_value * pairs
        if exact:
            change = float(
                _leave_and_enter(one, two, mine, yours, first_E, set_I, expert_HK, weight_H, count_HR)
                + _leave_and_enter(two, one, yours, mine, first_E, set_I, expert_HK, weight_H, count_HR)
            )
        if across:
            change += node_weight * (
                _leave_and_enter(one, two, node_R[mine], node_R[yours], first_E, set_I, expert_HK, weight_H, count_HN)
                + _leave_and_enter(two, one, node_R[yours], node_R[mine], first_E, set_I, expert_HK, weight_H, count_HN)
            )
        if change + par_change > most:
            continue
        if exact:
            _shift(one, mine, yours, first_E, set_I, count_HR)
            _shift(two, yours, mine, first_E, set_I, count_HR)
        if across:
            _shift(one, node_R[mine], node_R[yours], first_E, set_I, count_HN)
            _shift(two, node_R[yours], node_R[mine], first_E, set_I, count_HN)
        rank_E[one], rank_E[two] = yours, mine
        for expert in range(experts):
            moved = pair_EE[expert, one] - pair_EE[expert, two]
            near_ER[expert, mine] -= moved
            near_ER[expert, yours] += moved
        for b in range(draws):
            shift = draw_EB[two, b] - draw_EB[one, b]
            load_RB[mine, b] += shift * slow_R[mine]
            load_RB[yours, b] -= shift * slow_R[yours]
        _busiest(load_RB, top_3B)
        cost += change
        par_cost = new_par
        if cost + par_cost < best_cost - 1e-9 * abs(best_cost):
            best_cost = cost + par_cost
            best_E[:] = rank_E
    return best_E, best_cost
