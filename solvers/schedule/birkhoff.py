"""Rounds as large as can be: a matrix of loads as a sum of matchings, each as heavy as its lightest pair allows.

Legend: R ranks, G rounds. Loads are whole units (of time or bytes), int64.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["birkhoff", "bottleneck_matching", "complete"]

IntArray = npt.NDArray[np.int64]


def birkhoff(load_RR: IntArray, most_rounds: int) -> tuple[IntArray, IntArray]:
    """Whom each rank sends to in each round (-1: nobody) and how much, (G, R) each; G <= most_rounds.

    Rows and columns are padded to the largest sum S; every round is the perfect matching whose smallest entry is
    largest, and takes that much of every pair of it. The diagonal of `load_RR` must be 0.
    Guarantee: without the cap the rounds carry all of the load and their longest messages add up to exactly S, the
    largest row or column sum, which no rounds can beat. At most R^2 - 2 R + 2 rounds are needed for that.
    Complexity: O(G R^3 log R). Deterministic.
    Reference: Birkhoff (1946), von Neumann (1953); open-shop scheduling with pre-emption (Gonzalez and Sahni, 1976).
    """
    ranks = len(load_RR)
    total_RR = load_RR + _padding(load_RR)
    real_RR = load_RR.copy()
    to_GR: list[IntArray] = []
    amount_GR: list[IntArray] = []
    match_R = np.full(ranks, -1, dtype=np.int64)
    while real_RR.any() and len(to_GR) < most_rounds:
        match_R = bottleneck_matching(total_RR, match_R)
        rank = np.arange(ranks)
        step = total_RR[rank, match_R].min()
        total_RR[rank, match_R] -= step
        sent_R = np.minimum(step, real_RR[rank, match_R])
        real_RR[rank, match_R] -= sent_R
        to_GR.append(np.where(sent_R > 0, match_R, -1))
        amount_GR.append(sent_R)
    shape = (len(to_GR), ranks)
    return np.array(to_GR, dtype=np.int64).reshape(shape), np.array(amount_GR, dtype=np.int64).reshape(shape)


def _padding(load_RR: IntArray) -> IntArray:
    """What brings every row and column to the largest sum: on the diagonal (idle) first, then corner by corner."""
    row_R, column_R = load_RR.sum(axis=1), load_RR.sum(axis=0)
    most = max(int(row_R.max()), int(column_R.max()))
    row_R, column_R = most - row_R, most - column_R
    idle_R = np.minimum(row_R, column_R)
    padding_RR: IntArray = np.diag(idle_R)
    row_R, column_R = row_R - idle_R, column_R - idle_R
    row, column = 0, 0
    while row < len(row_R) and column < len(column_R):
        amount = min(row_R[row], column_R[column])
        padding_RR[row, column] += amount
        row_R[row] -= amount
        column_R[column] -= amount
        if row_R[row] == 0:
            row += 1
        else:
            column += 1
    return padding_RR


@njit(cache=True)
def _augment(entry_RR: IntArray, least: int, row: int, owner_R: IntArray, seen_R: IntArray, mark: int) -> bool:
    """Whether `row` got a column whose entry is at least `least`, others moving over where they must."""
    for column in range(len(entry_RR)):
        if entry_RR[row, column] >= least and seen_R[column] != mark:
            seen_R[column] = mark
            if owner_R[column] < 0 or _augment(entry_RR, least, owner_R[column], owner_R, seen_R, mark):
                owner_R[column] = row
                return True
    return False


@njit(cache=True)
def _matched(entry_RR: IntArray, least: int, start_R: IntArray, owner_R: IntArray) -> bool:
    """Whether all rows can be matched by entries of `least` or more; `owner_R` becomes the row of each column."""
    ranks = len(entry_RR)
    owner_R[:] = -1
    placed_R = np.zeros(ranks, dtype=np.bool_)
    for row in range(ranks):
        column = start_R[row]
        if column >= 0 and entry_RR[row, column] >= least:
            owner_R[column] = row
            placed_R[row] = True
    seen_R = np.full(ranks, -1, dtype=np.int64)
    for row in range(ranks):
        if not placed_R[row] and not _augment(entry_RR, least, row, owner_R, seen_R, row):
            return False
    return True


@njit(cache=True)
def bottleneck_matching(entry_RR: IntArray, start_R: IntArray) -> IntArray:
    """The column of each row, (R,), of the perfect matching by positive entries whose smallest entry is largest.

    `start_R` is a matching to begin from, -1 for none. There must be a perfect matching. Complexity O(R^3 log R).
    """
    values = np.unique(entry_RR)
    values = values[values > 0]
    low, high = 0, len(values) - 1
    owner_R, best_R = np.empty(len(entry_RR), dtype=np.int64), np.empty(len(entry_RR), dtype=np.int64)
    found = False
    while low <= high:
        middle = (low + high) // 2
        if _matched(entry_RR, values[middle], start_R, owner_R):
            best_R[:] = owner_R
            found = True
            low = middle + 1
        else:
            high = middle - 1
    assert found
    match_R = np.empty(len(entry_RR), dtype=np.int64)
    for column in range(len(entry_RR)):
        match_R[best_R[column]] = column
    return match_R


def complete(load_RR: IntArray, to_GR: IntArray, amount_GR: IntArray) -> tuple[IntArray, npt.NDArray[np.float64]]:
    """Rounds that carry all of `load_RR`, given some that carry a part: `to_GR` and shares of each pair, (G', R).

    What is left, largest first, goes where it lengthens a round least; a new round opens where no old one has both
    ports free. Pairs without load get a place too, since a later batch may use them.
    """
    ranks = len(load_RR)
    at_G, sender = np.nonzero(to_GR >= 0)
    left_RR = load_RR.copy()
    seen_RR = np.eye(ranks, dtype=bool)
    np.subtract.at(left_RR, (sender, to_GR[at_G, sender]), amount_GR[at_G, sender])
    seen_RR[sender, to_GR[at_G, sender]] = True
    pairs = np.argwhere((left_RR > 0) | ~seen_RR)
    pairs = pairs[np.argsort(-left_RR[pairs[:, 0], pairs[:, 1]], kind="stable")]
    room = ((0, len(pairs)), (0, 0))
    to_GR = np.pad(to_GR, room, constant_values=-1)
    amount_GR = np.pad(amount_GR, room)
    rounds = _place(pairs, left_RR, to_GR, amount_GR, len(to_GR) - len(pairs))
    to_GR, amount_GR = to_GR[:rounds], amount_GR[:rounds]
    whole_GR = np.where(to_GR >= 0, load_RR[np.arange(ranks), to_GR], 0)
    share_GR = np.where(whole_GR > 0, amount_GR / np.maximum(whole_GR, 1), to_GR >= 0)
    return to_GR, share_GR.astype(np.float64)


@njit(cache=True)
def _place(pairs: IntArray, left_RR: IntArray, to_GR: IntArray, amount_GR: IntArray, rounds: int) -> int:
    ranks = to_GR.shape[1]
    taken_GR = np.zeros(to_GR.shape, dtype=np.bool_)
    longest_G = np.zeros(len(to_GR), dtype=np.int64)
    for index in range(rounds):
        longest_G[index] = amount_GR[index].max()
        for rank in range(ranks):
            if to_GR[index, rank] >= 0:
                taken_GR[index, to_GR[index, rank]] = True
    for at in range(len(pairs)):
        sender, receiver = pairs[at]
        left = left_RR[sender, receiver]
        best, best_growth = rounds, left + 1
        for index in range(rounds):
            there = to_GR[index, sender] == receiver
            if there or (to_GR[index, sender] < 0 and not taken_GR[index, receiver]):
                length = left + (amount_GR[index, sender] if there else 0)
                growth = max(0, length - longest_G[index])
                if growth < best_growth:
                    best, best_growth = index, growth
        to_GR[best, sender] = receiver
        taken_GR[best, receiver] = True
        amount_GR[best, sender] += left
        longest_G[best] = max(longest_G[best], amount_GR[best, sender])
        rounds = max(rounds, best + 1)
    return rounds
