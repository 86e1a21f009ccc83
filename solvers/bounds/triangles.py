"""Triangle inequalities: if e shares a group with f and with g, then f and g share one: s_ef + s_eg - s_fg <= 1.

There are E^3 / 2 of them; only violated ones get a multiplier. Legend: E experts, N triangles, rows (e, f, g).
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["charge", "raise_multipliers", "with_violated"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

LEAST_VIOLATION = 1e-3


@njit(cache=True)
def raise_multipliers(
    same_EE: FloatArray, at_N3: IntArray, tau_N: FloatArray, step: float
) -> None:  # pragma: no cover - compiled
    """Dual step in place: tau grows by `step` times the violation, never below 0."""
    for n in range(len(tau_N)):
        e, f, g = at_N3[n, 0], at_N3[n, 1], at_N3[n, 2]
        tau_N[n] = max(0.0, tau_N[n] + step * (same_EE[e, f] + same_EE[e, g] - same_EE[f, g] - 1.0))


@njit(cache=True)
def charge(at_N3: IntArray, tau_N: FloatArray, experts: int) -> FloatArray:  # pragma: no cover - compiled
    """What the multipliers take from each pair, (E, E), symmetric."""
    charge_EE = np.zeros((experts, experts))
    for n in range(len(tau_N)):
        e, f, g, tau = at_N3[n, 0], at_N3[n, 1], at_N3[n, 2], tau_N[n]
        if tau > 0:
            charge_EE[e, f] += tau
            charge_EE[e, g] += tau
            charge_EE[f, g] -= tau
    return charge_EE + charge_EE.T


def with_violated(
    same_EE: FloatArray, at_N3: IntArray, tau_N: FloatArray, most_per_expert: int
) -> tuple[IntArray, FloatArray]:
    """The triangles that have a multiplier, and the most violated others, up to `most_per_expert` for each e."""
    experts = len(same_EE)
    kept_N3, kept_N = at_N3[tau_N > 0], tau_N[tau_N > 0]
    found_N3 = _violated(same_EE, LEAST_VIOLATION, most_per_expert)
    sides = np.array([experts * experts, experts, 1])
    new_N3 = found_N3[~np.isin(found_N3 @ sides, kept_N3 @ sides)]
    return np.concatenate([kept_N3, new_N3]), np.concatenate([kept_N, np.zeros(len(new_N3))])


@njit(cache=True)
def _violated(same_EE: FloatArray, least: float, most: int) -> IntArray:  # pragma: no cover - compiled
    experts = len(same_EE)
    found_N3 = np.empty((experts * most, 3), np.int64)
    count = 0
    at_M2 = np.empty((experts * experts, 2), np.int64)
    by_M = np.empty(experts * experts)
    for e in range(experts):
        seen = 0
        for f in range(experts):
            # s_ef + s_eg > 1 + s_fg needs one of the two above a half
            if f == e or same_EE[e, f] <= 0.5:
                continue
            for g in range(experts):
                if g in (e, f) or (g < f and same_EE[e, g] > 0.5):
                    continue
                over = same_EE[e, f] + same_EE[e, g] - same_EE[f, g] - 1.0
                if over > least:
                    at_M2[seen, 0], at_M2[seen, 1], by_M[seen] = min(f, g), max(f, g), over
                    seen += 1
        order = np.argsort(-by_M[:seen])[:most]
        for place in order:
            found_N3[count] = e, at_M2[place, 0], at_M2[place, 1]
            count += 1
    return found_N3[:count]
