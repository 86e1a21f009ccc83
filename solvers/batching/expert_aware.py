"""Expert-aware batching of tokens with experts in many layers, from a queue, with a limit on waiting.

Read-ME's requests have one expert each, the same in all layers. With top-k routing in many layers hardly two tokens
share a route, so its queues by expert become this: the next to join a batch is the waiting token that brings the fewest
experts which the batch does not touch yet, summed over the layers (all of a token's experts are known, or predicted).

Legend: L routing sites, T tokens, W 64-bit words, B batches, Q requests.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.errors import UsageError
from solvers.batching.routes import Words, count_bits

__all__ = ["Batching", "Start", "aware_batches"]

IntArray = npt.NDArray[np.int64]

Start = Literal["oldest", "hottest"]
"""The token that a batch starts with: who has waited longest, or whose experts the waiting tokens use most."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Batching:
    """The batch of each token, from 0, and how many batches ran while it was waiting in the queue, (T,) each."""

    batch_T: IntArray
    wait_T: IntArray

    @property
    def num_batches(self) -> int:
        """B."""
        return int(self.batch_T.max(initial=-1)) + 1

    def wait_percentile(self, percent: float) -> float:
        """That percentile of the waits, in batches; 0 without tokens."""
        return float(np.percentile(self.wait_T, percent)) if len(self.wait_T) else 0.0

    def batches(self) -> list[IntArray]:
        """The tokens of each batch, as indices over T in ascending order."""
        order_T = np.argsort(self.batch_T, kind="stable")
        cut = np.searchsorted(self.batch_T[order_T], np.arange(1, self.num_batches))
        return np.split(order_T, cut) if len(order_T) else []


