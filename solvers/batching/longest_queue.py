"""Read-ME's expert-aware batching (arXiv 2410.19123, algorithm 1), mended, beside first come, first served.

Legend: I requests, E experts.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.errors import UsageError

__all__ = ["fifo_batches", "longest_queue_batches"]

IntArray = npt.NDArray[np.int64]


def longest_queue_batches(expert_I: IntArray, tokens_I: IntArray, max_tokens: int) -> IntArray:
    """The batch, from 0, of each request: one expert a request (Read-ME's router decides it for all layers at once).

    Parameters
    ----------
    expert_I, tokens_I
        the expert and the tokens of each request, in order of arrival; all are waiting
    max_tokens
        tokens of one batch at most (the paper's MaxTokenLen)

    Returns batch_I: every request once, every batch within `max_tokens`.

    Raises
    ------
    UsageError
        for a request without tokens or larger than a batch, a negative expert, arrays of different lengths

    Notes
    -----
    Repeats: the expert with the most waiting tokens joins the batch whole if it fits; else its requests join in order
    of arrival until the next does not fit, and the batch is closed. The paper's listing indexes the queues by k where
    the expert is meant, and never ends once all queues are empty; here it ends. Ties go to the lower expert.

    Complexity: O(I + (E + B) E) for B batches.
    Guarantee: an expert is in two batches only where one of them was closed within its queue, so the sum of unique
    experts over B batches is at most (experts in use) + B - 1. It is no optimum: first come, first served may touch
    fewer where requests happen to arrive well packed (queues of 3, 2, 2 and 1 in batches of 4).
    Reference: Read-ME, arXiv 2410.19123, algorithm 1.
    """
    _check(tokens_I, max_tokens)
    if expert_I.shape != tokens_I.shape or (expert_I.size and int(expert_I.min()) < 0):
        raise UsageError(
            f"expert_I is {expert_I.shape} for {tokens_I.shape} requests; give an expert, from 0, for each"
        )
    order_I = np.argsort(expert_I, kind="stable")
    start_E = np.searchsorted(expert_I[order_I], np.arange(int(expert_I.max(initial=-1)) + 2))
    return _longest(order_I, start_E, tokens_I.astype(np.int64), max_tokens)


def fifo_batches(tokens_I: IntArray, max_tokens: int) -> IntArray:
    """The batch of each request where requests join in order of arrival and one that does not fit opens the next."""
    _check(tokens_I, max_tokens)
    return _fifo(tokens_I.astype(np.int64), max_tokens)


def _check(tokens_I: IntArray, max_tokens: int) -> None:
    if tokens_I.size and not 1 <= int(tokens_I.min()) <= int(tokens_I.max()) <= max_tokens:
        raise UsageError(
            f"requests have {int(tokens_I.min())} to {int(tokens_I.max())} tokens; give 1 to {max_tokens} (max_tokens)"
        )


@njit(cache=True, nogil=True)
def _longest(order_I: IntArray, start_E: IntArray, tokens_I: IntArray, max_tokens: int) -> IntArray:
    experts = len(start_E) - 1
    batch_I = np.full(len(order_I), -1, dtype=np.int64)
    head_E = start_E[:experts].copy()
    waiting_E = np.zeros(experts, dtype=np.int64)
    for expert in range(experts):
        for at in range(start_E[expert], start_E[expert + 1]):
            waiting_E[expert] += tokens_I[order_I[at]]
    left, batch, room = waiting_E.sum(), 0, max_tokens
    while left > 0:
        expert = int(np.argmax(waiting_E))
        if waiting_E[expert] == 0:
            break
        while head_E[expert] < start_E[expert + 1] and tokens_I[order_I[head_E[expert]]] <= room:
            item = order_I[head_E[expert]]
            head_E[expert] += 1
            batch_I[item] = batch
            room -= tokens_I[item]
            waiting_E[expert] -= tokens_I[item]
            left -= tokens_I[item]
        if waiting_E[expert] > 0 or room == 0:
            batch += 1
            room = max_tokens
    return batch_I


@njit(cache=True, nogil=True)
def _fifo(tokens_I: IntArray, max_tokens: int) -> IntArray:
    batch_I = np.zeros(len(tokens_I), dtype=np.int64)
    batch, room = 0, max_tokens
    for item in range(len(tokens_I)):
        if tokens_I[item] > room:
            batch += 1
            room = max_tokens
        batch_I[item] = batch
        room -= tokens_I[item]
    return batch_I
