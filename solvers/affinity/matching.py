"""The perfect matching of rows and columns with the largest sum of weights (linear assignment, in integers)."""

import numpy as np
import numpy.typing as npt

__all__ = ["heaviest_matching"]

STEPS = 1e9


def heaviest_matching(weight_II: npt.NDArray[np.number]) -> npt.NDArray[np.int64]:
    """Column of each row, (I,), for a square matrix of finite weights.

    Guarantee: within I / 1e9 of the range of the weights of the optimum, since costs are rounded to whole numbers.
    Deterministic. Complexity: O(I^3 log I) (cost scaling).
    """
    # here, so that a solver's module that may not need it loads without the back end
    from ortools.graph.python import linear_sum_assignment

    weight = np.asarray(weight_II, dtype=np.float64)
    spread = float(weight.max() - weight.min())
    cost = np.rint((weight.max() - weight) * (STEPS / (spread or 1.0))).astype(np.int64)
    solver = linear_sum_assignment.SimpleLinearSumAssignment()
    row, column = np.indices(cost.shape)
    solver.add_arcs_with_cost(row.ravel(), column.ravel(), cost.ravel())
    assert solver.solve() == solver.OPTIMAL
    return np.array([solver.right_mate(index) for index in range(len(cost))], dtype=np.int64)
