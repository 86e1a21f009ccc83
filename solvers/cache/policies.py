"""What a cache of whole experts hits under LRU, LFU, random replacement, SCH's look-ahead, and Belady's optimum.

Legend: L routing sites, S steps, A accesses, E experts.
"""

from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.device.caches.rules import LFU_HALVING_VISITS
from placer.core.errors import UsageError
from solvers.cache.run import CacheRun
from traces.accesses import Accesses
from traces.locality_kernels import drop_lowest, lookahead_hits, take_in

__all__ = ["CACHE_RULES", "CacheRule", "simulate_cache"]

IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]

CacheRule = Literal["random", "lru", "lfu", "sch", "belady"]
"""What is kept, of what was held and what the step needed, is most in:
random   membership of the step, then chance
lru      time of the last use
lfu      uses, whether held or not, halved (rounded down) after every 32 steps; equals: time of the last use
sch      uses in the next `window` steps (MoE-LRC's SCH v2); equals: time of the last use
belady   nearness of the next use (Read-ME's rule); equals: lower id"""

CACHE_RULES: tuple[CacheRule, ...] = get_args(CacheRule)


def simulate_cache(
    accesses: Accesses, rule: CacheRule, slots: int, *, window: int = 16, rng: np.random.Generator | None = None
) -> CacheRun:
    """Hits and misses of a cache of `slots` experts in every layer, filled on demand only and empty at first.

    A step needs its experts as a set: those held when it begins are hits, the others are loaded, and then the rule says
    which `slots` of all of them stay; one that was just loaded may go at once (its bytes were in the load buffer).
    Within a step a higher id counts as used later. `rng` is for random, `window` for sch.
    Guarantee: belady hits the most of any such cache (unit sizes, every interval between two uses of an expert is kept
    or not, and the intervals that end first are). Complexity: O(A) list scans of `slots`. Raises UsageError.
    Reference: Belady 1966; Read-ME (arXiv 2410.19123); MoE-LRC (arXiv 2505.16056).
    """
    if slots < 0:
        raise UsageError(f"slots is {slots}; give the experts that one layer's cache holds, 0 or more")
    if rule not in CACHE_RULES:
        raise UsageError(f"cache rule is {rule!r}; use one of {', '.join(CACHE_RULES)}")
    if rule == "random" and rng is None:
        raise UsageError("random replacement has no rng; give a numpy Generator")
    if window < 1:
        raise UsageError(f"window is {window}; give the steps to look ahead, 1 or more")
    expert_A, experts = accesses.expert_A, accesses.num_experts
    pairs = []
    for start_S in accesses.start_LS:
        if rule == "sch":
            pairs.append(lookahead_hits(start_S, expert_A, window, slots, experts))
        elif rule == "random":
            pairs.append(_replay_random(start_S, expert_A, slots, experts, rng))
        elif rule == "lfu":
            pairs.append(_replay_lfu(start_S, expert_A, slots, experts, LFU_HALVING_VISITS))
        else:
            accessed = int(start_S[-1] - start_S[0])
            key_A = np.arange(accessed) if rule == "lru" else _nearness(start_S, expert_A, experts)
            pairs.append(_replay_keys(start_S, expert_A, key_A, slots, experts))
    hits_L, held_L = np.array(pairs, dtype=np.int64).T
    return CacheRun(
        slots=slots,
        accesses_L=accesses.accesses_L,
        hits_L=hits_L,
        prefetched_L=np.zeros_like(hits_L),
        most_held=int(held_L.max()),
    )


@njit(cache=True, nogil=True)
def _nearness(start_S: IntArray, expert_A: Int32Array, num_experts: int) -> IntArray:
    """How near each access's expert is needed next; higher is nearer."""
    first = start_S[0]
    key_A = np.empty(start_S[-1] - first, dtype=np.int64)
    next_E = np.full(num_experts, len(start_S), dtype=np.int64)
    for step in range(len(start_S) - 2, -1, -1):
        for at in range(start_S[step], start_S[step + 1]):
            expert = expert_A[at]
            key_A[at - first] = -(next_E[expert] * num_experts + expert)
            next_E[expert] = step
    return key_A


@njit(cache=True, nogil=True)
def _replay_keys(
    start_S: IntArray, expert_A: Int32Array, key_A: IntArray, slots: int, num_experts: int
) -> tuple[int, int]:
    held = np.empty(slots + num_experts, dtype=np.int64)
    is_held_E = np.zeros(num_experts, dtype=np.bool_)
    key_E = np.zeros(num_experts, dtype=np.int64)
    count, hits, most_held = 0, 0, 0
    for step in range(len(start_S) - 1):
        for at in range(start_S[step], start_S[step + 1]):
            expert = expert_A[at]
            key_E[expert] = key_A[at - start_S[0]]
            hits += is_held_E[expert]
            count = take_in(held, count, is_held_E, expert)
        count = drop_lowest(held, count, slots, is_held_E, key_E)
        most_held = max(most_held, count)
    return hits, most_held


@njit(cache=True, nogil=True)
def _replay_lfu(start_S: IntArray, expert_A: Int32Array, slots: int, num_experts: int, halving: int) -> tuple[int, int]:
    clocks = start_S[-1] - start_S[0] + 1
    held = np.empty(slots + num_experts, dtype=np.int64)
    is_held_E = np.zeros(num_experts, dtype=np.bool_)
    # uses, then the last use, in one number
    key_E = np.zeros(num_experts, dtype=np.int64)
    count, hits, clock, most_held = 0, 0, 0, 0
    for step in range(len(start_S) - 1):
        for at in range(start_S[step], start_S[step + 1]):
            expert = expert_A[at]
            clock += 1
            key_E[expert] = (key_E[expert] // clocks + 1) * clocks + clock
            hits += is_held_E[expert]
            count = take_in(held, count, is_held_E, expert)
        count = drop_lowest(held, count, slots, is_held_E, key_E)
        most_held = max(most_held, count)
        if (step + 1) % halving == 0:
            for expert in range(num_experts):
                key_E[expert] = key_E[expert] // clocks // 2 * clocks + key_E[expert] % clocks
    return hits, most_held


@njit(cache=True, nogil=True)
def _replay_random(
    start_S: IntArray, expert_A: Int32Array, slots: int, num_experts: int, rng: np.random.Generator
) -> tuple[int, int]:
    held = np.empty(slots + num_experts, dtype=np.int64)
    is_held_E = np.zeros(num_experts, dtype=np.bool_)
    key_E = np.zeros(num_experts, dtype=np.int64)
    used_E = np.zeros(num_experts, dtype=np.bool_)
    count, hits, most_held = 0, 0, 0
    for step in range(len(start_S) - 1):
        for at in range(start_S[step], start_S[step + 1]):
            expert = expert_A[at]
            used_E[expert] = True
            hits += is_held_E[expert]
            count = take_in(held, count, is_held_E, expert)
        if count > slots:
            for place in range(count):
                chance = rng.integers(0, 1 << 30)
                key_E[held[place]] = chance + (1 << 30) * used_E[held[place]]
        count = drop_lowest(held, count, slots, is_held_E, key_E)
        most_held = max(most_held, count)
        for at in range(start_S[step], start_S[step + 1]):
            used_E[expert_A[at]] = False
    return hits, most_held
