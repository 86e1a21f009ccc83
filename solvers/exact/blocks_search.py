"""Searches all layers of a set partitioning problem: bounds at thresholds of the load, then partitions that meet them.

A cap on the mean PAR joins the layers. It is priced: bound(t) of every layer under several thresholds t gives a step
function of its PAR, the price that makes the sum of the cheapest steps largest is found, and the steps that it picks
are refined. Placements come from annealing at that price and from integer programs over the blocks that still matter.

Legend: L layers, M thresholds, E experts, R ranks, C slots per rank, Z blocks, H expert sets.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from placer.core.evaluate import par
from solvers.exact.blocks_model import Relaxation, best_partition, every_block, relax, visits
from solvers.touch.anneal import anneal_layer, incidence, pair_weights, touched
from solvers.touch.frontier import Candidate, cheapest_under_caps

__all__ = ["BlocksAnswer", "BlocksLayer", "search_blocks"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

FIRST_STEPS = (1.01, 1.03, 1.06, 1.1, 1.15, 1.22, 1.3, 1.45, 1.7, 2.0, 2.5)
REFINEMENTS = 6
PRICE_FACTORS = (1.0, 0.6, 1.6)
MOST_COLUMNS = 1500
MOST_PRICE = 64.0


@dataclass(frozen=True, slots=True)
class BlocksLayer:
    """What is known of one layer: its expert sets and loads."""

    expert_HK: npt.NDArray[np.int16]
    weight_H: IntArray
    load_E: IntArray


@dataclass(frozen=True, slots=True)
class BlocksAnswer:
    """Placement, certificate data and what was proven; all means over layers."""

    rank_LE: IntArray
    objective: float
    price: float
    price_LME: FloatArray
    threshold_LM: FloatArray
    proven_layers: int
    stopped_by_time: bool


@dataclass(slots=True)
class _Layer:
    """One layer while it is being searched. `steps` maps a threshold (inf: none) to its relaxation."""

    given: BlocksLayer
    ranks: int
    block_ZC: IntArray
    visit_Z: FloatArray
    load_Z: FloatArray
    steps: dict[float, Relaxation] = field(default_factory=dict)
    pool: list[Candidate] = field(default_factory=list)

    @classmethod
    def of(cls, given: BlocksLayer, ranks: int, block_ZC: IntArray) -> "_Layer":
        share_E = given.load_E * ranks / max(1, int(given.load_E.sum()))
        visit_Z = visits(block_ZC, given.expert_HK, given.weight_H)
        return cls(given, ranks, block_ZC, visit_Z, share_E[block_ZC].sum(axis=1))

    def add_step(self, threshold: float) -> None:
        if threshold not in self.steps:
            cost_Z = np.where(self.load_Z <= threshold, self.visit_Z, np.inf)
            self.steps[threshold] = relax(cost_Z, self.block_ZC, len(self.given.load_E))

    def cheapest_step(self, price: float) -> tuple[float, float, float]:
        """min over thresholds of bound + price * (the threshold before): value, that threshold, the one before."""
        before, best = 1.0, (np.inf, np.inf, 1.0)
        for threshold in sorted(self.steps):
            value = self.steps[threshold].bound + price * before
            if value < best[0]:
                best = (value, threshold, before)
            before = max(1.0, threshold)
        return best

    def add_placement(self, rank_E: IntArray) -> None:
        load_R = np.bincount(rank_E, weights=self.given.load_E, minlength=self.ranks)
        cost = touched(self.given.expert_HK, self.given.weight_H, rank_E, self.ranks)
        seen = float(par(load_R))
        self.pool.append(Candidate(cost / max(1, int(self.given.weight_H.sum())), seen, seen, rank_E))

    def anneal(self, price: float, seed: tuple[int, ...]) -> None:
        experts, tokens = len(self.given.load_E), max(1, int(self.given.weight_H.sum()))
        first_E, set_I = incidence(self.given.expert_HK, experts)
        unit = tokens * self.given.expert_HK.shape[1] / experts
        begin = min(self.pool, key=lambda c: c.touched + price * c.par)
        found_E, _ = anneal_layer(
            begin.placement,
            np.zeros(self.ranks, dtype=np.int64),
            np.ones(self.ranks),
            experts,
            self.given.load_E.astype(np.float64)[:, None],
            np.array([price * tokens]),
            self.given.expert_HK,
            self.given.weight_H,
            first_E,
            set_I,
            pair_weights(self.given.expert_HK, self.given.weight_H, experts),
            0.0,
            0.0,
            int(np.clip(4e8 * experts / max(1, 2 * len(set_I)), 2_000, 6_000 * experts)),
            0.24 * unit,
            0.008 * unit,
            np.random.default_rng(seed),
        )
        self.add_placement(found_E)

    def integer(self, threshold: float, time_limit_s: float, seed: int) -> bool:
        """Adds the cheapest partition under `threshold` to the pool; whether it is proven to be that."""
        relaxed = self.steps[threshold]
        under = [c.touched for c in self.pool if c.par <= threshold + 1e-12]
        room = min(under) - relaxed.bound if under else 0.02 * relaxed.bound
        column_N = np.flatnonzero(relaxed.reduced_Z <= room + 1e-9)
        proven = bool(under) and len(column_N) <= MOST_COLUMNS
        if len(column_N) > MOST_COLUMNS:
            column_N = column_N[np.argsort(relaxed.reduced_Z[column_N], kind="stable")[:MOST_COLUMNS]]
        block_RC, ended = best_partition(
            self.visit_Z, self.block_ZC, len(self.given.load_E), column_N, time_limit_s, seed
        )
        if block_RC is not None:
            rank_E = np.empty(len(self.given.load_E), dtype=np.int64)
            rank_E[block_RC] = np.arange(len(block_RC))[:, None]
            self.add_placement(rank_E)
        return proven and ended


def search_blocks(
    layers: list[BlocksLayer], ranks: int, max_par: float | None, start_LE: IntArray, time_limit_s: float, seed: int
) -> BlocksAnswer:
    """The best placement found from `start_LE`, and the steps and price that prove how good it is."""
    started = time.perf_counter()

    def left_s() -> float:
        return time_limit_s - (time.perf_counter() - started)

    block_ZC = every_block(len(layers[0].load_E), len(layers[0].load_E) // ranks)
    state = [_Layer.of(given, ranks, block_ZC) for given in layers]
    for layer, start_E in zip(state, start_LE, strict=True):
        layer.add_placement(start_E)
        layer.add_step(np.inf)
    price = 0.0
    if max_par is not None:
        for threshold in FIRST_STEPS:
            for layer in state:
                if left_s() > 0.3 * time_limit_s:
                    layer.add_step(threshold)
        price = _refine(state, max_par, lambda: left_s() > 0.4 * time_limit_s)
    for turn, factor in enumerate(PRICE_FACTORS if max_par is not None else PRICE_FACTORS[:1]):
        for number, layer in enumerate(state):
            if left_s() > 0.2 * time_limit_s:
                layer.anneal(price * factor, (seed, turn, number))
    proven, late = 0, False
    for number, layer in enumerate(state):
        share_s = left_s() / (len(state) - number)
        late |= share_s < 0.02
        if share_s >= 0.02:
            _, threshold, _ = layer.cheapest_step(price)
            proven += layer.integer(threshold, share_s, seed)
    cap = np.inf if max_par is None else max_par
    chosen = cheapest_under_caps([layer.pool for layer in state], cap, cap)
    price_LME, threshold_LM = _steps(state)
    return BlocksAnswer(
        rank_LE=np.stack([candidate.placement for candidate in chosen]),
        objective=float(np.mean([candidate.touched for candidate in chosen])),
        price=price,
        price_LME=price_LME,
        threshold_LM=threshold_LM,
        proven_layers=proven if max_par is None else 0,
        stopped_by_time=late,
    )


def _refine(state: list[_Layer], max_par: float, more: Callable[[], bool]) -> float:
    """The price with the largest bound, after halving the steps it picks as often as time allows."""
    price = _best_price(state, max_par)
    for _ in range(REFINEMENTS):
        for layer in state:
            if not more():
                return _best_price(state, max_par)
            _, threshold, before = layer.cheapest_step(price)
            wide = max(before, min(threshold, 1.6 * before, float(layer.load_Z.max())))
            if wide - before > 1e-3:
                layer.add_step(round((before + wide) / 2, 5))
        price = _best_price(state, max_par)
    return price


def _best_price(state: list[_Layer], max_par: float) -> float:
    """argmax over prices of mean cheapest step - price * cap, which is concave, by golden section."""

    def bound(price: float) -> float:
        return float(np.mean([layer.cheapest_step(price)[0] for layer in state])) - price * max_par

    low, high, ratio = 0.0, MOST_PRICE, (5**0.5 - 1) / 2
    for _ in range(40):
        inner, outer = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, outer) if bound(inner) >= bound(outer) else (inner, high)
    return max((0.0, (low + high) / 2), key=bound)


def _steps(state: list[_Layer]) -> tuple[FloatArray, FloatArray]:
    """Prices (L, M, E) and thresholds (L, M - 1), ascending; shorter layers repeat their last finite threshold."""
    most = max(len(layer.steps) for layer in state)
    experts = len(state[0].given.load_E)
    price_LME, threshold_LM = np.zeros((len(state), most, experts)), np.ones((len(state), most - 1))
    for row, layer in enumerate(state):
        finite = sorted(layer.steps)[:-1]
        finite = finite[:1] * (most - 1 - len(finite)) + finite if finite else [1.0] * (most - 1)
        threshold_LM[row] = finite
        for step, threshold in enumerate(finite):
            price_LME[row, step] = layer.steps.get(threshold, layer.steps[np.inf]).price_E
        price_LME[row, -1] = layer.steps[np.inf].price_E
    return price_LME, threshold_LM
