"""From a partitioner's blocks to a legal placement: repair of counts, repair of load, polish by swaps.

A partitioner balances the whole graph, or balances roughly; an engine needs exactly C experts of every layer on every
rank. All three steps look at one layer and know what an expert is worth on a rank: `value_ER`, fixed while the layer is
worked on, plus `pair_EE` for every expert that is on the rank already.

Legend: L layers, E experts, R ranks, C experts a rank, H expert sets, K top-k, I memberships.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from solvers.balance.load import mean_par, rank_load_LR
from solvers.balance.lpt import lpt_slots

__all__ = ["layer_limits", "members", "polish_cut", "polish_touched", "repair_counts", "repair_load"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

BISECTIONS = 40


def layer_limits(load_LE: IntArray, num_ranks: int, max_par: float | None) -> FloatArray:
    """The load a rank may carry in each layer, (L,), so that the mean of max / mean over layers meets `max_par`.

    A layer that a load-only plan cannot bring under the cap gets what that plan reaches; the others make up for it.
    """
    mean_L = load_LE.sum(axis=1) / num_ranks
    if max_par is None:
        return np.full(len(load_LE), np.inf)
    balanced_LP = lpt_slots(load_LE, load_LE.shape[1], num_ranks)
    rows = range(len(load_LE))
    floor_L = np.array(
        [mean_par(rank_load_LR(load_LE[i : i + 1], balanced_LP[i : i + 1], num_ranks)) for i in rows], dtype=np.float64
    )
    low, high = 1.0, max_par
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if np.maximum(middle, floor_L).mean() <= max_par else (low, middle)
    return np.maximum(low, floor_L) * mean_L + 1e-9


def members(expert_HK: npt.NDArray[np.int16], num_experts: int) -> tuple[IntArray, IntArray]:
    """Sets of each expert end to end, `set_I`, and where each expert's begin, `first_E` (E + 1,)."""
    used = expert_HK >= 0
    expert_I = expert_HK[used].astype(np.int64)
    order = np.argsort(expert_I, kind="stable")
    first_E = np.concatenate(([0], np.cumsum(np.bincount(expert_I, minlength=num_experts))))
    return first_E.astype(np.int64), np.nonzero(used)[0][order].astype(np.int64)


@njit(cache=True)
def _benefit(rank_E: IntArray, value_ER: FloatArray, pair_EE: FloatArray) -> FloatArray:  # pragma: no cover - compiled
    """What each expert is worth on each rank beside the others that are there, (E, R)."""
    benefit_ER = value_ER.copy()
    for expert in range(len(rank_E)):
        for other in range(len(rank_E)):
            if other != expert:
                benefit_ER[expert, rank_E[other]] += pair_EE[expert, other]
    return benefit_ER


@njit(cache=True)
def repair_counts(
    rank_E: IntArray, value_ER: FloatArray, pair_EE: FloatArray
) -> IntArray:  # pragma: no cover - compiled
    """Exactly E / R experts on each rank: one expert at a time leaves an overfull rank, least loss first."""
    experts, ranks = value_ER.shape
    capacity = experts // ranks
    rank_E = rank_E.copy()
    count_R = np.zeros(ranks, dtype=np.int64)
    for expert in range(experts):
        count_R[rank_E[expert]] += 1
    benefit_ER = _benefit(rank_E, value_ER, pair_EE)
    while True:
        best, mover, target = -np.inf, -1, -1
        for expert in range(experts):
            here = rank_E[expert]
            if count_R[here] <= capacity:
                continue
            for rank in range(ranks):
                gain = benefit_ER[expert, rank] - benefit_ER[expert, here]
                if count_R[rank] < capacity and gain > best:
                    best, mover, target = gain, expert, rank
        if mover < 0:
            return rank_E
        left = rank_E[mover]
        count_R[left] -= 1
        count_R[target] += 1
        rank_E[mover] = target
        for other in range(experts):
            if other != mover:
                benefit_ER[other, left] -= pair_EE[other, mover]
                benefit_ER[other, target] += pair_EE[other, mover]


@njit(cache=True)
def repair_load(
    rank_E: IntArray, value_ER: FloatArray, pair_EE: FloatArray, load_E: FloatArray, limit: float
) -> IntArray:  # pragma: no cover - compiled
    """Swaps with the busiest rank until no rank is above `limit`: each the least loss per token of load taken off it.

    Ends early where no swap lowers the larger of the two loads: the load is locally minimal then, and may be above.
    """
    experts, ranks = value_ER.shape
    rank_E = rank_E.copy()
    load_R = np.zeros(ranks)
    for expert in range(experts):
        load_R[rank_E[expert]] += load_E[expert]
    benefit_ER = _benefit(rank_E, value_ER, pair_EE)
    while True:
        busiest = int(np.argmax(load_R))
        if load_R[busiest] <= limit:
            return rank_E
        best, giver, taker = np.inf, -1, -1
        for mine in range(experts):
            if rank_E[mine] != busiest:
                continue
            for other in range(experts):
                rank = rank_E[other]
                shift = load_E[mine] - load_E[other]
                if rank == busiest or shift <= 0:
                    continue
                if load_R[rank] + shift >= load_R[busiest] * (1 - 1e-12):
                    continue
                loss = benefit_ER[mine, busiest] + benefit_ER[other, rank] + 2 * pair_EE[mine, other]
                loss -= benefit_ER[mine, rank] + benefit_ER[other, busiest]
                useful = min(shift, load_R[busiest] - limit)
                if loss / useful < best:
                    best, giver, taker = loss / useful, mine, other
        if giver < 0:
            return rank_E
        rank = rank_E[taker]
        shift = load_E[giver] - load_E[taker]
        load_R[busiest] -= shift
        load_R[rank] += shift
        rank_E[giver], rank_E[taker] = rank, busiest
        for expert in range(experts):
            if expert != giver:
                benefit_ER[expert, busiest] -= pair_EE[expert, giver]
                benefit_ER[expert, rank] += pair_EE[expert, giver]
            if expert != taker:
                benefit_ER[expert, rank] -= pair_EE[expert, taker]
                benefit_ER[expert, busiest] += pair_EE[expert, taker]


