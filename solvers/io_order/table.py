"""The best order by a dynamic program over how many planes of each expert are done: exact without a buffer limit.

When the disk is done depends on the set of planes that were read, not on their order, so

    F[0] = 0,    F[n] = min over experts e with n_e > 0 of max(F[n - 1_e], ready) + compute,

with `ready` the reads in n (0 for a plane that is present). Legend: I items, E experts, S states.
"""

import math
import time

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.device.items import Items, ItemTimes
from placer.core.errors import UsageError
from solvers.io_order.result import OrderResult, chains_of, found_order

__all__ = ["MOST_STATES", "solve_by_table"]

IntArray = npt.NDArray[np.int64]

NAME = "table"
MOST_STATES = 20_000_000


def solve_by_table(items: Items, times: ItemTimes) -> OrderResult:
    """The order that ends soonest without a buffer limit and without a copy.

    Complexity: O(S E) time and 16 S bytes for S = (K_1 + 1)(K_2 + 1)... states, at most MOST_STATES.
    Raises UsageError for a copy (when the copier is done depends on the order) or more states.
    """
    if times.copy_ns_I.any():
        raise UsageError("table takes no copies to an accelerator: their end depends on the order; use cpsat")
    chains = chains_of(items)
    if (states := math.prod(len(chain) + 1 for chain in chains)) > MOST_STATES:
        raise UsageError(f"{len(chains)} experts have {states} states, above the {MOST_STATES} of a table; use johnson")
    started = time.perf_counter()
    length_E = np.array([len(chain) for chain in chains], dtype=np.int64)
    first_E = np.cumsum(length_E) - length_E
    by_id = np.array([item for chain in chains for item in chain], dtype=np.int64)
    taken = times.taken(by_id)
    steps_I = _best_steps(length_E, first_E, taken.read_ns_I, taken.compute_ns_I, taken.bytes_I > 0, states)
    return found_order(NAME, items, times, by_id[steps_I], None, started=started)


@njit(cache=True)
def _best_steps(
    length_E: IntArray, first_E: IntArray, read_I: IntArray, compute_I: IntArray, loaded_I: IntArray, states: int
) -> IntArray:
    """Positions in by-id order, in the order of execution."""
    experts = len(length_E)
    stride_E = np.ones(experts, np.int64)
    for expert in range(experts - 1):
        stride_E[expert + 1] = stride_E[expert] * (length_E[expert] + 1)
    done_S = np.zeros(states, np.int64)
    read_S = np.zeros(states, np.int64)
    for state in range(1, states):
        best = np.int64(-1)
        for expert in range(experts):
            digit = state // stride_E[expert] % (length_E[expert] + 1)
            if digit:
                before, item = state - stride_E[expert], first_E[expert] + digit - 1
                read_S[state] = read_S[before] + read_I[item]
                ready = read_S[state] if loaded_I[item] else 0
                end = max(done_S[before], ready) + compute_I[item]
                if best < 0 or end < best:
                    best = end
        done_S[state] = best
    steps_I = np.zeros(len(read_I), np.int64)
    state = states - 1
    for place in range(len(read_I) - 1, -1, -1):
        for expert in range(experts):
            digit = state // stride_E[expert] % (length_E[expert] + 1)
            if digit:
                before, item = state - stride_E[expert], first_E[expert] + digit - 1
                ready = read_S[state] if loaded_I[item] else 0
                if max(done_S[before], ready) + compute_I[item] == done_S[state]:
                    steps_I[place], state = item, before
                    break
    return steps_I
