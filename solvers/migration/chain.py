"""Options of consecutive layers chosen together: in `coherent` mode what counts is which transitions change rank.

The cost of a choice is a sum over pairs of consecutive layers, so a chain: dynamic programming over the option of the
last layer, the moves and the layers touched. Caps on PAR enter through prices as in `knapsack.py`.

Legend: L layers, O options, E experts, R ranks, C slots per rank, B moves in units, J layers touched.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

from solvers.migration.knapsack import PRICES, Option

__all__ = ["choose_chain", "cut_share", "flow_benefit"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

MOST_UNITS = 256


def cut_share(held_LRC: list[IntArray], flow_LEE: FloatArray) -> float:
    """Share of transitions that change rank; the replicas of an expert share its tokens equally."""
    experts = flow_LEE.shape[1]
    share = [_share(held_RC, experts) for held_RC in held_LRC]
    kept = sum(float(np.sum((a @ flow) * b)) for a, flow, b in zip(share[:-1], flow_LEE, share[1:], strict=True))
    return 1.0 - kept / float(flow_LEE.sum())


def flow_benefit(flow_LEE: FloatArray, plans: tuple[IntArray, IntArray], layer: int, ranks: int) -> FloatArray:
    """Transitions of each expert that stay on each rank, (E, R), the neighbouring layers half as in either plan."""
    experts = flow_LEE.shape[1]
    benefit_ER = np.zeros((experts, ranks))
    for plan_LP in plans:
        if layer > 0:
            before_RE = _share(plan_LP[layer - 1].reshape(ranks, -1), experts)
            benefit_ER += 0.5 * (before_RE @ flow_LEE[layer - 1]).T
        if layer < len(flow_LEE):
            after_RE = _share(plan_LP[layer + 1].reshape(ranks, -1), experts)
            benefit_ER += 0.5 * flow_LEE[layer] @ after_RE.T
    return benefit_ER


def choose_chain(
    pools: list[list[Option]],
    places: list[list[IntArray]],
    flow_LEE: FloatArray,
    *,
    max_moves: int | None,
    max_layers: int | None,
    cap: float,
    cap_seen: float,
) -> list[int]:
    """The option of each layer, as `choose_options`, with the share of transitions cut as the cost.

    `places[l][o]` (R, C) is the placement of option o of layer l. Guarantee: as `choose_options`, moves rounded up to
    1 / 256 of all. Complexity O(L O R E^2 + prices L O^2 B J).
    """
    layers, width, experts = len(pools), max(len(pool) for pool in pools), flow_LEE.shape[1]
    unit = max(1, -(-sum(max(option.moves for option in pool) for pool in pools) // MOST_UNITS))
    unit_LO = np.full((layers, width), -1, dtype=np.int64)
    par_LO2 = np.zeros((layers, width, 2))
    pair_LOO = np.zeros((layers, width, width))
    before: list[FloatArray] = []
    for layer, pool in enumerate(pools):
        share = [_share(held_RC, experts) for held_RC in places[layer]]
        for at, option in enumerate(pool):
            unit_LO[layer, at] = -(-option.moves // unit)
            par_LO2[layer, at] = option.par / layers, option.par_seen / layers
        for i, left in enumerate(before):
            sent = left @ flow_LEE[layer - 1]
            for j, right in enumerate(share):
                pair_LOO[layer, i, j] = -float(np.sum(sent * right)) / float(flow_LEE.sum())
        before = share
    units = int(unit_LO.max(axis=1).sum())
    if max_moves is not None:
        units = min(units, max_moves // unit)
    allowed = -1 if max_layers is None or max_layers >= layers else max_layers
    best: tuple[float, float, int] | None = None
    chosen: list[int] = []
    for price in PRICES if np.isfinite(cap) or np.isfinite(cap_seen) else PRICES[:1]:
        parts_OJB3, choice = _fill(unit_LO, pair_LOO, par_LO2, price, units, allowed)
        over = np.maximum(0.0, parts_OJB3[..., 1] - cap) + np.maximum(0.0, parts_OJB3[..., 2] - cap_seen)
        over[over < 1e-9] = 0.0
        over[np.isinf(parts_OJB3[..., 0])] = np.inf
        least = over.min()
        cost = np.where(over <= least, parts_OJB3[..., 0], np.inf)
        last, row, at = (int(index) for index in np.unravel_index(int(np.argmin(cost)), cost.shape))
        found = (float(least), float(cost[last, row, at]), at)
        if best is None or found < best:
            best, chosen = found, [last]
            for layer in range(layers - 1, 0, -1):
                taken = int(unit_LO[layer, chosen[-1]])
                previous = int(choice[layer, chosen[-1], row, at])
                row, at = row - (1 if allowed >= 0 and taken > 0 else 0), at - taken
                chosen.append(previous)
            chosen.reverse()
    return chosen


@njit(cache=True)
def _fill(
    unit_LO: IntArray, pair_LOO: FloatArray, par_LO2: FloatArray, price: float, units: int, layers_allowed: int
) -> tuple[FloatArray, npt.NDArray[np.int16]]:  # pragma: no cover - compiled
    """Parts (cost, PAR, PAR seen) of the best chain to each option within every budget, and the option before it.

    Infinite cost where there is none. `layers_allowed` < 0: not limited.
    """
    layers, options = unit_LO.shape
    rows = max(0, layers_allowed) + 1
    value = np.full((options, rows, units + 1), np.inf)
    parts = np.zeros((options, rows, units + 1, 3))
    parts[..., 0] = np.inf
    choice = np.zeros((layers, options, rows, units + 1), dtype=np.int16)
    for layer in range(layers):
        new_value = np.full(value.shape, np.inf)
        new_parts = np.zeros(parts.shape)
        new_parts[..., 0] = np.inf
        for option in range(options):
            unit = unit_LO[layer, option]
            if unit < 0:
                continue
            step = 1 if layers_allowed >= 0 and unit > 0 else 0
            own = price * par_LO2[layer, option, 0]
            for row in range(step, rows):
                for at in range(unit, units + 1):
                    if layer == 0:
                        new_value[option, row, at] = own
                        new_parts[option, row, at] = np.array([0.0, par_LO2[0, option, 0], par_LO2[0, option, 1]])
                        continue
                    best, best_from = np.inf, -1
                    for previous in range(options):
                        there = value[previous, row - step, at - unit] + pair_LOO[layer, previous, option]
                        if there < best:
                            best, best_from = there, previous
                    if best_from < 0:
                        continue
                    new_value[option, row, at] = best + own
                    choice[layer, option, row, at] = best_from
                    new_parts[option, row, at, 0] = (
                        parts[best_from, row - step, at - unit, 0] + pair_LOO[layer, best_from, option]
                    )
                    for part in range(2):
                        new_parts[option, row, at, part + 1] = (
                            parts[best_from, row - step, at - unit, part + 1] + par_LO2[layer, option, part]
                        )
        value, parts = new_value, new_parts
    return parts, choice


def _share(held_RC: IntArray, experts: int) -> FloatArray:
    """Share of each expert's tokens served by each rank, (R, E); empty slots serve nothing."""
    held = np.zeros((len(held_RC), experts))
    rank, column = np.nonzero((held_RC >= 0) & (held_RC < experts))
    held[rank, held_RC[rank, column]] = 1.0
    share: FloatArray = held / np.maximum(1.0, held.sum(axis=0))
    return share
