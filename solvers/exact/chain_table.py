"""What every pair of partitions of neighbouring layers can keep: the table that the chain's dynamic program walks.

A partition puts the E experts of a layer into R unnamed groups of C. Naming the groups of one layer after those of the
layer before is a matching of R blocks with R blocks; the table holds the best matching of every pair of partitions.

Legend: L layers, E logical experts, R ranks (groups), C experts of a group, B partitions, U subsets of C experts.
"""

import math
from itertools import combinations

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["MOST_PARTITIONS", "Partitions", "best_matching", "kept_table", "number_of_partitions", "partitions_of"]

IntArray = npt.NDArray[np.int64]

MOST_PARTITIONS = 1000
"""8 experts on 4 ranks have 105, 9 on 3 have 280, 10 on 5 have 945; 12 on 4 have 15,400."""


class Partitions:
    """All partitions of E experts into R groups: `subset_UE` 0 or 1, the subsets that are groups of some partition;
    `group_BR` int64, the subset of each group of each partition, by lowest expert."""

    def __init__(self, subset_UE: IntArray, group_BR: IntArray) -> None:
        self.subset_UE, self.group_BR = subset_UE, group_BR

    def rank_E(self, partition: int) -> IntArray:
        """Group of each expert, groups by lowest expert, (E,)."""
        found: IntArray = self.subset_UE[self.group_BR[partition]].argmax(axis=0)
        return found


def number_of_partitions(num_experts: int, num_ranks: int) -> int:
    """E! / (C!^R R!)."""
    size = num_experts // num_ranks
    return math.factorial(num_experts) // (math.factorial(size) ** num_ranks * math.factorial(num_ranks))


def partitions_of(num_experts: int, num_ranks: int) -> Partitions:
    """Every partition into equal groups once, in lexicographic order; E must be a multiple of R."""
    size = num_experts // num_ranks
    grown: list[list[tuple[int, ...]]] = [[]]
    for _ in range(num_ranks):
        longer = []
        for groups in grown:
            free = sorted(set(range(num_experts)).difference(*groups))
            longer += [[*groups, (free[0], *others)] for others in combinations(free[1:], size - 1)]
        grown = longer
    number: dict[tuple[int, ...], int] = {}
    group_BR = np.array([[number.setdefault(group, len(number)) for group in groups] for groups in grown])
    subset_UE = np.zeros((len(number), num_experts), dtype=np.int64)
    for group, row in number.items():
        subset_UE[row, list(group)] = 1
    return Partitions(subset_UE, group_BR)


def kept_table(weight_EE: IntArray, partitions: Partitions) -> IntArray:
    """Most flow of `weight_EE` that stays on its rank, for each partition before and each after, (B, B).

    O(U^2 E + B^2 R 2^R); with one partition (one expert a group, or one group) a single assignment, O(R^3).
    """
    held_UU = partitions.subset_UE @ weight_EE @ partitions.subset_UE.T
    group_BR = partitions.group_BR
    if len(group_BR) == 1:
        block_RR = held_UU[np.ix_(group_BR[0], group_BR[0])]
        after_R = best_matching(block_RR)
        return np.array([[block_RR[np.arange(len(after_R)), after_R].sum()]])
    return _best_matchings(held_UU, group_BR)


def best_matching(block_RR: IntArray) -> IntArray:
    """The column of each row that makes the sum over rows largest, one to one, (R,). Exact."""
    from ortools.graph.python import linear_sum_assignment

    solver = linear_sum_assignment.SimpleLinearSumAssignment()
    before, after = np.indices(block_RR.shape)
    solver.add_arcs_with_cost(before.ravel(), after.ravel(), (block_RR.max() - block_RR).ravel())
    assert solver.solve() == solver.OPTIMAL
    return np.array([solver.right_mate(row) for row in range(len(block_RR))])


@njit(cache=True)
def _best_matchings(held_UU: IntArray, group_BR: IntArray) -> IntArray:  # pragma: no cover - compiled
    """Assignment by dynamic program over the columns taken: rows in order, 2^R states."""
    partitions, ranks = group_BR.shape
    table = np.zeros((partitions, partitions), dtype=np.int64)
    states = 1 << ranks
    row_S = np.zeros(states, dtype=np.int64)
    for taken in range(1, states):
        row_S[taken] = row_S[taken & (taken - 1)] + 1
    best_S = np.zeros(states, dtype=np.int64)
    for before in range(partitions):
        for after in range(partitions):
            for taken in range(1, states):
                held_U = held_UU[group_BR[before, row_S[taken] - 1]]
                best = np.int64(-1)
                for column in range(ranks):
                    if taken >> column & 1:
                        kept = best_S[taken ^ (1 << column)] + held_U[group_BR[after, column]]
                        best = max(best, kept)
                best_S[taken] = best
            table[before, after] = best_S[states - 1]
    return table
