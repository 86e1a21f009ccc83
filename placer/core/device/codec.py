"""QMoE's codec: bits per weight of ternary experts stored as dictionary codewords, and their bytes.

An expert at below one bit per weight: each weight is zero or the smallest or largest value of its row, and runs of
weights are replaced by 16-bit codewords. One plane, not nested: nothing of it is of use at another width.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.device.ladder import MatrixShape
from placer.core.errors import UsageError

__all__ = ["TernaryCodec", "bits_per_weight", "entropy_bits"]

IntArray = npt.NDArray[np.int64]

BUILT_FOR_ZEROS = 0.885
CODEWORDS = 1 << 16
MOST_PAIRS = 14
ROW_BYTES = 8
"""An offset of the row's first codeword (4), and its smallest and largest value in half precision (2 + 2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TernaryCodec:
    """What one expert costs in QMoE's format (Frantar and Alistarh 2310.16795, section 4).

    zero_share      share of weights that are zero, 0 to 1; the other two values are equally frequent
    decode_factor   time of the fused decoding product, as a multiple of the plain product's, 1 or more

    Raises UsageError.
    """

    zero_share: float
    decode_factor: float = 1.0

    def __post_init__(self) -> None:
        for name, low, high in (("zero_share", 0.0, 1.0), ("decode_factor", 1.0, 1e6)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
                raise UsageError(f"codec.{name} is {value!r}; give a number, {low:g} to {high:g}")

    @property
    def nested(self) -> bool:
        """False: an expert is one plane."""
        return False

    @property
    def levels(self) -> int:
        """One."""
        return 1

    @property
    def bits_per_weight(self) -> float:
        """Codeword bits by weight, without the rows' offsets and values."""
        return bits_per_weight(float(self.zero_share))

    def planes_of(self, level: int) -> range:
        """The only plane, at level 1; none at level 0."""
        if level not in (0, 1):
            raise UsageError(f"level {level} is not on the ladder; a ternary expert has level 1 alone")
        return range(level)

    def plane_bytes_K(self, shapes: Sequence[MatrixShape]) -> tuple[int]:
        """Expected bytes of an expert with these matrices, (1,): weights * rate / 8 + rows * (4 + 4), rounded up."""
        weights = sum(rows * columns for rows, columns in shapes)
        rows = sum(rows for rows, _ in shapes)
        return (math.ceil(weights * self.bits_per_weight / 8) + rows * ROW_BYTES,)

    def level_bytes(self, shapes: Sequence[MatrixShape], level: int) -> int:
        """Bytes that must be in memory to use an expert at `level`."""
        return sum(self.plane_bytes_K(shapes)[plane] for plane in self.planes_of(level))


def entropy_bits(zero_share: float) -> float:
    """Entropy of one ternary weight in bits: no code can have a lower rate."""
    shares = (zero_share, (1 - zero_share) / 2, (1 - zero_share) / 2)
    return -sum(share * math.log2(share) for share in shares if share > 0)


def bits_per_weight(zero_share: float) -> float:
    """Codeword bits by weight of long rows with that share of zeros, in the dictionary built for 0.885.

    A row is cut greedily, the longest codeword first: a walk down the tree of codewords ends where the next pair is
    missing, and that pair begins the next codeword. So the pairs that codewords begin with are a Markov chain, whose
    stationary state gives the mean length; exact for independent weights. A codeword holds 14 pairs at most, so no
    rate is below 16 / 28 of a bit. Complexity: O(codewords).
    """
    tree = _dictionary()
    share_3 = np.array([zero_share, (1 - zero_share) / 2, (1 - zero_share) / 2])
    share_9 = np.outer(share_3, share_3).reshape(-1)
    reach_W = np.ones(CODEWORDS)
    for length in range(2, MOST_PAIRS + 1):
        here = slice(*np.searchsorted(tree.length_W, (length, length + 1)))
        reach_W[here] = reach_W[tree.parent_W[here]] * share_9[tree.pair_W[here]]
    next_W9 = reach_W[:, None] * share_9 * (tree.missing_W9 | (tree.length_W == MOST_PAIRS)[:, None])
    chain_99, mean_9 = np.zeros((9, 9)), np.zeros(9)
    np.add.at(chain_99, tree.first_W, next_W9)
    np.add.at(mean_9, tree.first_W, next_W9.sum(1) * tree.length_W)
    balance = np.vstack([chain_99.T - np.eye(9), np.ones(9)])
    begin_9 = np.linalg.lstsq(balance, np.array([*[0.0] * 9, 1.0]), rcond=None)[0]
    return 16 / (2 * float(begin_9 @ mean_9))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class _Tree:
    """The codewords W, shortest first: each a parent and one more of nine pairs; and which pairs may not follow it."""

    parent_W: IntArray
    pair_W: IntArray
    length_W: IntArray
    first_W: IntArray
    missing_W9: npt.NDArray[np.bool_]


@functools.cache
def _dictionary() -> _Tree:
    """The 2^16 likeliest runs of 1 to 14 pairs at 88.5 % zeros; a run's beginnings are likelier, so they are in it.

    Among equally likely runs the shorter, then the one whose pairs come first, is taken.
    """
    share_3 = np.array([BUILT_FOR_ZEROS, (1 - BUILT_FOR_ZEROS) / 2, (1 - BUILT_FOR_ZEROS) / 2])
    # logarithms summed in another order differ in the last digit; whole counts do not
    zeros_9 = (np.array([0, 1, 2]) == 0).astype(np.int64)[:, None] + (np.array([0, 1, 2]) == 0)
    log_zero, log_other = math.log(share_3[0]), math.log(share_3[1])
    likelihood_9 = zeros_9.reshape(-1)
    parents, pairs, lengths = [np.full(9, -1)], [np.arange(9)], [np.ones(9, dtype=np.int64)]
    zeros = [likelihood_9]
    last = slice(0, 9)
    for length in range(2, MOST_PAIRS + 1):
        before = zeros[-1]
        child_zeros = (before[:, None] + likelihood_9).reshape(-1)
        parent = np.repeat(np.arange(last.start, last.stop), 9)
        pair = np.tile(np.arange(9), len(before))
        so_far = np.concatenate(zeros) * (log_zero - log_other) + np.concatenate(lengths) * 2 * log_other
        likely = child_zeros * (log_zero - log_other) + length * 2 * log_other
        if len(so_far) >= CODEWORDS:
            keep = likely >= np.partition(so_far, -CODEWORDS)[-CODEWORDS]
            child_zeros, parent, pair = child_zeros[keep], parent[keep], pair[keep]
        last = slice(last.stop, last.stop + len(pair))
        parents.append(parent)
        pairs.append(pair)
        zeros.append(child_zeros)
        lengths.append(np.full(len(pair), length))
    parent_W, pair_W, length_W, zeros_W = (np.concatenate(part) for part in (parents, pairs, lengths, zeros))
    likely_W = zeros_W * (log_zero - log_other) + length_W * 2 * log_other
    chosen = np.sort(np.argsort(-np.round(likely_W, 9), kind="stable")[:CODEWORDS])
    new_of = np.full(len(parent_W), -1)
    new_of[chosen] = np.arange(CODEWORDS)
    parent_W, pair_W, length_W = new_of[parent_W[chosen]], pair_W[chosen], length_W[chosen]
    parent_W[length_W == 1] = -1
    first_W = pair_W.copy()
    missing_W9 = np.ones((CODEWORDS, 9), dtype=np.bool_)
    for length in range(2, MOST_PAIRS + 1):
        here = length_W == length
        first_W[here] = first_W[parent_W[here]]
    missing_W9[parent_W[parent_W >= 0], pair_W[parent_W >= 0]] = False
    return _Tree(parent_W=parent_W, pair_W=pair_W, length_W=length_W, first_W=first_W, missing_W9=missing_W9)
