"""Annealing with replicas on exact expert sets: which expert to replicate, where, and what share each replica gets.

Legend: H expert sets, K top-k, E experts, R ranks, C slots per rank, B draws of the load, I (expert, set) incidences.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from solvers.touch.replica_serve import add_load, bit, bits, rank_masks, serve_sets, touch_drawn, touch_first

__all__ = ["anneal_replicas"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Sets = npt.NDArray[np.int16]

RAMP_END = 0.7
"""After this part of the effort balance has its full price; before, it is cheap: moves pass through crowded ranks."""


@njit(cache=True)
def _leave(expert: int, rank: int, mask_E: IntArray, share_ER: FloatArray) -> None:  # pragma: no cover - compiled
    """The replica on `rank` goes; the others get its share in proportion to theirs."""
    mask_E[expert] &= ~bit(rank)
    share_ER[expert, rank] = 0.0
    # summed anew: one minus the share that goes would let rounding grow from move to move
    left = share_ER[expert].sum()
    for other in range(share_ER.shape[1]):
        if mask_E[expert] >> other & 1:
            share_ER[expert, other] = share_ER[expert, other] / left if left > 1e-9 else 1.0 / bits(mask_E[expert])


@njit(cache=True)
def _come(expert: int, rank: int, mask_E: IntArray, share_ER: FloatArray) -> None:  # pragma: no cover - compiled
    """A replica comes to `rank` and takes an equal share from the others."""
    mask_E[expert] |= bit(rank)
    count = bits(mask_E[expert])
    for other in range(share_ER.shape[1]):
        share_ER[expert, other] *= (count - 1) / count
    share_ER[expert, rank] = 1.0 / count


@njit(cache=True)
def _swap_rank(
    expert: int, old: int, new: int, mask_E: IntArray, share_ER: FloatArray
) -> None:  # pragma: no cover - compiled
    mask_E[expert] = mask_E[expert] & ~bit(old) | bit(new)
    share_ER[expert, new] = share_ER[expert, old]
    share_ER[expert, old] = 0.0


@njit(cache=True)
def _par_cost(
    load_RB: FloatArray, scale_B: FloatArray, price_B: FloatArray, peak: float
) -> float:  # pragma: no cover - compiled
    ranks, draws = load_RB.shape
    sum_B = np.zeros(draws)
    peak_B = np.zeros(draws)
    for rank in range(ranks):
        for b in range(draws):
            x = load_RB[rank, b] * scale_B[b]
            peak_B[b] = max(peak_B[b], x)
            x *= x
            x *= x
            x *= x
            x *= x
            sum_B[b] += x
    cost = 0.0
    for b in range(draws):
        y = np.sqrt(np.sqrt(np.sqrt(np.sqrt(sum_B[b] / ranks))))
        cost += (peak * peak_B[b] + (1 - peak) * y) * price_B[b]
    return cost


@njit(cache=True)
def anneal_replicas(
    held_RC: IntArray,
    share_ER: FloatArray,
    node_R: IntArray,
    draw_EB: FloatArray,
    price_B: FloatArray,
    expert_HK: Sets,
    weight_H: IntArray,
    draw_H: IntArray,
    first_E: IntArray,
    set_I: npt.NDArray[np.int32],
    visit_first: bool,
    node_weight: float,
    effort: float,
    hot: float,
    cold: float,
    first_price: float,
    share_moves: float,
    peak: float,
    rng: np.random.Generator,
) -> tuple[IntArray, FloatArray, float]:  # pragma: no cover - compiled
    """Best held_RC and share_ER found, and their cost: what the sets touch + sum over draws of price_B * PAR.

    A rank's load on a draw: every expert's draw times the share of its tokens in the sets that the rank is expected to
    serve. Moves: exchange two slots of different ranks; give a slot of an expert with several replicas to another
    expert; shift share between two replicas of one expert. Metropolis acceptance; the temperature falls geometrically
    with the effort spent, which is counted in sets looked at.
    """
    held_RC, share_ER = held_RC.copy(), share_ER.copy()
    ranks, width = held_RC.shape
    experts, draws, top_k = len(draw_EB), draw_EB.shape[1], expert_HK.shape[1]
    mask_E = rank_masks(held_RC, experts)
    cost_H, load_ER = serve_sets(held_RC, share_ER, node_R, expert_HK, weight_H, draw_H, visit_first, node_weight)
    total_E = load_ER.sum(axis=1)
    part_ER = np.zeros((experts, ranks))
    for expert in range(experts):
        if total_E[expert] > 0:
            part_ER[expert] = load_ER[expert] / total_E[expert]
        else:
            part_ER[expert] = share_ER[expert]
    load_RB = np.zeros((ranks, draws))
    for expert in range(experts):
        for rank in range(ranks):
            if part_ER[expert, rank] > 0:
                load_RB[rank] += part_ER[expert, rank] * draw_EB[expert]
    scale_B = np.empty(draws)
    free = 0.0
    for b in range(draws):
        scale_B[b] = ranks / max(load_RB[:, b].sum(), 1e-300)
        free += price_B[b]
    par_cost = _par_cost(load_RB, scale_B, price_B, peak)
    cost = (cost_H * weight_H).sum()
    best, best_RC, best_ER = cost + par_cost, held_RC.copy(), share_ER.copy()
    stamp_H = np.full(len(weight_H), -1, dtype=np.int64)
    room = 1
    for expert in range(experts):
        room = max(room, first_E[expert + 1] - first_E[expert])
    hit_I = np.zeros(2 * room, dtype=np.int64)
    new_cost_I = np.zeros(2 * room)
    change_ER = np.zeros((experts, ranks))
    dirty_E = np.zeros(experts + 1, dtype=np.bool_)
    keep_one_R, keep_two_R = np.zeros(ranks), np.zeros(ranks)
    new_ER = np.zeros((experts, ranks))
    new_RB = np.zeros((ranks, draws))
    near_RB = np.zeros((ranks, draws))
    spent, step, idle = 0.0, 0, 0
    while spent < effort and idle < 10_000:
        idle += 1
        step += 1
        temperature = hot * (cold / hot) ** (spent / effort)
        ramp = min(1.0, first_price ** (1 - spent / effort / RAMP_END))
        a, i = int(rng.integers(0, ranks)), int(rng.integers(0, width))
        one = held_RC[a, i]
        b, j, two = -1, -1, one
        kind = rng.random()
        old_one = mask_E[one]
        old_two = old_one
        if kind < share_moves:
            b = int(rng.integers(0, ranks))
            if not visit_first or par_cost == 0 or a == b or not mask_E[one] >> b & 1:
                continue
            keep_one_R[:] = share_ER[one]
            both = share_ER[one, a] + share_ER[one, b]
            share_ER[one, a] = min(max(share_ER[one, a] + (rng.random() - 0.5) * both, 0.001 * both), 0.999 * both)
            share_ER[one, b] = both - share_ER[one, a]
        elif kind < 0.4 * share_moves + 0.6:
            b, j = int(rng.integers(0, ranks)), int(rng.integers(0, width))
            two = held_RC[b, j]
            if a == b or one == two or mask_E[one] >> b & 1 or mask_E[two] >> a & 1:
                continue
            keep_one_R[:], keep_two_R[:] = share_ER[one], share_ER[two]
            old_two = mask_E[two]
            _swap_rank(one, a, b, mask_E, share_ER)
            _swap_rank(two, b, a, mask_E, share_ER)
        else:
            two = int(rng.integers(0, experts))
            if mask_E[one] & (mask_E[one] - 1) == 0 or mask_E[two] >> a & 1:
                continue
            keep_one_R[:], keep_two_R[:] = share_ER[one], share_ER[two]
            old_two = mask_E[two]
            _leave(one, a, mask_E, share_ER)
            _come(two, a, mask_E, share_ER)
        idle = 0
        new_one, new_two = mask_E[one], mask_E[two]
        most = -temperature * np.log(1.0 - rng.random())
        change, count = 0.0, 0
        for turn in range(1 if one == two else 2):
            expert = one if turn == 0 else two
            for at in range(first_E[expert], first_E[expert + 1]):
                h = set_I[at]
                if stamp_H[h] == step:
                    continue
                stamp_H[h] = step
                hit_I[count] = h
                if one == two:
                    new_cost_I[count] = cost_H[h]
                elif visit_first:
                    new_cost_I[count] = touch_first(expert_HK[h], draw_H[h], mask_E, node_R, node_weight)
                else:
                    new_cost_I[count] = touch_drawn(expert_HK[h], mask_E, node_R, node_weight)
                change += (new_cost_I[count] - cost_H[h]) * weight_H[h]
                count += 1
        spent += count + 1
        new_par = par_cost
        accepted = change - ramp * (par_cost - free) <= most
        if accepted and par_cost > 0 and one != two:
            near_RB[:] = 0.0
            if b >= 0:
                x, y = part_ER[one, a], part_ER[two, b]
                for d in range(draws):
                    shift = y * draw_EB[two, d] - x * draw_EB[one, d]
                    near_RB[a, d] = load_RB[a, d] + shift
                    near_RB[b, d] = load_RB[b, d] - shift
                for rank in range(ranks):
                    if rank != a and rank != b:
                        near_RB[rank] = load_RB[rank]
            else:
                near_RB[:] = load_RB
                x = part_ER[one, a]
                left = max(1e-9, 1.0 - x)
                for rank in range(ranks):
                    if rank != a and part_ER[one, rank] > 0:
                        z = part_ER[one, rank] / left * x
                        for d in range(draws):
                            near_RB[rank, d] += z * draw_EB[one, d]
                y = share_ER[two, a]
                for d in range(draws):
                    near_RB[a, d] += y * draw_EB[two, d] - x * draw_EB[one, d]
                for rank in range(ranks):
                    if rank != a and part_ER[two, rank] > 0:
                        z = part_ER[two, rank] * y
                        for d in range(draws):
                            near_RB[rank, d] -= z * draw_EB[two, d]
            near = ramp * (_par_cost(near_RB, scale_B, price_B, peak) - par_cost)
            accepted = change + near * (0.5 if near > 0 else 2.0) <= most
        if accepted and par_cost > 0:
            # the loads are dearer to work out than the copies, so only for moves that balance may yet save
            if visit_first:
                spent += 4 * count
                for at in range(count):
                    h = hit_I[at]
                    add_load(expert_HK[h], draw_H[h], weight_H[h], mask_E, share_ER, change_ER)
                    for k in range(top_k):
                        dirty_E[expert_HK[h, k]] = True
                mask_E[one], mask_E[two] = old_one, old_two
                for rank in range(ranks):
                    share_ER[one, rank], keep_one_R[rank] = keep_one_R[rank], share_ER[one, rank]
                    if one != two:
                        share_ER[two, rank], keep_two_R[rank] = keep_two_R[rank], share_ER[two, rank]
                for at in range(count):
                    h = hit_I[at]
                    add_load(expert_HK[h], draw_H[h], -weight_H[h], mask_E, share_ER, change_ER)
                mask_E[one], mask_E[two] = new_one, new_two
                for rank in range(ranks):
                    share_ER[one, rank], keep_one_R[rank] = keep_one_R[rank], share_ER[one, rank]
                    if one != two:
                        share_ER[two, rank], keep_two_R[rank] = keep_two_R[rank], share_ER[two, rank]
            dirty_E[one] = dirty_E[two] = True
            new_RB[:] = load_RB
            for expert in range(experts):
                if not dirty_E[expert]:
                    continue
                mask = mask_E[expert]
                was_single = expert == one and old_one & (old_one - 1) == 0
                was_single = was_single or (expert == two and old_two & (old_two - 1) == 0)
                for rank in range(ranks):
                    if mask & (mask - 1) == 0 or not visit_first:
                        part = (mask >> rank & 1) / bits(mask)
                    elif total_E[expert] == 0:
                        part = share_ER[expert, rank]
                    else:
                        before = 0.0 if was_single else part_ER[expert, rank]
                        part = before + change_ER[expert, rank] / total_E[expert]
                    new_ER[expert, rank] = part
                    shift = part - part_ER[expert, rank]
                    if abs(shift) > 1e-12:
                        for d in range(draws):
                            new_RB[rank, d] += shift * draw_EB[expert, d]
            new_par = _par_cost(new_RB, scale_B, price_B, peak)
            accepted = change + ramp * (new_par - par_cost) <= most
            if accepted:
                load_RB[:] = new_RB
            for expert in range(experts):
                if dirty_E[expert]:
                    if accepted:
                        part_ER[expert] = new_ER[expert]
                    change_ER[expert] = 0.0
                    dirty_E[expert] = False
            dirty_E[experts] = False
        if not accepted:
            mask_E[one], mask_E[two] = old_one, old_two
            share_ER[one] = keep_one_R
            if one != two:
                share_ER[two] = keep_two_R
            continue
        if one != two:
            held_RC[a, i] = two
            if b >= 0:
                held_RC[b, j] = one
        for at in range(count):
            cost_H[hit_I[at]] = new_cost_I[at]
        cost, par_cost = cost + change, new_par
        if ramp >= 1.0 and cost + par_cost < best - 1e-9 * abs(best):
            best = cost + par_cost
            best_RC[:], best_ER[:] = held_RC, share_ER
    return best_RC, best_ER, best
