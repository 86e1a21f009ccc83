"""A token's route as bits, one for each (site, expert), and the experts that batches of routes touch.

Legend: L routing sites, T tokens, K top-k, E experts, B batches, W 64-bit words.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.errors import UsageError

__all__ = ["count_bits", "pack_routes", "unique_experts"]

IntArray = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]


def pack_routes(expert_LTK: npt.NDArray[np.uint8 | np.uint16], num_experts: int) -> Words:
    """route_TW: bit l * num_experts + e of a token is set where it takes expert e at site l. Unset ids are left out."""
    sites, tokens = expert_LTK.shape[:2]
    route_TW = np.zeros((tokens, -(-sites * num_experts // 64)), dtype=np.uint64)
    for site in range(sites):
        _set_bits(np.ascontiguousarray(expert_LTK[site]), num_experts, site * num_experts, route_TW)
    return route_TW


def unique_experts(route_TW: Words, batch_T: IntArray) -> IntArray:
    """How many different experts each batch touches, summed over the sites, (B,). Complexity: O(T W)."""
    if batch_T.shape != (len(route_TW),) or (batch_T.size and int(batch_T.min()) < 0):
        raise UsageError(f"batch_T is {batch_T.shape}; give the batch, from 0, of each of {len(route_TW)} tokens")
    union_BW = np.zeros((int(batch_T.max(initial=-1)) + 1, route_TW.shape[1]), dtype=np.uint64)
    _merge(route_TW, batch_T, union_BW)
    return np.asarray(np.bitwise_count(union_BW).sum(axis=1, dtype=np.int64))


@njit(cache=True, nogil=True)
def count_bits(word: np.uint64) -> np.uint64:
    """Bits that are set in a word."""
    word = word - ((word >> np.uint64(1)) & np.uint64(0x5555555555555555))
    word = (word & np.uint64(0x3333333333333333)) + ((word >> np.uint64(2)) & np.uint64(0x3333333333333333))
    word = (word + (word >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return (word * np.uint64(0x0101010101010101)) >> np.uint64(56)


@njit(cache=True, nogil=True)
def _set_bits(expert_TK: npt.NDArray[np.uint8], num_experts: int, first: int, route_TW: Words) -> None:
    for token in range(expert_TK.shape[0]):
        for k in range(expert_TK.shape[1]):
            if expert_TK[token, k] < num_experts:
                bit = first + np.int64(expert_TK[token, k])
                route_TW[token, bit // 64] |= np.uint64(1) << np.uint64(bit % 64)


@njit(cache=True, nogil=True)
def _merge(route_TW: Words, batch_T: IntArray, union_BW: Words) -> None:
    for token in range(len(batch_T)):
        for word in range(route_TW.shape[1]):
            union_BW[batch_T[token], word] |= route_TW[token, word]
