"""From multipliers to a bound: the value of the dual over all arcs, and the best row and column prices for the rest.

Legend: Q pairs of layers, E experts, N cuts.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["charged", "polish", "value"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@njit(cache=True)
def charged(
    flow_EE: FloatArray,
    after_E: FloatArray,
    before_E: FloatArray,
    mu_E: FloatArray,
    nu_E: FloatArray,
    cut_N4: IntArray,
    tau_N: FloatArray,
) -> FloatArray:  # pragma: no cover - compiled
    """What is left of one pair's flow after load and cut multipliers took their part, (E, E)."""
    left_EE = flow_EE.copy()
    experts = len(left_EE)
    for one in range(experts):
        for two in range(experts):
            left_EE[one, two] -= mu_E[one] * after_E[two] + nu_E[two] * before_E[one]
    for n in range(len(tau_N)):
        i, other, j, k = cut_N4[n]
        left_EE[i, j] -= tau_N[n]
        left_EE[i, k] -= tau_N[n]
        left_EE[other, j] -= tau_N[n]
        left_EE[other, k] += tau_N[n]
    return left_EE


def polish(left_EE: FloatArray, u_E: FloatArray, v_E: FloatArray, width: int, rounds: int) -> None:
    """Sets rows' and columns' prices in turn to the best for the others; never worse. In place, O(E^2) a round.

    The best price of a row lies between its `width`-th and next largest rest; of all those the nearest to the old one.
    """
    experts = len(left_EE)
    for _ in range(rounds):
        for rest_EE, price_E in ((left_EE - v_E, u_E), (left_EE.T - u_E, v_E)):
            if width < experts:
                ordered = np.partition(rest_EE, (experts - width - 1, experts - width), axis=1)
                np.clip(price_E, ordered[:, experts - width - 1], ordered[:, experts - width], out=price_E)
            else:
                price_E[:] = rest_EE.min(axis=1)


def value(left_EE: FloatArray, u_E: FloatArray, v_E: FloatArray, width: int) -> float:
    """Upper bound on the kept part of `left_EE` with `width` partners for each expert."""
    rest_EE = left_EE - u_E[:, None] - v_E
    return width * float(u_E.sum() + v_E.sum()) + float(rest_EE[rest_EE > 0].sum())
