"""Distinct expert sets of one layer with their weights: the hyperedges of co-activation.

Legend: T tokens, K top-k, H sets, E experts; key_HN holds a row's ids packed into N words of 64 bits.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.profile import ExpertSets
from traces.ids import generator
from traces.kernels import collect_sets, pack_rows

__all__ = ["expert_sets", "sample_tokens"]

CHUNK_TOKENS = 1 << 18
ZOBRIST_SEED = 0x5E75


def sample_tokens(num_tokens: int, most: int, seed: int) -> npt.NDArray[np.int64]:
    """At most `most` token positions, ascending: one drawn from each of equal strides (all where they suffice)."""
    if num_tokens <= most:
        return np.arange(num_tokens)
    stride = -(-num_tokens // most)
    start_T = np.arange(0, num_tokens, stride)
    width_T = np.minimum(stride, num_tokens - start_T)
    return start_T + generator(seed).integers(0, width_T)


def expert_sets(
    expert_TK: npt.NDArray[np.uint8], limit: int, *, max_sets: int, sample_T: npt.NDArray[np.int64], used_tokens: int
) -> ExpertSets:
    """The layer's distinct sets, exact where they are at most `max_sets`, else those of the tokens `sample_T`.

    (To be counted fast, rows that repeat an id count as kinds of their own towards that limit.)

    Ids from `limit` on are left out, and so are tokens without any id; `used_tokens` counts the others and gives the
    coverage. Rows are ascending ids, then -1; rows in lexicographic order. Two different sets would be taken for one
    with a probability below 1e-26 (128-bit keys).
    """
    counted = _count(expert_TK, limit, max_sets, np.arange(0))
    if counted is None:
        counted = _count(expert_TK, limit, len(sample_T), sample_T)
        assert counted is not None
    first_H, weight_H = counted
    expert_HK, weight_H = _canonical(np.asarray(expert_TK[first_H]), weight_H, limit)
    coverage = float(weight_H.sum()) / used_tokens if used_tokens else 1.0
    return ExpertSets(expert_HK, weight_H, coverage)


def _count(
    expert_TK: npt.NDArray[np.uint8], limit: int, most: int, token_T: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]] | None:
    """One token of each kind of row and the kinds' weights, over `token_T` (empty: all); None beyond `most` kinds."""
    code_E2 = np.random.default_rng(ZOBRIST_SEED).integers(0, 2**64, (limit, 2), dtype=np.uint64)
    # rows without any id are a kind as well, though not a set
    room = min(most, len(token_T) or len(expert_TK)) + 1
    key_H2 = np.empty((room, 2), dtype=np.uint64)
    weight_H, first_H = np.empty(room, dtype=np.int64), np.empty(room, dtype=np.int64)
    slot = np.full(1 << (2 * room - 1).bit_length(), -1, dtype=np.int32)
    found = 0
    for start in range(0, len(token_T) or len(expert_TK), CHUNK_TOKENS):
        part = token_T[start : start + CHUNK_TOKENS]
        if not len(token_T):
            part = np.arange(start, min(start + CHUNK_TOKENS, len(expert_TK)))
        found = collect_sets(expert_TK, limit, part, code_E2, key_H2, weight_H, first_H, slot, found)
        if found < 0:
            return None
    if found > most and key_H2[:found].any(axis=1).all():
        return None
    return first_H[:found], weight_H[:found]


def _canonical(
    row_HK: npt.NDArray[np.uint8], weight_H: npt.NDArray[np.int64], limit: int
) -> tuple[npt.NDArray[np.int16], npt.NDArray[np.int64]]:
    """Sorted rows without repeated ids, merged and in lexicographic order; the row without ids left out."""
    packing = _Packing.of(row_HK, limit)
    key_HN = packing.pack(row_HK)
    order_H = np.argsort(key_HN[:, 0]) if packing.words == 1 else np.lexsort(key_HN.T[::-1])
    key_HN, weight_H = key_HN[order_H], weight_H[order_H]
    first_H = np.ones(len(key_HN), dtype=bool)
    np.any(key_HN[1:] != key_HN[:-1], axis=1, out=first_H[1:])
    weight_H, key_HN = np.add.reduceat(weight_H, np.flatnonzero(first_H)), key_HN[first_H]
    expert_HK = packing.unpack(key_HN)[:, : row_HK.shape[1]]
    some_H = expert_HK[:, 0] >= 0
    return np.ascontiguousarray(expert_HK[some_H]), weight_H[some_H]


@dataclass(frozen=True, slots=True)
class _Packing:
    """Rows as numbers that compare like them: `words` words of `per_word` digits of base `base`, each id + `lift`."""

    limit: int
    base: int
    lift: int
    per_word: int
    words: int

    @classmethod
    def of(cls, expert_HK: npt.NDArray[np.uint8], limit: int) -> "_Packing":
        ordered_HK = np.sort(expert_HK, axis=1)
        full = bool((ordered_HK < limit).all()) and bool((ordered_HK[:, 1:] != ordered_HK[:, :-1]).all())
        # without unset digits 256 experts fit eight to a word, which saves sorting by two keys
        base, lift, per_word, top_k = limit + (not full), int(not full), 1, expert_HK.shape[1]
        while per_word < top_k and base ** (per_word + 1) <= 2**64:
            per_word += 1
        return cls(limit, base, lift, per_word, -(-top_k // per_word))

    def pack(self, expert_HK: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
        key_HN = np.empty((len(expert_HK), self.words), dtype=np.uint64)
        pack_rows(expert_HK, self.limit, self.base, self.lift, self.per_word, key_HN)
        return key_HN

    def unpack(self, key_HN: npt.NDArray[np.uint64]) -> npt.NDArray[np.int16]:
        expert_HK = np.empty((len(key_HN), self.words * self.per_word), dtype=np.int16)
        for word in range(self.words):
            rest_H = key_HN[:, word].copy()
            for digit in range(self.per_word - 1, -1, -1):
                place = word * self.per_word + digit
                expert_HK[:, place] = (rest_H % np.uint64(self.base)).astype(np.int64) - self.lift
                rest_H //= np.uint64(self.base)
        return expert_HK
