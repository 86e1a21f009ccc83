"""Which rows an item computes: the (token, choice) pairs of one expert at one level.

Legend: T tokens, K choices of a token (`_TK`) or levels (`_EK`), E experts, X rows of one item, B iterations.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from placer.execute.dispatch.rows import ROW_MULTIPLE

__all__ = ["ItemRows", "assigned", "weighted_choices"]

IntArray = npt.NDArray[np.int64]


class ItemRows:
    """The pairs of a site, grouped by expert and level, tokens ascending.

    `expert_TK` has -1 where a token makes no choice; `level_TK` counts from 1. Rows are padded with zeros to a multiple
    of 8, so that a token's output does not depend on who else chose its expert.
    """

    def __init__(self, expert_TK: IntArray, level_TK: IntArray, num_experts: int, num_levels: int) -> None:
        self.shape_TK: tuple[int, int] = expert_TK.shape
        self.pairs = expert_TK.size
        self._levels = num_levels
        key_X = np.where(expert_TK >= 0, expert_TK * num_levels + level_TK - 1, num_experts * num_levels).reshape(-1)
        count = np.bincount(key_X, minlength=num_experts * num_levels + 1)[:-1]
        self.count_EK: IntArray = count.reshape(num_experts, num_levels)
        self._pair_X = np.argsort(key_X, kind="stable")
        self._first = np.concatenate([[0], np.cumsum(count)])

    def of(self, expert: int, plane: int) -> tuple[Tensor, Tensor]:
        """Token and pair of each row, (X,) each; a row of padding has the token and the pair behind the last."""
        at = expert * self._levels + plane
        first, last = int(self._first[at]), int(self._first[at + 1])
        rows = last - first
        index_2X = np.empty((2, rows + -rows % ROW_MULTIPLE), dtype=np.int64)
        index_2X[1, :rows] = self._pair_X[first:last]
        index_2X[0, :rows] = index_2X[1, :rows] // self.shape_TK[1]
        index_2X[:, rows:] = [[self.shape_TK[0]], [self.pairs]]
        token_X, pair_X = torch.from_numpy(index_2X)
        return token_X, pair_X


def assigned(count_EK: IntArray, tokens: int) -> tuple[IntArray, IntArray]:
    """Experts and levels of each token, (T, K), so that every expert gets its counts; -1 where nothing is left.

    A token has an expert once at most if no expert has more than `tokens`.
    """
    pairs = int(count_EK.sum())
    choices = max(1, -(-pairs // max(1, tokens)))
    at_X = np.repeat(np.arange(count_EK.size), count_EK.reshape(-1))
    expert_X = np.full(choices * tokens, -1, dtype=np.int64)
    level_X = np.ones(choices * tokens, dtype=np.int64)
    expert_X[:pairs], level_X[:pairs] = at_X // count_EK.shape[1], at_X % count_EK.shape[1] + 1
    shape_KT = (choices, tokens)
    return np.ascontiguousarray(expert_X.reshape(shape_KT).T), np.ascontiguousarray(level_X.reshape(shape_KT).T)


def weighted_choices(result_TKH: Tensor, weight_TK: Tensor) -> Tensor:
    """sum over k, ascending, of weight_k * result_k, (T, H), float32 inside."""
    total_TH = torch.zeros(result_TKH.shape[0], result_TKH.shape[2], dtype=torch.float32)
    for k in range(result_TKH.shape[1]):
        total_TH += result_TKH[:, k].float() * weight_TK[:, k, None]
    return total_TH.to(result_TKH.dtype)
