"""Choosing one candidate per layer so that the sum of costs is least while mean PAR, pooled and in windows, meets caps.

A multiple-choice knapsack with a few candidates per layer and two limits: Lagrange multipliers by bisection, one inside
the other, then greedy use of what is left of the caps.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Candidate", "cheapest_under_cap", "cheapest_under_caps", "implied_prices"]

HIGHEST_PRICE = 1e3


@dataclass(frozen=True, slots=True)
class Candidate:
    """One placement of one layer: cost per token, PAR expected on unseen requests, PAR on those seen, the placement.

    `window` is the mean over windows of max / mean rank load; 1.0 where nobody asked.
    """

    touched: float
    par: float
    par_seen: float
    placement: npt.NDArray[Any]
    window: float = 1.0


Pools = list[list[Candidate]]


def _at_prices(pools: Pools, price: float, window_price: float) -> list[Candidate]:
    return [min(pool, key=lambda c: (c.touched + price * c.par + window_price * c.window, c.par)) for pool in pools]


def _mean_par(chosen: list[Candidate]) -> float:
    return float(np.mean([candidate.par for candidate in chosen]))


def _mean_window(chosen: list[Candidate]) -> float:
    return float(np.mean([candidate.window for candidate in chosen]))


def implied_prices(pools: Pools, cap: float, cap_window: float = np.inf) -> tuple[float, float]:
    """Prices of PAR and of window PAR, in cost per unit, at which the cheapest choice just meets both caps.

    0 for a cap that is met for free; HIGHEST_PRICE where a cap cannot be met at all.
    """
    window_price = 0.0
    if np.isfinite(cap_window) and _mean_window(_at_prices(pools, _par_price(pools, cap, 0.0), 0.0)) > cap_window:
        low, high = 0.0, HIGHEST_PRICE
        for _ in range(40):
            middle = (low * high) ** 0.5 if low > 0 else high / 64
            if _mean_window(_at_prices(pools, _par_price(pools, cap, middle), middle)) <= cap_window:
                high = middle
            else:
                low = middle
            if (low > 0 and high / low < 1.02) or high < 1e-6:
                break
        window_price = high
    return _par_price(pools, cap, window_price), window_price


def _par_price(pools: Pools, cap: float, window_price: float) -> float:
    """The least price of PAR that meets `cap` at this price of window PAR."""
    low, high = 0.0, HIGHEST_PRICE
    if not np.isfinite(cap) or _mean_par(_at_prices(pools, low, window_price)) <= cap:
        return low
    for _ in range(60):
        middle = (low * high) ** 0.5 if low > 0 else high / 64
        if _mean_par(_at_prices(pools, middle, window_price)) <= cap:
            high = middle
        else:
            low = middle
        if low > 0 and high / low < 1.01:
            break
    return high


def cheapest_under_caps(pools: Pools, cap: float, cap_seen: float, cap_window: float = np.inf) -> list[Candidate]:
    """As `cheapest_under_cap`, with `cap` tightened until the PAR on the requests seen is at most `cap_seen` too."""
    chosen = cheapest_under_cap(pools, cap, cap_window)
    floor = _mean_par([min(pool, key=lambda c: c.par) for pool in pools])
    for step in range(1, 21):
        if float(np.mean([candidate.par_seen for candidate in chosen])) <= cap_seen + 1e-9:
            return chosen
        chosen = cheapest_under_cap(pools, cap + (floor - cap) * step / 20, cap_window)
    return [min(pool, key=lambda c: (c.par_seen, c.touched)) for pool in pools]


def cheapest_under_cap(pools: Pools, cap: float, cap_window: float = np.inf) -> list[Candidate]:
    """One candidate per layer with mean PAR <= cap, mean window PAR <= cap_window and a small sum of costs.

    The least PAR where none meets the cap; where only the windows' cap cannot be met, the least window PAR under it.
    """
    chosen = _at_prices(pools, *implied_prices(pools, cap, cap_window))
    if _mean_par(chosen) > cap:
        return [min(pool, key=lambda c: (c.par, c.touched)) for pool in pools]
    slack = np.array([cap - _mean_par(chosen), cap_window - _mean_window(chosen)]) * len(pools)
    if slack[1] < 0:
        return chosen
    while True:
        best_gain, best = 0.0, None
        for layer, pool in enumerate(pools):
            for candidate in pool:
                saved = chosen[layer].touched - candidate.touched
                extra = (candidate.par - chosen[layer].par, candidate.window - chosen[layer].window)
                effort = max(*(e / max(s, 1e-9) for e, s in zip(extra, slack, strict=True)), 1e-9)
                if saved > 1e-12 and (extra <= slack).all() and saved / effort > best_gain:
                    best_gain, best = saved / effort, (layer, candidate, extra)
        if best is None:
            return chosen
        chosen[best[0]] = best[1]
        slack -= best[2]
