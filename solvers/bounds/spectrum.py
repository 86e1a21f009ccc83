"""The spectral set: what the matrix of an equipartition looks like when only its eigenvalues are remembered.

For G groups of C experts X_ef = 1 where e and f share a group. X has eigenvalue C on the all-ones vector and on G - 1
further dimensions, 0 on the rest; the convex hull of such matrices is X 1 = C 1, 0 <= X <= C I, trace X = E.

Reference: Donath and Hoffman (1973); Overton and Womersley (1992) for the hull. Legend: E experts.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["box_and_sum", "project", "top_sum"]

FloatArray = npt.NDArray[np.float64]


def project(matrix_EE: FloatArray, capacity: int, groups: int) -> FloatArray:
    """Nearest point of the spectral set to a symmetric matrix, (E, E). O(E^3)."""
    values_E, vectors_EE = _centred(matrix_EE)
    kept_E = box_and_sum(values_E, float(capacity), float(capacity * (groups - 1)))
    live = kept_E > 0
    part_EV = vectors_EE[:, 1:][:, live]
    nearest: FloatArray = (part_EV * kept_E[live]) @ part_EV.T + capacity / len(matrix_EE)
    return nearest


def top_sum(matrix_EE: FloatArray, count: int) -> float:
    """Sum of the `count` largest eigenvalues orthogonal to the all-ones vector."""
    return float(_centred(matrix_EE)[0][::-1][:count].sum())


def _centred(matrix_EE: FloatArray) -> tuple[FloatArray, FloatArray]:
    """Eigenvalues rising and all eigenvectors of the matrix on the space orthogonal to all-ones, which comes first."""
    mean_E = matrix_EE.mean(axis=0)
    centred_EE = matrix_EE - mean_E[None, :] - mean_E[:, None] + mean_E.mean()
    low = np.abs(centred_EE).sum(axis=1).max() + 1.0
    values_E, vectors_EE = np.linalg.eigh(centred_EE - low / len(matrix_EE))
    return values_E[1:], vectors_EE


@njit(cache=True)
def box_and_sum(values_E: FloatArray, most: float, total: float) -> FloatArray:  # pragma: no cover - compiled
    """Nearest vector with entries in [0, most] that add up to `total`: one shift for all, found by halving."""
    low, high = values_E.min() - most - 1.0, values_E.max() + 1.0
    for _ in range(60):
        shift = (low + high) / 2
        filled = 0.0
        for value in values_E:
            filled += min(max(value - shift, 0.0), most)
        if filled > total:
            low = shift
        else:
            high = shift
    return np.minimum(np.maximum(values_E - (low + high) / 2, 0.0), most)
