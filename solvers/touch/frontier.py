"""Choosing one candidate per layer so that the sum of costs is least while the mean PAR meets a cap.

A multiple-choice knapsack with a few candidates per layer: a Lagrange multiplier by bisection, then greedy use of
what is left of the cap.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Candidate", "cheapest_under_cap", "cheapest_under_caps", "implied_price"]


@dataclass(frozen=True, slots=True)
class Candidate:
    """One placement of one layer: cost per token, PAR expected on unseen requests, PAR on those seen, the placement."""

    touched: float
    par: float
    par_seen: float
    placement: npt.NDArray[Any]


def _at_price(pools: list[list[Candidate]], price: float) -> list[Candidate]:
    return [min(pool, key=lambda c: (c.touched + price * c.par, c.par)) for pool in pools]


def _mean_par(chosen: list[Candidate]) -> float:
    return float(np.mean([candidate.par for candidate in chosen]))


def implied_price(pools: list[list[Candidate]], cap: float) -> float:
    """The price of PAR, in cost per unit, at which the cheapest choice just meets `cap`; 0 where it is met for free."""
    low, high = 0.0, 1e3
    if _mean_par(_at_price(pools, low)) <= cap:
        return low
    for _ in range(60):
        middle = (low * high) ** 0.5 if low > 0 else high / 64
        if _mean_par(_at_price(pools, middle)) <= cap:
            high = middle
        else:
            low = middle
        if low > 0 and high / low < 1.01:
            break
    return high


def cheapest_under_caps(pools: list[list[Candidate]], cap: float, cap_seen: float) -> list[Candidate]:
    """As `cheapest_under_cap`, with `cap` tightened until the PAR on the requests seen is at most `cap_seen` too."""
    chosen = cheapest_under_cap(pools, cap)
    floor = _mean_par([min(pool, key=lambda c: c.par) for pool in pools])
    for step in range(1, 21):
        if float(np.mean([candidate.par_seen for candidate in chosen])) <= cap_seen + 1e-9:
            return chosen
        chosen = cheapest_under_cap(pools, cap + (floor - cap) * step / 20)
    return [min(pool, key=lambda c: (c.par_seen, c.touched)) for pool in pools]


def cheapest_under_cap(pools: list[list[Candidate]], cap: float) -> list[Candidate]:
    """One candidate per layer with mean PAR <= cap and a small sum of costs; the least PAR where none meets the cap."""
    chosen = _at_price(pools, implied_price(pools, cap) if np.isfinite(cap) else 0.0)
    if _mean_par(chosen) > cap:
        return [min(pool, key=lambda c: (c.par, c.touched)) for pool in pools]
    slack = (cap - _mean_par(chosen)) * len(pools)
    while True:
        best_gain, best = 0.0, None
        for layer, pool in enumerate(pools):
            for candidate in pool:
                saved = chosen[layer].touched - candidate.touched
                extra = candidate.par - chosen[layer].par
                if saved > 1e-12 and extra <= slack and saved / max(extra, 1e-9) > best_gain:
                    best_gain, best = saved / max(extra, 1e-9), (layer, candidate, extra)
        if best is None:
            return chosen
        chosen[best[0]] = best[1]
        slack -= best[2]