def aware_batches(
    route_TW: Words,
    batch_tokens: int,
    queue: int,
    *,
    start: Start = "oldest",
    max_wait: int | None = None,
    request_id_T: IntArray | None = None,
) -> Batching:
    """Batches of `batch_tokens` tokens, drawn from the `queue` tokens that have come first and still wait.

    Parameters
    ----------
    route_TW
        routes as `pack_routes` makes them, in order of arrival
    batch_tokens, queue
        tokens of a batch, and tokens that wait at a time (batch_tokens or more)
    start
        hottest is what "longest queue first" becomes, and starves tokens with rare experts as that does; oldest does
        not (a token then waits for fewer batches than the queue has tokens) and touches about as few experts
    max_wait
        a token waits for so many batches at most; None: as long as it takes. First come, first served waits for
        ceil(queue / batch_tokens) - 1, and no limit can be lower; at that limit the order is first come, first served
    request_id_T
        tokens of one request run in order, one to a batch (decoding): the queue holds the next token of as many
        requests, and a request that is over makes room for the next. None: tokens are independent

    Returns every token exactly once. Raises UsageError for sizes or a limit that make no sense.

    Notes
    -----
    Tokens that are due (whose wait could otherwise exceed the limit) come before all others, oldest first. Ties go to
    the token that came first.

    Complexity: O(T queue W).
    Guarantee: wait <= max_wait, and wait < queue from the oldest. The number of experts is a heuristic's, without a
    bound: of 4,000 small random cases 18 touched more than first come, first served, up to 1.1 times as many.
    Reference: after Read-ME, arXiv 2410.19123, algorithm 1; the guard is ours.
    """
    if batch_tokens < 1 or queue < batch_tokens:
        raise UsageError(f"queue is {queue} and batch_tokens {batch_tokens}; give 1 <= batch_tokens <= queue")
    if start not in get_args(Start):
        raise UsageError(f"start is {start!r}; use one of {', '.join(get_args(Start))}")
    least = -(-queue // batch_tokens) - 1
    if max_wait is not None and max_wait < least:
        raise UsageError(
            f"max_wait is {max_wait}; a queue of {queue} tokens in batches of {batch_tokens} waits for {least} batches "
            "even in order of arrival, so give that or more"
        )
    tokens = len(route_TW)
    if request_id_T is None:
        next_T = np.full(tokens, -1, dtype=np.int64)
        first_Q = np.arange(tokens)
    else:
        if len(request_id_T) != tokens:
            raise UsageError(f"request_id_T has {len(request_id_T)} tokens, route_TW {tokens}")
        next_T, first_Q = _chains(np.asarray(request_id_T))
    # whoever has waited so long is served in order of age, and no more than the queue is older
    due = -1 if max_wait is None else max_wait - least
    batch_T, wait_T = _form(
        np.ascontiguousarray(route_TW), next_T, first_Q, batch_tokens, queue, due, start == "hottest"
    )
    return Batching(batch_T=batch_T, wait_T=wait_T)


def _chains(request_id_T: IntArray) -> tuple[IntArray, IntArray]:
    """The next token of each token's request (-1: none), and the requests' first tokens in order of arrival."""
    order_T = np.argsort(request_id_T, kind="stable")
    same_T = request_id_T[order_T][1:] == request_id_T[order_T][:-1]
    next_T = np.full(len(order_T), -1, dtype=np.int64)
    next_T[order_T[:-1][same_T]] = order_T[1:][same_T]
    first_T = np.ones(len(order_T), dtype=np.bool_)
    first_T[order_T[1:][same_T]] = False
    return next_T, np.flatnonzero(first_T)


@njit(cache=True, nogil=True)
def _form(
    route_TW: Words, next_T: IntArray, first_Q: IntArray, batch_tokens: int, queue: int, due: int, hottest: bool
) -> tuple[IntArray, IntArray]:
    tokens, words = route_TW.shape
    batch_T = np.full(tokens, -1, dtype=np.int64)
    wait_T = np.zeros(tokens, dtype=np.int64)
    entered_T = np.zeros(tokens, dtype=np.int64)
    # ascending in age: who entered first stands first
    waiting = np.empty(queue, dtype=np.int64)
    taken = np.zeros(queue, dtype=np.bool_)
    new = np.empty(queue, dtype=np.int64)
    heat = np.zeros(words * 64, dtype=np.int64)
    union_W = np.empty(words, dtype=np.uint64)
    count, coming, batch, done = 0, 0, 0, 0
    while done < tokens:
        while count < queue and coming < len(first_Q):
            token = first_Q[coming]
            entered_T[token] = batch
            waiting[count] = token
            _add_heat(route_TW[token], heat, 1)
            count += 1
            coming += 1
        union_W[:] = 0
        taken[:count] = False
        for at in range(count):
            new[at] = 0
            for word in range(words):
                new[at] += np.int64(count_bits(route_TW[waiting[at], word]))
        size = min(batch_tokens, count)
        for place in range(size):
            chosen = -1
            if due >= 0:
                for at in range(count):
                    if not taken[at]:
                        if batch - entered_T[waiting[at]] >= due:
                            chosen = at
                        break
            if chosen < 0 and place == 0:
                chosen, best = 0, -1
                for at in range(count if hottest else 0):
                    score = _heat_of(route_TW[waiting[at]], heat)
                    if score > best:
                        chosen, best = at, score
            elif chosen < 0:
                for at in range(count):
                    if not taken[at] and (chosen < 0 or new[at] < new[chosen]):
                        chosen = at
            taken[chosen] = True
            for word in range(words):
                added = route_TW[waiting[chosen], word] & ~union_W[word]
                if added != 0:
                    union_W[word] |= added
                    for at in range(count):
                        new[at] -= np.int64(count_bits(route_TW[waiting[at], word] & added))
        left = 0
        follow = np.empty(size, dtype=np.int64)
        followers = 0
        for at in range(count):
            token = waiting[at]
            if not taken[at]:
                waiting[left] = token
                left += 1
                continue
            batch_T[token] = batch
            wait_T[token] = batch - entered_T[token]
            _add_heat(route_TW[token], heat, -1)
            done += 1
            if next_T[token] >= 0:
                follow[followers] = next_T[token]
                followers += 1
        count = left
        batch += 1
        for at in range(followers):
            entered_T[follow[at]] = batch
            waiting[count] = follow[at]
            _add_heat(route_TW[follow[at]], heat, 1)
            count += 1
    return batch_T, wait_T


@njit(cache=True, nogil=True)
def _add_heat(route_W: Words, heat: IntArray, by: int) -> None:
    for word in range(len(route_W)):
        bits = route_W[word]
        while bits:
            lowest = bits & (~bits + np.uint64(1))
            heat[word * 64 + np.int64(count_bits(lowest - np.uint64(1)))] += by
            bits ^= lowest


@njit(cache=True, nogil=True)
def _heat_of(route_W: Words, heat: IntArray) -> int:
    total = 0
    for word in range(len(route_W)):
        bits = route_W[word]
        while bits:
            lowest = bits & (~bits + np.uint64(1))
            total += heat[word * 64 + np.int64(count_bits(lowest - np.uint64(1)))]
            bits ^= lowest
    return total
