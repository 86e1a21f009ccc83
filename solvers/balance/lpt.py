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
def _pack_distinct(slot_expert_P: IntArray, weight_P: FloatArray, num_ranks: int) -> IntArray:  # pragma: no cover
    """held_RC: heaviest slot first, to the lightest rank with room that does not hold its expert yet; -1 on failure."""
    width = len(slot_expert_P) // num_ranks
    held_RC = np.full((num_ranks, width), -1, dtype=np.int64)
    load = np.zeros(num_ranks)
    count = np.zeros(num_ranks, dtype=np.int64)
    for slot in np.argsort(-weight_P, kind="mergesort"):
        expert = slot_expert_P[slot]
        best = -1
        for rank in range(num_ranks):
            lighter = count[rank] < width and (best < 0 or load[rank] < load[best])
            if lighter and not np.any(held_RC[rank, : count[rank]] == expert):
                best = rank
        if best < 0:
            # every rank with room holds the expert: exchange with a full rank that does not
            for rank in range(num_ranks):
                if count[rank] == width:
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
def _descend(held_RC: IntArray, share_E: FloatArray, target: float, max_rounds: int) -> float:  # pragma: no cover
    """Swaps slots of the busiest rank with others while that lowers the larger of the two loads; returns the maximum.

    Each round takes the best swap with the busiest rank; where none helps, the load is locally minimal.
    """
    ranks, width = held_RC.shape
    load = np.zeros(ranks)
    for rank in range(ranks):
        for position in range(width):
            load[rank] += share_E[held_RC[rank, position]]
    for _ in range(max_rounds):
        busiest = int(np.argmax(load))
        if load[busiest] <= target * (1 + 1e-9):
            break
        best_peak = load[busiest] * (1 - 1e-12)
        best_mine, best_rank, best_other = -1, -1, -1
        for mine in range(width):
            out = held_RC[busiest, mine]
            for rank in range(ranks):
                # a rank whose exchange could not lower the peak even if it gave its lightest slot is cheap to skip
                if rank == busiest or load[rank] >= load[busiest]:
                    continue
                for other in range(width):
                    back = held_RC[rank, other]
                    shift = share_E[out] - share_E[back]
                    if shift <= 0:
                        continue
                    peak = max(load[busiest] - shift, load[rank] + shift)
                    if peak < best_peak and not np.any(held_RC[busiest] == back) and not np.any(held_RC[rank] == out):
                        best_peak, best_mine, best_rank, best_other = peak, mine, rank, other
        if best_mine < 0:
            break
        out, back = held_RC[busiest, best_mine], held_RC[best_rank, best_other]
        held_RC[busiest, best_mine], held_RC[best_rank, best_other] = back, out
        load[busiest] += share_E[back] - share_E[out]
        load[best_rank] += share_E[out] - share_E[back]
    return float(load.max())


@njit(cache=True)
def _solve_layer(
    weight_E: FloatArray, num_slots: int, num_ranks: int, target: float, restarts: int, rng: np.random.Generator
) -> IntArray:  # pragma: no cover - compiled
    """Best of several replica counts: the greedy one, then random exchanges of one replica between two experts."""
    experts = len(weight_E)
    _, count_E = replicate(weight_E, num_slots)
    for expert in range(experts):
        # more replicas than ranks cannot lie on distinct ranks: hand the surplus to the next largest load per replica
        while count_E[expert] > num_ranks:
            count_E[expert] -= 1
            rest = np.where(count_E < num_ranks, weight_E / count_E, -1.0)
            count_E[int(np.argmax(rest))] += 1
    best_held = np.full((num_ranks, num_slots // num_ranks), -1, dtype=np.int64)
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
        held = _pack_distinct(slots, share_E[slots], num_ranks)
        if held[0, 0] == -2:
            continue
        peak = _descend(held, share_E, target, 40 * num_slots)
        if peak < best_peak:
            best_peak, best_held, best_count = peak, held, trial
        if best_peak <= target * (1 + 5e-4):
            break
    return best_held.reshape(-1)


def lpt_slots(
    load_LE: npt.NDArray[np.number], num_slots: int, num_ranks: int, *, restarts: int = 24, seed: int = 0
) -> IntArray:
    """slot_expert_LP with a small busiest rank and replicas on distinct ranks; equal shares per replica.

    Stops a layer at 0.05 % above its lower bound. O(L restarts P C R) time in practice. Same seed, same placement.
    Raises InfeasibleError where replicas cannot lie on distinct ranks.
    """
    weight_LE = np.ascontiguousarray(load_LE, dtype=np.float64)
    width = num_slots // num_ranks
    rows = []
    for layer, weight_E in enumerate(weight_LE):
        target = max_load_bound(weight_E, num_ranks, width)
        row = _solve_layer(weight_E, num_slots, num_ranks, target, restarts, np.random.default_rng([seed, layer]))
        if row[0] < 0:
            raise InfeasibleError(
                f"layer {layer}: {num_slots} slots cannot hold {len(weight_E)} experts with replicas on distinct ranks"
            )
        rows.append(row)
    return canonical_slots(np.stack(rows), num_ranks)


def solve_lpt(problem: PlacementProblem, *, seed: int = 0) -> SolveResult:
    """Load-only placement of the profile. Objective PAR with the load bound; typically within 0.2 % of it."""
    started = time.perf_counter()
    slots_LP = lpt_slots(problem.profile.load_LE, problem.num_slots, problem.cluster.num_ranks, seed=seed)
    return load_result(problem, "lpt", slots_LP, "effort", time.perf_counter() - started)
