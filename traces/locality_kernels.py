"""Sliding-window kernels over one site's accesses: counts per window, the best fixed sets, a cache that looks ahead.

Step s needs expert_A[start_S[s] : start_S[s + 1]], each expert once. Legend: S steps, A accesses, E experts, Q parts of
the stream that a window does not cross (steps cut_Q[q] to cut_Q[q + 1]), F counts from 0 to the window's length.
All release the GIL.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["drop_lowest", "fixed_set_hits", "lookahead_hits", "take_in", "window_counts"]

IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]


@njit(cache=True, nogil=True)
def window_counts(start_S: IntArray, expert_A: Int32Array, cut_Q: IntArray, window: int, windows_EF: IntArray) -> int:
    """Adds to windows_EF[e, f] the windows in which f steps need expert e; returns how many windows there are.

    Complexity: O(A + Q E): an expert's entry is written when its count changes, not in every window.
    """
    experts = windows_EF.shape[0]
    count_E = np.zeros(experts, dtype=np.int64)
    since_E = np.zeros(experts, dtype=np.int64)
    total = 0
    for part in range(len(cut_Q) - 1):
        first, last = cut_Q[part], cut_Q[part + 1]
        if last - first < window:
            continue
        count_E[:] = 0
        # window w covers the steps from first + w on
        since_E[:] = 0
        for step in range(first, last):
            at = max(np.int64(0), step - first - window + 1)
            if step - first >= window:
                for place in range(start_S[step - window], start_S[step - window + 1]):
                    expert = expert_A[place]
                    windows_EF[expert, count_E[expert]] += at - since_E[expert]
                    since_E[expert] = at
                    count_E[expert] -= 1
            for place in range(start_S[step], start_S[step + 1]):
                expert = expert_A[place]
                windows_EF[expert, count_E[expert]] += at - since_E[expert]
                since_E[expert] = at
                count_E[expert] += 1
        windows = last - first - window + 1
        for expert in range(experts):
            windows_EF[expert, count_E[expert]] += windows - since_E[expert]
        total += windows
    return total


@njit(cache=True, nogil=True)
def fixed_set_hits(
    start_S: IntArray, expert_A: Int32Array, cut_Q: IntArray, window: int, slots: int, num_experts: int
) -> tuple[int, int]:
    """(accesses to each window's `slots` most needed experts, all accesses), summed over the windows.

    Complexity: O(A + S m) for windows of m steps: how many experts have each count is kept up to date.
    """
    hits, accesses = 0, 0
    count_E = np.zeros(num_experts, dtype=np.int64)
    experts_F = np.zeros(window + 1, dtype=np.int64)
    for part in range(len(cut_Q) - 1):
        first, last = cut_Q[part], cut_Q[part + 1]
        count_E[:] = 0
        experts_F[:] = 0
        for step in range(first, last):
            if step - first >= window:
                for place in range(start_S[step - window], start_S[step - window + 1]):
                    expert = expert_A[place]
                    experts_F[count_E[expert]] -= 1
                    count_E[expert] -= 1
                    experts_F[count_E[expert]] += 1
            for place in range(start_S[step], start_S[step + 1]):
                expert = expert_A[place]
                experts_F[count_E[expert]] -= 1
                count_E[expert] += 1
                experts_F[count_E[expert]] += 1
            if step - first >= window - 1:
                accesses += start_S[step + 1] - start_S[step - window + 1]
                free = slots
                for count in range(window, 0, -1):
                    taken = min(free, experts_F[count])
                    hits += taken * count
                    free -= taken
                    if free == 0:
                        break
    return hits, accesses


@njit(cache=True, nogil=True)
def lookahead_hits(
    start_S: IntArray, expert_A: Int32Array, window: int, slots: int, num_experts: int
) -> tuple[int, int]:
    """(hits, most held) of a cache that after each step drops the experts that the next `window` steps need least.

    Ties: the one whose last use is longest ago goes. Complexity: O(A) list scans of `slots`.
    """
    steps = len(start_S) - 1
    clocks = start_S[steps] - start_S[0] + 1
    held = np.empty(slots + num_experts, dtype=np.int64)
    is_held_E = np.zeros(num_experts, dtype=np.bool_)
    # uses ahead, then the last use, in one number
    key_E = np.zeros(num_experts, dtype=np.int64)
    count, hits, clock, most_held = 0, 0, 0, 0
    for step in range(min(window, steps)):
        for place in range(start_S[step], start_S[step + 1]):
            key_E[expert_A[place]] += clocks
    for step in range(steps):
        if step + window < steps:
            for place in range(start_S[step + window], start_S[step + window + 1]):
                key_E[expert_A[place]] += clocks
        for place in range(start_S[step], start_S[step + 1]):
            expert = expert_A[place]
            clock += 1
            key_E[expert] = (key_E[expert] // clocks - 1) * clocks + clock
            hits += is_held_E[expert]
            count = take_in(held, count, is_held_E, expert)
        count = drop_lowest(held, count, slots, is_held_E, key_E)
        most_held = max(most_held, count)
    return hits, most_held


@njit(cache=True, nogil=True)
def take_in(held: IntArray, count: int, is_held_E: BoolArray, expert: int) -> int:
    """Puts an expert behind held[:count] unless it is there; returns how many there are."""
    if is_held_E[expert]:
        return count
    is_held_E[expert] = True
    held[count] = expert
    return count + 1


@njit(cache=True, nogil=True)
def drop_lowest(held: IntArray, count: int, slots: int, is_held_E: BoolArray, key_E: IntArray) -> int:
    """Drops the experts of held[:count] with the lowest keys until `slots` are left; returns how many are left."""
    while count > slots:
        lowest = 0
        for place in range(1, count):
            if key_E[held[place]] < key_E[held[lowest]]:
                lowest = place
        is_held_E[held[lowest]] = False
        count -= 1
        held[lowest] = held[count]
    return count
