"""Row relaxation of equipartitions: every expert shares its group with at most `room` others, each at most once.

For many experts, where eigenvalues cost too much, and for replicas, where there is no equipartition. Its dual is that
of a fractional b-matching: room * sum u + sum of max(0, weight - u_e - u_f).

Legend: E experts.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["better_rows", "copies_worth", "project_rows"]

FloatArray = npt.NDArray[np.float64]

ROUNDS = 8


@njit(cache=True)
def project_rows(matrix_EE: FloatArray, shift_E: FloatArray, room: float) -> FloatArray:  # pragma: no cover - compiled
    """Near the nearest matrix in [0, 1] with rows of `room` and no diagonal; `shift_E` is warm, and moved in place."""
    experts = len(shift_E)
    near_EE = np.zeros((experts, experts))
    for _ in range(ROUNDS):
        for e in range(experts):
            row, inside = 0.0, 0
            for f in range(experts):
                if f != e:
                    at = matrix_EE[e, f] + shift_E[e] + shift_E[f]
                    row += min(max(at, 0.0), 1.0)
                    inside += 0.0 < at < 1.0
            shift_E[e] += (room - row) / max(inside, 2)
    for e in range(experts):
        for f in range(experts):
            if f != e:
                near_EE[e, f] = min(max(matrix_EE[e, f] + shift_E[e] + shift_E[f], 0.0), 1.0)
    return near_EE


@njit(cache=True)
def better_rows(
    weight_EE: FloatArray, rows_E: FloatArray, room: int, sweeps: int
) -> FloatArray:  # pragma: no cover - compiled
    """Multipliers of a lower room * sum u + sum over pairs of max(0, weight - u_e - u_f): one after another exactly."""
    experts = len(rows_E)
    u_E = rows_E.copy()
    if experts < 2:
        return u_E
    over_F = np.empty(experts - 1)
    for _ in range(sweeps):
        for e in range(experts):
            count = 0
            for f in range(experts):
                if f != e:
                    over_F[count] = weight_EE[e, f] - u_E[f]
                    count += 1
            over_F.sort()
            # between the room-th and the next largest; there it has exactly `room` others above it
            high = over_F[count - max(1, min(room, count))]
            low = over_F[count - 1 - room] if 0 < room < count else high
            u_E[e] = (low + high) / 2
    return u_E


def copies_worth(rows_E: FloatArray, room: int, redundant: int, groups: int) -> float:
    """Most that the rows' multipliers can weigh: an expert has `room` others a copy, `redundant` more copies in all.

    At most `groups` copies and E - 1 others each.
    """
    others = len(rows_E) - 1
    first = min(room, others)
    extra_P = [min(room, max(0, others - copy * room)) for copy in range(1, groups)]
    worth = np.sort(np.outer(extra_P, rows_E).ravel())[::-1] if extra_P else np.zeros(0)
    return float(first * rows_E.sum() + worth[:redundant].sum())
