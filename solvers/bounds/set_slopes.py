"""Slopes of expert sets as the search for a bound moves them: per pair with all partitions, with a few, or per member.

Each kind steps towards agreement with the matrix X (`step`, which returns what the slopes amount to on each pair of
experts), says what its slopes prove without X (`value`), and holds them in `slopes`.

Legend: H expert sets, E experts, K members, Q pairs of members, A active partitions, M patterns of present members.
"""

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from solvers.bounds.columns import MOST_ACTIVE, cheapest_partitions, step_columns
from solvers.bounds.partitions import member_values, pair_values, partitions_of, sizes_of, step_members, step_pairs

__all__ = ["SLOPE_STEP", "ColumnSlopes", "MemberSlopes", "PairSlopes"]

FloatArray = npt.NDArray[np.float64]

SLOPE_STEP = 0.3
SHARE_REACH = 0.9
JOIN_ALWAYS, JOIN_EVERY = 20, 5
"""Partitions join in each of the first iterations, then in every fifth."""


@dataclass(slots=True)
class PairSlopes:
    """Sets of few members: a slope for each pair, all partitions."""

    expert_HK: npt.NDArray[np.int16]
    weight_H: FloatArray
    capacity: int
    groups: int
    least: float
    tables: Any = field(init=False)
    slopes: FloatArray = field(init=False)
    share_HV: FloatArray = field(init=False)
    share_step_M: FloatArray = field(init=False)

    def __post_init__(self) -> None:
        found = partitions_of(self.expert_HK, self.capacity, self.groups)
        self.tables = (found.together_MVQ, found.groups_MV, found.count_M, found.pattern_H)
        top_k = self.expert_HK.shape[1]
        self.slopes = np.zeros((len(self.weight_H), top_k * (top_k - 1) // 2))
        live_HV = np.arange(found.groups_MV.shape[1]) < found.count_M[found.pattern_H][:, None]
        self.share_HV = live_HV / found.count_M[found.pattern_H][:, None]
        norm_M = np.array(
            [np.linalg.norm(together_VQ, 2) if together_VQ.size else 0.0 for together_VQ in found.together_MVQ]
        )
        self.share_step_M = SHARE_REACH / (SLOPE_STEP * np.maximum(1.0, norm_M) ** 2)

    def step(self, same_EE: FloatArray) -> FloatArray:
        """One step; weights on pairs of experts, (E, E)."""
        return step_pairs(
            self.expert_HK,
            self.weight_H,
            same_EE,
            self.share_HV,
            self.slopes,
            *self.tables,
            SLOPE_STEP,
            self.share_step_M,
            self.least,
        )

    def value(self) -> float:
        """Sum over sets of weight * intercept."""
        return float(pair_values(self.weight_H, self.slopes, *self.tables))


@dataclass(slots=True)
class ColumnSlopes:
    """Sets of more members: a slope for each pair, a few partitions at a time."""

    expert_HK: npt.NDArray[np.int16]
    weight_H: FloatArray
    capacity: int
    groups: int
    least: float
    slopes: FloatArray = field(init=False)
    active: Any = field(init=False)
    steps: int = 0

    def __post_init__(self) -> None:
        sets, top_k = self.expert_HK.shape
        self.slopes = np.zeros((sets, top_k * (top_k - 1) // 2))
        shape = (sets, MOST_ACTIVE)
        self.active = (
            np.zeros(shape, np.int64),
            np.zeros(shape),
            np.zeros(shape),
            np.zeros(sets, np.int64),
            np.ones(sets),
        )
        self._cheapest(join=True)

    def _cheapest(self, *, join: bool) -> float:
        return float(
            cheapest_partitions(
                self.expert_HK, self.weight_H, self.slopes, *self.active, self.capacity, self.groups, join
            )
        )

    def step(self, same_EE: FloatArray) -> FloatArray:
        """One step; weights on pairs of experts, (E, E)."""
        weight_EE = step_columns(
            self.expert_HK, self.weight_H, same_EE, self.slopes, *self.active, SLOPE_STEP, SHARE_REACH, self.least
        )
        self.steps += 1
        if self.steps <= JOIN_ALWAYS or self.steps % JOIN_EVERY == 0:
            self._cheapest(join=True)
        return weight_EE

    def value(self) -> float:
        """Sum over sets of weight * intercept."""
        return self._cheapest(join=False)


@dataclass(slots=True)
class MemberSlopes:
    """Sets of many members: a slope for each member."""

    expert_HK: npt.NDArray[np.int16]
    weight_H: FloatArray
    capacity: int
    groups: int
    tables: Any = field(init=False)
    slopes: FloatArray = field(init=False)
    slope_step: float = field(init=False)

    def __post_init__(self) -> None:
        top_k = self.expert_HK.shape[1]
        self.tables = sizes_of(top_k, self.capacity, self.groups)
        self.slopes = np.zeros(self.expert_HK.shape)
        self.slope_step = SLOPE_STEP / (2 * top_k)

    def step(self, same_EE: FloatArray) -> FloatArray:
        """One step; weights on pairs of experts, (E, E)."""
        return step_members(self.expert_HK, self.weight_H, same_EE, self.slopes, self.slope_step, self.capacity)

    def per_pair(self) -> FloatArray:
        """The same slopes, one for each pair of present members."""
        first, second = np.triu_indices(self.expert_HK.shape[1], 1)
        present = (self.expert_HK[:, first] >= 0) & (self.expert_HK[:, second] >= 0)
        return np.where(present, self.slopes[:, first] + self.slopes[:, second], 0.0)

    def value(self) -> float:
        """Sum over sets of weight * intercept."""
        return float(member_values(self.expert_HK, self.weight_H, self.slopes, *self.tables))