@njit(cache=True)
def polish_cut(
    rank_E: IntArray, value_ER: FloatArray, load_E: FloatArray, limit: float
) -> IntArray:  # pragma: no cover - compiled
    """Best swap of each expert in turn while one helps: neighbouring layers fixed, loads at most `limit`.

    A rank that is above `limit` already may stay there but not get busier.
    """
    experts, ranks = value_ER.shape
    rank_E = rank_E.copy()
    load_R = np.zeros(ranks)
    for expert in range(experts):
        load_R[rank_E[expert]] += load_E[expert]
    improved = True
    while improved:
        improved = False
        for mine in range(experts):
            here = rank_E[mine]
            best, partner = 1e-9, -1
            for other in range(experts):
                there = rank_E[other]
                if there == here:
                    continue
                gain = value_ER[mine, there] + value_ER[other, here] - value_ER[mine, here] - value_ER[other, there]
                if gain > best and _fits(load_R, here, there, load_E[mine] - load_E[other], limit):
                    best, partner = gain, other
            if partner >= 0:
                _exchange(rank_E, load_R, load_E, mine, partner)
                improved = True
    return rank_E


@njit(cache=True)
def _exchange(
    rank_E: IntArray, load_R: FloatArray, load_E: FloatArray, mine: int, partner: int
) -> None:  # pragma: no cover - compiled
    """The two experts take each other's rank, and the loads follow."""
    shift = load_E[mine] - load_E[partner]
    load_R[rank_E[mine]] -= shift
    load_R[rank_E[partner]] += shift
    rank_E[mine], rank_E[partner] = rank_E[partner], rank_E[mine]


@njit(cache=True)
def _fits(load_R: FloatArray, here: int, there: int, shift: float, limit: float) -> bool:  # pragma: no cover - compiled
    """May `shift` tokens of load go from rank `here` to rank `there`: whichever gets busier stays within the limit."""
    if shift == 0:
        return True
    return load_R[there] + shift <= limit if shift > 0 else load_R[here] - shift <= limit


@njit(cache=True)
def polish_touched(
    rank_E: IntArray,
    expert_HK: npt.NDArray[np.int16],
    weight_H: IntArray,
    first_E: IntArray,
    set_I: IntArray,
    num_ranks: int,
    load_E: FloatArray,
    limit: float,
    sweeps: int,
) -> IntArray:  # pragma: no cover - compiled
    """Best swap of each expert in turn by the exact number of ranks that sets touch; loads at most `limit`.

    O(sweeps * E * I) where I are all memberships.
    """
    experts = len(rank_E)
    rank_E = rank_E.copy()
    load_R = np.zeros(num_ranks)
    on_HR = np.zeros((len(expert_HK), num_ranks), dtype=np.uint16)
    for expert in range(experts):
        load_R[rank_E[expert]] += load_E[expert]
        for i in range(first_E[expert], first_E[expert + 1]):
            on_HR[set_I[i], rank_E[expert]] += 1
    both_E = np.zeros(experts)
    arrive_R = np.zeros(num_ranks)
    for _ in range(sweeps):
        improved = False
        for mine in range(experts):
            here = rank_E[mine]
            both_E[:] = 0.0
            arrive_R[:] = 0.0
            alone = 0.0
            for i in range(first_E[mine], first_E[mine + 1]):
                row = set_I[i]
                weight = weight_H[row]
                if on_HR[row, here] == 1:
                    alone += weight
                for rank in range(num_ranks):
                    if on_HR[row, rank] == 0:
                        arrive_R[rank] += weight
                for k in range(expert_HK.shape[1]):
                    other = expert_HK[row, k]
                    if other >= 0 and rank_E[other] != here:
                        # an exchange inside one set changes nothing for it: take back what the two moves count
                        both_E[other] += weight * (int(on_HR[row, here] == 1) + int(on_HR[row, rank_E[other]] == 1))
            best, partner = -1e-9, -1
            for other in range(experts):
                there = rank_E[other]
                if there == here or not _fits(load_R, here, there, load_E[mine] - load_E[other], limit):
                    continue
                change = arrive_R[there] - alone + both_E[other]
                for i in range(first_E[other], first_E[other + 1]):
                    row = set_I[i]
                    change += weight_H[row] * (int(on_HR[row, here] == 0) - int(on_HR[row, there] == 1))
                if change < best:
                    best, partner = change, other
            if partner >= 0:
                there = rank_E[partner]
                _exchange(rank_E, load_R, load_E, mine, partner)
                for i in range(first_E[mine], first_E[mine + 1]):
                    on_HR[set_I[i], here] -= 1
                    on_HR[set_I[i], there] += 1
                for i in range(first_E[partner], first_E[partner + 1]):
                    on_HR[set_I[i], there] -= 1
                    on_HR[set_I[i], here] += 1
                improved = True
        if not improved:
            break
    return rank_E
