"""Projection on the simplex, compiled: what one set's shares of its partitions go through in every step.

Legend: V entries.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["simplex_level"]

FloatArray = npt.NDArray[np.float64]


@njit(cache=True, fastmath=True)
def simplex_level(live_V: FloatArray, count: int) -> float:  # pragma: no cover - compiled
    """The level above which the first `count` entries add up to 1; overwrites them.

    What is below the level is dropped until nothing is. Complexity: O(V) a pass, few passes.
    Reference: Michelot, A finite algorithm for finding the projection of a point onto the canonical simplex (1986).
    """
    total = 0.0
    for v in range(count):
        total += live_V[v]
    live = count
    level = (total - 1.0) / live
    while True:
        kept, total = 0, 0.0
        for v in range(live):
            if live_V[v] > level:
                live_V[kept] = live_V[v]
                total += live_V[v]
                kept += 1
        if kept == live or kept == 0:
            return level
        live = kept
        level = (total - 1.0) / live
