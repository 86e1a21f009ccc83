"""One option per layer, moves and layers touched within budgets, mean PAR within caps, the least sum of costs.

A multiple-choice knapsack by dynamic programming over the moves (and the layers touched, where those are limited). The
caps on PAR enter through prices that do not depend on the budget, and every budget up to the one given is looked at: so
more budget never gives a worse answer.

Legend: L layers, O options, B moves in units, J layers touched.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["Option", "choose_options"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

PRICES = (0.0, 0.1, 0.2, 0.4, 0.7, 1.0, 1.5, 2.2, 3.3, 5.0, 7.5, 11.0, 17.0, 25.0, 50.0, 100.0, 1e4)
"""Cost that one unit of PAR is worth; the last stands for "PAR alone"."""

MOST_UNITS = 4096


@dataclass(frozen=True, slots=True)
class Option:
    """One placement that a layer may get: copies moved to reach it, its cost, PAR on unseen requests and on those seen.

    The first option of a layer moves nothing.
    """

    moves: int
    cost: float
    par: float
    par_seen: float


@njit(cache=True)
def _fill(
    unit_LO: IntArray, value_LO: FloatArray, parts_LO3: FloatArray, units: int, layers_allowed: int
) -> tuple[FloatArray, FloatArray, npt.NDArray[np.int16]]:  # pragma: no cover - compiled
    """Best value and its parts (cost, PAR, PAR seen) within every budget, (J, B) and (J, B, 3), and choice_LJB.

    `layers_allowed` < 0: not limited, and J is 1. An option with unit < 0 is not there.
    """
    layers, options = unit_LO.shape
    rows = max(0, layers_allowed) + 1
    value_JB, parts_JB3 = np.zeros((rows, units + 1)), np.zeros((rows, units + 1, 3))
    choice_LJB = np.zeros((layers, rows, units + 1), dtype=np.int16)
    for layer in range(layers):
        new_JB, new_JB3 = np.full(value_JB.shape, np.inf), np.zeros(parts_JB3.shape)
        for option in range(options):
            unit = unit_LO[layer, option]
            if unit < 0:
                continue
            step = 1 if layers_allowed >= 0 and unit > 0 else 0
            for row in range(step, rows):
                for at in range(unit, units + 1):
                    value = value_JB[row - step, at - unit] + value_LO[layer, option]
                    if value < new_JB[row, at]:
                        new_JB[row, at] = value
                        choice_LJB[layer, row, at] = option
        for row in range(rows):
            for at in range(units + 1):
                option = choice_LJB[layer, row, at]
                unit = unit_LO[layer, option]
                step = 1 if layers_allowed >= 0 and unit > 0 else 0
                for part in range(3):
                    new_JB3[row, at, part] = parts_JB3[row - step, at - unit, part] + parts_LO3[layer, option, part]
        value_JB, parts_JB3 = new_JB, new_JB3
    return value_JB, parts_JB3, choice_LJB


def choose_options(
    pools: list[list[Option]],
    *,
    max_moves: int | None,
    max_layers: int | None,
    cap: float,
    cap_seen: float,
) -> list[int]:
    """The option of each layer: least excess of mean PAR over the caps (0 where they can be met), then least cost.

    Guarantee: within both budgets; never worse, in that order, for a larger budget; exact for the costs at each of a
    few prices of PAR, moves rounded up to 1 / 4096 of all that could be made. Complexity O(prices L O B J).
    """
    most_L = [max(option.moves for option in pool) for pool in pools]
    unit = max(1, -(-sum(most_L) // MOST_UNITS))
    width = max(len(pool) for pool in pools)
    unit_LO = np.full((len(pools), width), -1, dtype=np.int64)
    parts_LO3 = np.zeros((len(pools), width, 3))
    for layer, pool in enumerate(pools):
        for at, option in enumerate(pool):
            unit_LO[layer, at] = -(-option.moves // unit)
            parts_LO3[layer, at] = option.cost, option.par, option.par_seen
    units = int(unit_LO.max(axis=1).sum())
    if max_moves is not None:
        units = min(units, max_moves // unit)
    allowed = -1 if max_layers is None or max_layers >= len(pools) else max_layers
    best: tuple[float, float, int] | None = None
    chosen: list[int] = []
    for price in PRICES if np.isfinite(cap) or np.isfinite(cap_seen) else PRICES[:1]:
        value_LO = parts_LO3[:, :, 0] + price * parts_LO3[:, :, 1]
        kept_LO = _undominated(unit_LO, value_LO)
        _, parts_JB3, choice_LJB = _fill(kept_LO, value_LO, parts_LO3, units, allowed)
        mean_JB3 = parts_JB3 / len(pools)
        over_JB = np.maximum(0.0, mean_JB3[:, :, 1] - cap) + np.maximum(0.0, mean_JB3[:, :, 2] - cap_seen)
        over_JB[over_JB < 1e-9] = 0.0
        least = over_JB.min()
        cost_JB = np.where(over_JB <= least, mean_JB3[:, :, 0], np.inf)
        row, at = divmod(int(np.argmin(cost_JB)), cost_JB.shape[1])
        found = (float(least), float(cost_JB[row, at]), at)
        if best is None or found < best:
            best, chosen = found, _trace_back(kept_LO, choice_LJB, row, at, allowed)
    return chosen


def _undominated(unit_LO: IntArray, value_LO: FloatArray) -> IntArray:
    """unit_LO with -1 for options that cost as much as one with fewer moves."""
    kept_LO = unit_LO.copy()
    for layer, (unit_O, value_O) in enumerate(zip(unit_LO, value_LO, strict=True)):
        least = np.inf
        for option in np.lexsort((value_O, unit_O)):
            if unit_O[option] >= 0 and value_O[option] < least:
                least = value_O[option]
            else:
                kept_LO[layer, option] = -1
    return kept_LO


def _trace_back(unit_LO: IntArray, choice_LJB: npt.NDArray[np.int16], row: int, at: int, allowed: int) -> list[int]:
    chosen = []
    for layer in range(len(unit_LO) - 1, -1, -1):
        option = int(choice_LJB[layer, row, at])
        unit = int(unit_LO[layer, option])
        row -= 1 if allowed >= 0 and unit > 0 else 0
        at -= unit
        chosen.append(option)
    return chosen[::-1]
