"""Primal-dual search for good multipliers of one layer: the bound on groups touched, as a saddle point.

Primal: a matrix X (how much two experts share a group) in a relaxation of equipartitions, and for every set a
distribution over its partitions. Dual: slopes (sets agree with X), the diagonal, the box, triangles, rows, load. Steps
alternate (Chambolle and Pock 2011); any dual point is a valid bound, so the best one seen is kept.

Legend: E experts, H expert sets, K members, N triangles.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.profile import ExpertSets
from solvers.bounds.rows import better_rows, copies_worth, project_rows
from solvers.bounds.set_slopes import SLOPE_STEP, ColumnSlopes, MemberSlopes, PairSlopes
from solvers.bounds.spectrum import box_and_sum, project, top_sum
from solvers.bounds.triangles import charge, raise_multipliers, with_violated
from solvers.touch.anneal import pair_weights

__all__ = ["LayerSearch", "Multipliers"]

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]

MOST_PAIRED = 5
MEMBER_ITERATIONS = 60
"""Before columns take over from slopes per member, where they do."""
SPECTRUM_EXPERTS = 128
REACH = 1.0
BOX_STEP, DIAGONAL_STEP, TRIANGLE_STEP, LOAD_STEP, ROW_STEP, COPY_STEP = 0.6, 1.0, 0.03, 0.3, 0.2, 0.2
CALM = 0.6
SEPARATE_EVERY = 50
TRIANGLES_PER_EXPERT = 20


@dataclass(frozen=True, slots=True)
class Multipliers:
    """A dual point of one layer, per token: what it proves is `base` + max(0, price - load used)."""

    base: float
    paired: bool
    slopes: FloatArray
    rows_E: FloatArray
    spectrum_EE: FloatArray | None
    at_N3: IntArray
    tau_N: FloatArray
    load_E: FloatArray

    def proves(self, price: float) -> float:
        """Groups touched + price * PAR at least, or minus infinity where the load multipliers cost more than that."""
        spare = price - float(self.load_E.sum())
        return self.base + max(0.0, spare) if spare >= -1e-12 * max(1.0, price) else -np.inf


class LayerSearch:
    """The search for one layer and one level (ranks or nodes); `best` is the best dual point seen.

    `columns`: sets of 6 to 8 members get slopes per pair after a while, which prove more but take much longer.
    """

    def __init__(
        self,
        sets: ExpertSets,
        load_E: FloatArray,
        *,
        groups: int,
        capacity: int,
        redundant: int,
        ranks: int,
        columns: bool = False,
    ) -> None:
        weight_H = sets.weight_H.astype(np.float64)
        self.tokens = max(1.0, float(weight_H.sum()))
        weight_H /= self.tokens
        experts = len(load_E)
        self.groups, self.capacity, self.redundant, self.experts = groups, capacity, redundant, experts
        self.share_E = load_E * ranks / max(1.0, float(load_E.sum()))
        self.spectral = not redundant and experts <= SPECTRUM_EXPERTS
        self.least = 0.0 if redundant else -np.inf
        self.columns = columns
        self.block: PairSlopes | ColumnSlopes | MemberSlopes
        if sets.expert_HK.shape[1] <= MOST_PAIRED:
            self.block = PairSlopes(sets.expert_HK, weight_H, capacity, groups, self.least)
        else:
            self.block = MemberSlopes(sets.expert_HK, weight_H, capacity, groups)
        heaviest = float(pair_weights(sets.expert_HK, weight_H, experts).max())
        self.trivial = heaviest == 0.0 or groups == 1 or capacity == 1
        self.step_x = REACH / (SLOPE_STEP * max(heaviest, 1e-12))
        self.dual_step = 1.0 / self.step_x
        self.off_EE = 1.0 - np.eye(experts)
        self.same_EE = self.off_EE * (capacity - 1) / max(1, experts - 1) + (np.eye(experts) if self.spectral else 0.0)
        self.ahead_EE = self.same_EE.copy()
        self.box_EE, self.diagonal_E = np.zeros((experts, experts)), np.zeros(experts)
        self.rows_E, self.load_E = np.zeros(experts), np.zeros(experts)
        self.copies_E = np.full(experts, redundant / experts)
        self.copies_ahead_E = self.copies_E.copy()
        self.at_N3, self.tau_N = np.zeros((0, 3), np.int64), np.zeros(0)
        self.done = 0
        self.weight_EE = np.zeros((experts, experts))
        self.best = self._point()
        self.evaluated, self.last_price, self.last_proven = 0, -1.0, -np.inf

    def advance(self, price: float) -> None:
        """One iteration."""
        if self.trivial:
            self.done += 1
            return
        if self.columns and isinstance(self.block, MemberSlopes) and self.done == MEMBER_ITERATIONS:
            self.evaluate(price)
            members = self.block
            self.block = ColumnSlopes(members.expert_HK, members.weight_H, self.capacity, self.groups, self.least)
            self.block.slopes = members.per_pair()
            self.last_price = -1.0
        step_x, experts = self.step_x, self.experts
        weight_EE = self.block.step(self.ahead_EE)
        if not self.redundant:
            raise_multipliers(self.ahead_EE, self.at_N3, self.tau_N, TRIANGLE_STEP * self.dual_step)
            weight_EE -= charge(self.at_N3, self.tau_N, experts)
            if price > 0:
                par_E = self.share_E + (self.ahead_EE * self.off_EE) @ self.share_E
                self.load_E = _simplex(self.load_E + LOAD_STEP * self.dual_step * (par_E - 1.0), price)
                cross_EE = np.outer(self.load_E, self.share_E)
                weight_EE -= (cross_EE + cross_EE.T) * self.off_EE
            else:
                self.load_E = np.zeros(experts)
        self.weight_EE = weight_EE
        if self.spectral:
            self.box_EE = np.maximum(0.0, self.box_EE - BOX_STEP * self.dual_step * self.ahead_EE) * self.off_EE
            self.diagonal_E = self.diagonal_E + DIAGONAL_STEP * self.dual_step * (np.diag(self.ahead_EE) - 1.0)
            pull_EE = (weight_EE + self.box_EE) / 2 - np.diag(self.diagonal_E)
            moved_EE = project(self.same_EE + step_x * pull_EE, self.capacity, self.groups)
        elif self.redundant:
            moved_EE = self._step_copies(weight_EE)
        else:
            shift_E = self.rows_E * (-step_x / 2)
            moved_EE = project_rows(self.same_EE + step_x / 2 * weight_EE, shift_E, float(self.capacity - 1))
            self.rows_E = shift_E * (-2 / step_x)
        self.ahead_EE = 2 * moved_EE - self.same_EE
        self.same_EE = moved_EE
        self.done += 1
        if self.done % SEPARATE_EVERY == 0 and not self.redundant:
            self.at_N3, self.tau_N = with_violated(moved_EE, self.at_N3, self.tau_N, TRIANGLES_PER_EXPERT)

    def _step_copies(self, weight_EE: FloatArray) -> FloatArray:
        room, step = self.capacity - 1, ROW_STEP * self.dual_step / self.experts
        over_E = self.ahead_EE.sum(axis=1) - room * (1 + self.copies_ahead_E)
        self.rows_E = np.maximum(0.0, self.rows_E + step * over_E)
        moved_E = box_and_sum(
            self.copies_E + COPY_STEP / (step * room**2) * room * self.rows_E,
            float(min(self.redundant, self.groups - 1)),
            float(self.redundant),
        )
        self.copies_ahead_E, self.copies_E = 2 * moved_E - self.copies_E, moved_E
        pull_EE = (weight_EE - self.rows_E[:, None] - self.rows_E[None, :]) / 2
        return np.clip(self.same_EE + self.step_x * pull_EE, 0.0, 1.0) * self.off_EE

    def evaluate(self, price: float) -> None:
        """Keep the present dual point if it proves more than the best at this price."""
        if self.evaluated == self.done:
            return
        self.evaluated = self.done
        point = self._point()
        proven = point.proves(price)
        # steps too long for this layer go round in circles and prove less each time
        if price == self.last_price and proven < self.last_proven:
            self.step_x *= CALM
        self.last_price, self.last_proven = price, proven
        if proven > self.best.proves(price):
            self.best = point

    def par(self) -> float:
        """PAR of the relaxed placement, at least 1."""
        return max(1.0, float((self.share_E + (self.same_EE * self.off_EE) @ self.share_E).max()))

    def _point(self) -> Multipliers:
        weight_EE, rows_E = self.weight_EE, self.rows_E
        base = self.block.value() + float(self.load_E @ self.share_E) - float(self.tau_N.sum())
        spectrum_EE = None
        if self.spectral:
            spectrum_EE = (weight_EE + self.box_EE) * self.off_EE - 2 * np.diag(self.diagonal_E)
            largest = float(spectrum_EE.sum()) / self.groups + self.capacity * top_sum(spectrum_EE, self.groups - 1)
            base -= (largest - float(np.trace(spectrum_EE))) / 2
        else:
            if self.redundant:
                base -= copies_worth(rows_E, self.capacity - 1, self.redundant, self.groups)
            else:
                rows_E = better_rows(weight_EE, rows_E, self.capacity - 1, 2)
                base -= (self.capacity - 1) * float(rows_E.sum())
            rest_EE = np.maximum(0.0, weight_EE - rows_E[:, None] - rows_E[None, :]) * self.off_EE
            base -= float(rest_EE.sum()) / 2
        return Multipliers(
            base=base,
            paired=self.columns or not isinstance(self.block, MemberSlopes),
            slopes=self.block.per_pair()
            if self.columns and isinstance(self.block, MemberSlopes)
            else self.block.slopes.copy(),
            rows_E=rows_E,
            spectrum_EE=spectrum_EE,
            at_N3=self.at_N3.copy(),
            tau_N=self.tau_N.copy(),
            load_E=self.load_E.copy(),
        )


def _simplex(load_E: FloatArray, most: float) -> FloatArray:
    """Nearest point with entries >= 0 that add up to at most `most`."""
    load_E = np.maximum(0.0, load_E)
    if load_E.sum() <= most:
        return load_E
    falling_E = np.sort(load_E)[::-1]
    level_E = (np.cumsum(falling_E) - most) / np.arange(1, len(load_E) + 1)
    return np.maximum(0.0, load_E - level_E[np.flatnonzero(falling_E > level_E)[-1]])
