"""Load balance alone: replicate, pack longest-processing-time first on distinct ranks, descend by swaps, re-replicate.

Legend: L layers, E experts, P slots, R ranks, C slots per rank.
"""

import time

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.errors import InfeasibleError
from placer.core.plan import canonical_slots
from placer.core.problem import PlacementProblem
from solvers.balance.eplb import replicate
from solvers.balance.load import load_result, max_load_bound
from solvers.result import SolveResult

__all__ = ["lpt_slots", "solve_lpt"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@njit(cache=True)
def _pack_distinct(
    slot_expert_P: IntArray, weight_P: FloatArray, room_R: IntArray, slow_R: FloatArray
) -> IntArray:  # pragma: no cover - compiled
    """held_RC: heaviest slot first, to the rank with room that is done soonest and does not hold its expert yet.

    `slow_R` is mean speed / speed. Positions beyond a rank's room hold -1; -2 at the first on failure.
    """
    num_ranks, width = len(room_R), room_R.max()
    alike = slow_R.min() == slow_R.max()
    held_RC = np.full((num_ranks, width), -1, dtype=np.int64)
    load = np.zeros(num_ranks)
    count = np.zeros(num_ranks, dtype=np.int64)
    for slot in np.argsort(-weight_P, kind="mergesort"):
        expert = slot_expert_P[slot]
        best = -1
        for rank in range(num_ranks):
            lighter = count[rank] < room_R[rank] and (best < 0 or load[rank] < load[best])
            if not alike and count[rank] < room_R[rank] and best >= 0:
                lighter = (load[rank] + weight_P[slot]) * slow_R[rank] < (load[best] + weight_P[slot]) * slow_R[best]
            if lighter and not np.any(held_RC[rank, : count[rank]] == expert):
                best = rank
        if best < 0:
            # every rank with room holds the expert: exchange with a full rank that does not
            for rank in range(num_ranks):
                if count[rank] == room_R[rank]:
                    continue
                for other in range(num_ranks):
                    if best >= 0 or np.any(held_RC[other, : count[other]] == expert):
                        continue
                    for position in range(count[other]):
                        moved = held_RC[other, position]
                        if not np.any(held_RC[rank, : count[rank]] == moved):
                            held_RC[other, position] = expert
                            held_RC[rank, count[rank]] = moved
                            count[rank] += 1
                            best = rank
                            break
            if best < 0:
                held_RC[0, 0] = -2
                return held_RC
            continue
        held_RC[best, count[best]] = expert
        load[best] += weight_P[slot]
        count[best] += 1
    return held_RC


@njit(cache=True)
def _descend(
    held_RC: IntArray, share_E: FloatArray, room_R: IntArray, slow_R: FloatArray, target: float, max_rounds: int
) -> float:  # pragma: no cover - compiled
    """Swaps slots of the busiest rank with others while that lowers the larger of the two times; returns the maximum.

    A rank's time is its load * slow_R. Each round takes the best swap with the busiest rank; where none helps, the
    maximum is locally minimal.
    """
    ranks = len(room_R)
    load = np.zeros(ranks)
    for rank in range(ranks):
        for position in range(room_R[rank]):
            load[rank] += share_E[held_RC[rank, position]]
    for _ in range(max_rounds):
        busiest = int(np.argmax(load * slow_R))
        now = load[busiest] * slow_R[busiest]
        if now <= target * (1 + 1e-9):
            break
        best_peak = now * (1 - 1e-12)
        best_mine, best_rank, best_other = -1, -1, -1
        for mine in range(room_R[busiest]):
            out = held_RC[busiest, mine]
            for rank in range(ranks):
                # a rank whose exchange could not lower the peak even if it gave its lightest slot is cheap to skip
                if rank == busiest or load[rank] * slow_R[rank] >= now:
                    continue
                for other in range(room_R[rank]):
                    back = held_RC[rank, other]
                    shift = share_E[out] - share_E[back]
                    if shift <= 0:
                        continue
                    peak = max((load[busiest] - shift) * slow_R[busiest], (load[rank] + shift) * slow_R[rank])
                    if peak < best_peak and not np.any(held_RC[busiest] == back) and not np.any(held_RC[rank] == out):
                        best_peak, best_mine, best_rank, best_other = peak, mine, rank, other
        if best_mine < 0:
            break
        out, back = held_RC[busiest, best_mine], held_RC[best_rank, best_other]
        held_RC[busiest, best_mine], held_RC[best_rank, best_other] = back, out
        load[busiest] += share_E[back] - share_E[out]
        load[best_rank] += share_E[out] - share_E[back]
    return float((load * slow_R).max())


@njit(cache=True)
def _solve_layer(
    weight_E: FloatArray,
    room_R: IntArray,
    slow_R: FloatArray,
    target: float,
    restarts: int,
    rng: np.random.Generator,
) -> IntArray:  # pragma: no cover - compiled
    """Best of several replica counts: the greedy one, then random exchanges of one replica between two experts."""
    experts, num_slots, num_ranks = len(weight_E), int(room_R.sum()), len(room_R)
    _, count_E = replicate(weight_E, num_slots)
    for expert in range(experts):
        # more replicas than ranks cannot lie on distinct ranks: hand the surplus to the next largest load per replica
        while count_E[expert] > num_ranks:
            count_E[expert] -= 1
            rest = np.where(count_E < num_ranks, weight_E / count_E, -1.0)
            count_E[int(np.argmax(rest))] += 1
    best_held = np.full((num_ranks, room_R.max()), -1, dtype=np.int64)
    best_peak = np.inf
    best_count = count_E.copy()
    for attempt in range(restarts + 1):
        trial = best_count.copy()
        if attempt > 0:
            if num_slots == experts:
                break
            giver, taker = rng.integers(0, experts), rng.integers(0, experts)
            if trial[giver] == 1 or trial[taker] == num_ranks or giver == taker:
                continue
            if weight_E[giver] / (trial[giver] - 1) > best_peak:
                continue
            trial[giver] -= 1
            trial[taker] += 1
        slots = np.repeat(np.arange(experts), trial)
        share_E = weight_E / trial
        held = _pack_distinct(slots, share_E[slots], room_R, slow_R)
        if held[0, 0] == -2:
            continue
        peak = _descend(held, share_E, room_R, slow_R, target, 40 * num_slots)
        if peak < best_peak:
            best_peak, best_held, best_count = peak, held, trial
        if best_peak <= target * (1 + 5e-4):
            break
    return best_held


def lpt_slots(
    load_LE: npt.NDArray[np.number],
    num_slots: int,
    num_ranks: int,
    *,
    restarts: int = 24,
    seed: int = 0,
    speed_R: FloatArray | None = None,
    room_LR: IntArray | None = None,
) -> IntArray:
    """slot_expert_LP with a small busiest rank and replicas on distinct ranks; equal shares per replica.

    With `speed_R` the busiest rank is the one of largest load / speed. With `room_LR` (L, R) every expert lies once, on
    ranks that hold at most so many; the row has the largest room for every rank, and -1 where that is not used.

    Stops a layer at 0.05 % above its lower bound. O(L restarts P C R) time in practice. Same seed, same placement.
    Raises InfeasibleError where replicas cannot lie on distinct ranks.
    """
    weight_LE = np.ascontiguousarray(load_LE, dtype=np.float64)
    width = num_slots // num_ranks if room_LR is None else int(room_LR.max())
    slow_R = np.ones(num_ranks) if speed_R is None else speed_R.mean() / speed_R
    rows = []
    for layer, weight_E in enumerate(weight_LE):
        target = max_load_bound(weight_E, num_ranks, width, speed_R, uneven=room_LR is not None)
        room_R = np.full(num_ranks, width) if room_LR is None else room_LR[layer]
        experts = len(weight_E)
        if room_LR is not None:
            # an empty slot is an expert of no load
            weight_E = np.concatenate((weight_E, np.zeros(int(room_R.sum()) - experts)))
        held_RC = _solve_layer(weight_E, room_R, slow_R, target, restarts, np.random.default_rng([seed, layer]))
        if (held_RC < 0).all():
            raise InfeasibleError(
                f"layer {layer}: {num_slots} slots cannot hold {experts} experts with replicas on distinct ranks"
            )
        row_RC = np.full((num_ranks, width), -1, dtype=np.int64)
        row_RC[:, : held_RC.shape[1]] = np.where(held_RC < experts, held_RC, -1)
        rows.append(row_RC.reshape(-1))
    return canonical_slots(np.stack(rows), num_ranks)


def solve_lpt(problem: PlacementProblem, *, seed: int = 0) -> SolveResult:
    """Load-only placement of the profile. Objective PAR with the load bound; typically within 0.2 % of it."""
    started = time.perf_counter()
    slots_LP = lpt_slots(
        problem.profile.load_LE,
        problem.num_slots,
        problem.cluster.num_ranks,
        seed=seed,
        speed_R=problem.cluster.speed_R,
        room_LR=problem.room_LR if problem.uneven else None,
    )
    return load_result(problem, "lpt", slots_LP, "effort", time.perf_counter() - started)
