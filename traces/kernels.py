"""Counting kernels over one layer of a trace. Ids of `limit` and above (null experts, the sentinel) are skipped.

Legend: T tokens, K top-k, E experts, W windows, C codes (folds or source ranks), H sets,
N 64-bit words of a packed row.
All release the GIL, so that layers can be counted side by side; all take read-only arrays.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["add_pairs", "add_transitions", "collect_sets", "count_codes", "count_windows", "pack_rows"]


@njit(cache=True, nogil=True)
def count_windows(
    expert_TK: npt.NDArray[np.uint8],
    limit: int,
    first_token: int,
    window_tokens: int,
    load_WE: npt.NDArray[np.int64],
) -> int:
    """Adds to load_WE[w, e] how often e was chosen in window w = token // window_tokens (the last takes the rest).

    Returns how many tokens chose any expert.
    """
    tokens, top_k = expert_TK.shape
    last = load_WE.shape[0] - 1
    start, used = 0, 0
    while start < tokens:
        window = min((first_token + start) // window_tokens, last)
        stop = tokens if window == last else min(tokens, (window + 1) * window_tokens - first_token)
        load_E = load_WE[window]
        for token in range(start, stop):
            any_expert = 0
            for k in range(top_k):
                expert = expert_TK[token, k]
                if expert < limit:
                    load_E[expert] += 1
                    any_expert = 1
            used += any_expert
        start = stop
    return used


@njit(cache=True, nogil=True)
def count_codes(
    expert_TK: npt.NDArray[np.uint8], limit: int, code_T: npt.NDArray[np.int32], load_CE: npt.NDArray[np.int64]
) -> None:
    """Adds to load_CE[c, e] how often tokens of code c chose e."""
    for token in range(expert_TK.shape[0]):
        load_E = load_CE[code_T[token]]
        for k in range(expert_TK.shape[1]):
            expert = expert_TK[token, k]
            if expert < limit:
                load_E[expert] += 1


@njit(cache=True, nogil=True)
def add_pairs(expert_TK: npt.NDArray[np.uint8], limit: int, pairs_EE: npt.NDArray[np.uint32]) -> None:
    """Adds each unordered pair of a row once, at (earlier id in the row, later id); the caller symmetrises."""
    top_k = expert_TK.shape[1]
    for token in range(expert_TK.shape[0]):
        for i in range(top_k - 1):
            expert = expert_TK[token, i]
            if expert < limit:
                row_E = pairs_EE[expert]
                for j in range(i + 1, top_k):
                    other = expert_TK[token, j]
                    if other < limit:
                        row_E[other] += 1


@njit(cache=True, nogil=True)
def add_transitions(
    expert_TK: npt.NDArray[np.uint8],
    limit: int,
    next_expert_TK: npt.NDArray[np.uint8],
    next_limit: int,
    transition_EE: npt.NDArray[np.uint32],
) -> None:
    """Adds every pair (expert at this site, expert at the next site) of each token: k * k pairs for k experts each."""
    for token in range(expert_TK.shape[0]):
        for i in range(expert_TK.shape[1]):
            expert = expert_TK[token, i]
            if expert < limit:
                row_E = transition_EE[expert]
                for j in range(next_expert_TK.shape[1]):
                    following = next_expert_TK[token, j]
                    if following < next_limit:
                        row_E[following] += 1


@njit(cache=True, nogil=True)
def collect_sets(
    expert_TK: npt.NDArray[np.uint8],
    limit: int,
    token_T: npt.NDArray[np.int64],
    code_E2: npt.NDArray[np.uint64],
    key_H2: npt.NDArray[np.uint64],
    weight_H: npt.NDArray[np.int64],
    first_H: npt.NDArray[np.int64],
    slot: npt.NDArray[np.int32],
    found: int,
) -> int:
    """Counts rows that hold the same ids in any order; returns how many kinds there are, or -1 when they do not fit.

    A row's key is the sum of its ids' random 128-bit codes (Zobrist hashing), so that no row need be sorted.
    `token_T` are the tokens to read, `first_H` a token of each kind; `slot` is an open-addressing table, -1 where free.
    """
    mask = len(slot) - 1
    for token in token_T:
        low, high = np.uint64(0), np.uint64(0)
        for k in range(expert_TK.shape[1]):
            expert = expert_TK[token, k]
            if expert < limit:
                low += code_E2[expert, 0]
                high += code_E2[expert, 1]
        place = np.int64(low & np.uint64(mask))
        while True:
            entry = slot[place]
            if entry < 0:
                if found == len(weight_H):
                    return -1
                slot[place] = found
                key_H2[found, 0] = low
                key_H2[found, 1] = high
                weight_H[found] = 1
                first_H[found] = token
                found += 1
                break
            if key_H2[entry, 0] == low and key_H2[entry, 1] == high:
                weight_H[entry] += 1
                break
            place = (place + 1) & mask
    return found


@njit(cache=True, nogil=True)
def pack_rows(
    expert_TK: npt.NDArray[np.uint8], limit: int, base: int, lift: int, per_word: int, key_TN: npt.NDArray[np.uint64]
) -> None:
    """Packs each row's distinct ids + `lift`, ascending, into words of `per_word` digits; digit 0 stands for unset.

    Words compare as the rows do: lexicographically, with unset before every id.
    """
    tokens, top_k = expert_TK.shape
    digits = key_TN.shape[1] * per_word
    row = np.empty(top_k, dtype=np.int64)
    for token in range(tokens):
        count = 0
        for k in range(top_k):
            expert = np.int64(expert_TK[token, k])
            if expert >= limit:
                continue
            place = count
            while place > 0 and row[place - 1] > expert:
                place -= 1
            if place > 0 and row[place - 1] == expert:
                continue
            for move in range(count, place, -1):
                row[move] = row[move - 1]
            row[place] = expert
            count += 1
        for word in range(key_TN.shape[1]):
            key = np.uint64(0)
            for digit in range(word * per_word, min((word + 1) * per_word, digits)):
                value = np.uint64(row[digit] + lift) if digit < count else np.uint64(0)
                key = key * np.uint64(base) + value
            key_TN[token, word] = key
