"""Hit rates when a predictor loads experts before their layer begins, and predictions of any accuracy to try it with.

Legend: L routing sites, T tokens, K experts predicted for a token, S steps, A accesses, P predicted ones, E experts.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.errors import UsageError
from solvers.cache.run import CacheRun
from traces.accesses import step_accesses, trace_accesses
from traces.locality_kernels import take_in
from traces.trace import RoutingTrace

__all__ = ["check_prediction", "corrupted_prediction", "hit_rate_with_prediction"]

IntArray = npt.NDArray[np.int64]
Int32Array = npt.NDArray[np.int32]
BoolArray = npt.NDArray[np.bool_]
IdArray = npt.NDArray[np.uint8 | np.uint16]


def hit_rate_with_prediction(
    trace: RoutingTrace,
    predicted_LTK: IdArray,
    slots: int,
    batches: Sequence[npt.NDArray[np.integer]] | None = None,
) -> CacheRun:
    """What caches of `slots` experts a layer hit when predicted experts are loaded before their layer begins.

    predicted_LTK  uint8 or uint16 ids as in trace.expert_LTK; K may differ from the trace's; ids that a site does not
                   have (the type's largest value) predict nothing
    batches        tokens that run together, indices over T (None: every token alone, in the trace's order)

    A step of a layer: (1) of its predicted experts, those in the cache and then the ones predicted for the most tokens
    are kept or loaded, at most `slots`; (2) needed experts in the cache are hits, the others are loaded on demand;
    (3) prefetched experts that were never needed go first, then the least recently used. Counts, not time: a prefetch
    is taken to arrive. Guarantee: with exact predictions a step hits min(needed, slots); with any, never fewer than an
    LRU of `slots` less the experts predicted for a step (see CacheRun.loads for what the prefetching costs).
    Complexity: O(A + P) list scans of `slots`. Raises UsageError.
    Reference: real-time correction as in ExpertFlow (arXiv 2410.17954), slots fixed per layer as in its released code.
    """
    check_prediction(trace, predicted_LTK)
    if slots < 0:
        raise UsageError(f"slots is {slots}; give the experts that one layer's cache holds, 0 or more")
    needed = trace_accesses(trace, batches)
    predicted = step_accesses(
        predicted_LTK, [site.num_experts for site in trace.model.sites], batches, hottest_first=True
    )
    counts_L3 = np.array(
        [
            _replay_predicted(
                needed.start_LS[site],
                needed.expert_A,
                predicted.start_LS[site],
                predicted.expert_A,
                slots,
                needed.num_experts,
            )
            for site in range(needed.num_sites)
        ],
        dtype=np.int64,
    )
    return CacheRun(
        slots=slots,
        accesses_L=needed.accesses_L,
        hits_L=counts_L3[:, 0],
        prefetched_L=counts_L3[:, 1],
        most_held=int(counts_L3[:, 2].max()),
    )


def check_prediction(trace: RoutingTrace, predicted_LTK: IdArray) -> None:
    """Raises UsageError unless there are ids for every site and token of the trace."""
    if predicted_LTK.dtype not in (np.uint8, np.uint16) or predicted_LTK.ndim != 3:
        raise UsageError(f"predicted_LTK is {predicted_LTK.dtype} {predicted_LTK.shape}; give uint8 or uint16 ids")
    if predicted_LTK.shape[:2] != trace.expert_LTK.shape[:2]:
        raise UsageError(f"predicted_LTK is {predicted_LTK.shape}; give (*{trace.expert_LTK.shape[:2]}, k)")


def corrupted_prediction(trace: RoutingTrace, accuracy: float, rng: np.random.Generator) -> IdArray:
    """The trace's own ids with each kept with probability `accuracy` and else drawn from all experts of its site.

    1.0: exact; 0.0: random (right by chance). A drawn id may repeat another of its token. Unset entries stay.
    """
    if not 0.0 <= accuracy <= 1.0:
        raise UsageError(f"accuracy is {accuracy!r}; give a share, 0 to 1")
    result = np.array(trace.expert_LTK)
    for site, expert_TK in zip(trace.model.sites, result, strict=True):
        wrong_TK = (rng.random(expert_TK.shape) >= accuracy) & (expert_TK < site.num_experts)
        expert_TK[wrong_TK] = rng.integers(0, site.num_experts, int(wrong_TK.sum()))
    return result


@njit(cache=True, nogil=True)
def _replay_predicted(
    start_S: IntArray, expert_A: Int32Array, from_S: IntArray, expert_P: Int32Array, slots: int, num_experts: int
) -> tuple[int, int, int]:
    held = np.empty(slots + num_experts, dtype=np.int64)
    is_held_E = np.zeros(num_experts, dtype=np.bool_)
    planned_E = np.zeros(num_experts, dtype=np.bool_)
    # 0: prefetched and not needed yet
    last_E = np.zeros(num_experts, dtype=np.int64)
    count, hits, prefetched, most_held, clock = 0, 0, 0, 0, 0
    for step in range(len(start_S) - 1):
        planned = 0
        for resident in (True, False):
            for at in range(from_S[step], from_S[step + 1]):
                expert = expert_P[at]
                if planned < slots and is_held_E[expert] == resident and not planned_E[expert]:
                    planned_E[expert] = True
                    planned += 1
                    if not resident:
                        held[count] = expert
                        is_held_E[expert] = True
                        last_E[expert] = 0
                        count += 1
                        prefetched += 1
        count = _drop_oldest(held, count, slots, is_held_E, planned_E, last_E)
        most_held = max(most_held, count)
        for at in range(from_S[step], from_S[step + 1]):
            planned_E[expert_P[at]] = False
        for at in range(start_S[step], start_S[step + 1]):
            expert = expert_A[at]
            clock += 1
            last_E[expert] = clock
            hits += is_held_E[expert]
            count = take_in(held, count, is_held_E, expert)
        count = _drop_oldest(held, count, slots, is_held_E, planned_E, last_E)
        most_held = max(most_held, count)
    return hits, prefetched, most_held


@njit(cache=True, nogil=True)
def _drop_oldest(
    held: IntArray, count: int, slots: int, is_held_E: BoolArray, planned_E: BoolArray, last_E: IntArray
) -> int:
    while count > slots:
        oldest = -1
        for place in range(count):
            if not planned_E[held[place]] and (oldest < 0 or last_E[held[place]] < last_E[held[oldest]]):
                oldest = place
        is_held_E[held[oldest]] = False
        count -= 1
        held[oldest] = held[count]
    return count
