"""ExpertFlow's token scheduler (arXiv 2410.17954): two adjacent batches, merged and split anew to touch fewer experts.

    minimise  sum over layers and experts of OR over batch 1 of r_i  +  OR over batch 2 of r_i,   |batch 1| = |batch 2|

with r_i the experts of token i in all layers. NP-hard. Legend: T tokens of both batches, X (site, expert), W words.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.errors import UsageError
from solvers.batching.routes import Words, count_bits

__all__ = ["split_cost", "split_tokens"]

IntArray = npt.NDArray[np.int64]
BoolArray = npt.NDArray[np.bool_]

ROUNDS = 20


def split_cost(route_TW: Words, second_T: BoolArray) -> int:
    """Experts touched by the two batches together: tokens of the first, and those where `second_T`."""
    first = np.bitwise_or.reduce(route_TW[~second_T], axis=0, initial=0)
    second = np.bitwise_or.reduce(route_TW[second_T], axis=0, initial=0)
    return int(np.bitwise_count(first).sum() + np.bitwise_count(second).sum())


def split_tokens(
    route_TW: Words, rng: np.random.Generator, *, given_T: BoolArray | None = None, starts: int = 8
) -> BoolArray:
    """Which tokens go to the second batch; both batches keep their sizes.

    Parameters
    ----------
    route_TW
        routes of the tokens of both batches, as `pack_routes` makes them
    given_T
        the split to improve; None: the first half of the tokens (of an odd number, the larger half) and the rest
    starts
        pairs of tokens to start from, drawn with `rng`; the given split is a start besides

    Raises UsageError for a split of other tokens or a negative number of starts.

    Notes
    -----
    Two centres as in K-means, here rows of bits: a token belongs to the centre at the smaller Hamming distance, as many
    as each batch has room for, by the difference of the two distances; a batch's new centre has the bits that most of
    its tokens have. Until nothing changes, or 20 rounds. Then tokens are swapped between the batches while a swap
    touches fewer experts.

    Complexity: O(starts (20 T X + swaps T^2 W)).
    Guarantee: never worse than the given split, and no swap of two tokens betters the result.
    Reference: ExpertFlow, arXiv 2410.17954, token scheduler; the swaps are ours.
    """
    tokens = len(route_TW)
    if given_T is None:
        given_T = np.arange(tokens) >= (tokens + 1) // 2
    if given_T.shape != (tokens,) or given_T.dtype != np.bool_ or starts < 0:
        raise UsageError(
            f"given_T is {given_T.dtype} {given_T.shape} and starts {starts}; give bool ({tokens},) and 0 up"
        )
    size = int(given_T.sum())
    best_T = _swapped(route_TW, given_T)
    if not 0 < size < tokens:
        return best_T
    best = split_cost(route_TW, best_T)
    bit_TX = np.unpackbits(route_TW.view(np.uint8), axis=1).astype(np.float64)
    for start in range(-1, starts):
        if start < 0:
            centre_2X = np.stack([bit_TX[~given_T].mean(axis=0), bit_TX[given_T].mean(axis=0)]) > 0.5
        else:
            centre_2X = bit_TX[rng.choice(tokens, size=2, replace=False)] > 0.5
        found_T = _swapped(route_TW, _clustered(bit_TX, centre_2X, size))
        if (cost := split_cost(route_TW, found_T)) < best:
            best_T, best = found_T, cost
    return best_T


def _clustered(bit_TX: npt.NDArray[np.float64], centre_2X: BoolArray, size: int) -> BoolArray:
    """K-means of two clusters under the Hamming distance, the second of `size` tokens."""
    second_T = np.zeros(len(bit_TX), dtype=np.bool_)
    for _ in range(ROUNDS):
        # |bits xor centre| differs between the centres by this much, up to a constant
        nearer_T = bit_TX @ (1.0 - 2.0 * centre_2X[1]) - bit_TX @ (1.0 - 2.0 * centre_2X[0])
        nearer_T += float(centre_2X[1].sum()) - float(centre_2X[0].sum())
        changed_T = np.zeros_like(second_T)
        changed_T[np.argsort(nearer_T, kind="stable")[:size]] = True
        if np.array_equal(changed_T, second_T):
            break
        second_T = changed_T
        centre_2X = np.stack([bit_TX[~second_T].mean(axis=0), bit_TX[second_T].mean(axis=0)]) > 0.5
    return second_T


def _swapped(route_TW: Words, second_T: BoolArray) -> BoolArray:
    result_T = second_T.copy()
    _swap(np.ascontiguousarray(route_TW), result_T)
    return result_T


@njit(cache=True, nogil=True)
def _swap(route_TW: Words, second_T: BoolArray) -> None:
    """Swaps the pair that saves most until none saves; batches' unions without one token come from two passes."""
    tokens, words = route_TW.shape
    without_TW = np.empty((tokens, words), dtype=np.uint64)
    while True:
        cost = np.int64(0)
        for side in range(2):
            members = np.flatnonzero(second_T == (side == 1))
            running_W = np.zeros(words, dtype=np.uint64)
            for token in members:
                without_TW[token] = running_W
                running_W |= route_TW[token]
            for word in range(words):
                cost += np.int64(count_bits(running_W[word]))
            running_W = np.zeros(words, dtype=np.uint64)
            for token in members[::-1]:
                without_TW[token] |= running_W
                running_W |= route_TW[token]
        best, first, second = cost, -1, -1
        for one in range(tokens):
            if second_T[one]:
                continue
            for other in range(tokens):
                if not second_T[other]:
                    continue
                swapped = np.int64(0)
                for word in range(words):
                    swapped += np.int64(count_bits(without_TW[one, word] | route_TW[other, word]))
                    swapped += np.int64(count_bits(without_TW[other, word] | route_TW[one, word]))
                    if swapped >= best:
                        break
                if swapped < best:
                    best, first, second = swapped, one, other
        if first < 0:
            return
        second_T[first] = True
        second_T[second] = False
