"""QuantMoE-Bench's offline bit allocation as a knapsack: which width each expert gets under a byte budget.

Its heuristics (arXiv 2406.08155): experts used more, the first blocks, shared experts and weights with outliers
get more bits. They enter here as one importance per expert; the widths that lose least are then chosen exactly or
greedily. The paper chooses by thresholds and solves no program, and D2MoE chooses widths by trained routers: the
program is ours. It promises nothing about accuracy unless `loss_LEK` was measured.

Legend: L layers, E experts, K widths, M modules, O rows (outputs), I columns (inputs).
"""

from typing import Literal

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from solvers.bits.knapsack import Knapsack, KnapsackResult, solve_greedy
from solvers.bits.knapsack_cpsat import solve_cpsat_knapsack

__all__ = ["allocate_bits", "average_bits", "importance_LE", "outlier_score"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


def allocate_bits(
    weight_LE: FloatArray,
    loss_LEK: FloatArray,
    bytes_K: tuple[int, ...],
    most_bytes: int,
    *,
    solver: Literal["greedy", "cpsat"] = "greedy",
    time_limit_s: float = 10.0,
    seed: int = 0,
) -> KnapsackResult:
    """The width (an index over K) of every expert, (L E,) row by row, that loses least: sum of weight times loss.

    Parameters
    ----------
    weight_LE
        importance, 0 or more (`importance_LE`)
    loss_LEK
        what an expert loses at each width (say, its output's relative error); any shape that broadcasts to (L, E, K)
    bytes_K
        bytes of an expert at each width, all experts alike

    Raises UsageError for weights that are negative or no numbers, InfeasibleError never: read `status`.

    Notes
    -----
    Guarantee: within the budget; bound <= optimum <= objective. An optimum is monotone: all else as it is, a larger
    weight never gets a width with a larger loss (exchange argument; for answers with stopped_by "optimal").
    Reference: QuantMoE-Bench, section 4 (heuristics) and 5 (outlier and importance scores).
    """
    if not np.isfinite(weight_LE).all() or (weight_LE < 0).any():
        raise UsageError(f"weight_LE has {float(np.min(weight_LE))}; importance is 0 or more")
    cost_LEK = weight_LE[..., None] * loss_LEK
    cost_CK = np.broadcast_to(cost_LEK, (*weight_LE.shape, len(bytes_K))).reshape(-1, len(bytes_K)).astype(np.float64)
    bytes_CK = np.broadcast_to(np.asarray(bytes_K, dtype=np.int64), cost_CK.shape).copy()
    problem = Knapsack(bytes_CO=bytes_CK, cost_CO=cost_CK, most_bytes=most_bytes)
    if solver == "greedy":
        return solve_greedy(problem)
    return solve_cpsat_knapsack(problem, time_limit_s=time_limit_s, seed=seed)


def importance_LE(
    frequency_LE: FloatArray,
    *,
    first_layers: int = 0,
    first_factor: float = 2.0,
    shared_LE: npt.NDArray[np.bool_] | None = None,
    shared_factor: float = 2.0,
    outlier_LE: FloatArray | None = None,
) -> FloatArray:
    """Weights for `allocate_bits`, (L, E): share of the layer's uses, times a factor for each reason to get more bits.

    first_layers: so many layers from the first get `first_factor`; shared_LE: experts that every token uses (their
    share is 1); outlier_LE: `outlier_score` of each expert, over the mean of all.
    """
    total_L1 = np.maximum(frequency_LE.sum(axis=1, keepdims=True), 1e-300)
    weight_LE = frequency_LE / total_L1
    if shared_LE is not None:
        weight_LE = np.where(shared_LE, shared_factor, weight_LE)
    weight_LE[:first_layers] *= first_factor
    if outlier_LE is not None:
        weight_LE = weight_LE * outlier_LE / outlier_LE.mean()
    return weight_LE


def outlier_score(weight_OI: FloatArray) -> float:
    """The largest ratio of a column's largest to its mean magnitude, over columns that are not all zero (0: none)."""
    size_OI = np.abs(weight_OI)
    mean_I = size_OI.mean(axis=0)
    used_I = mean_I > 0
    return float((size_OI.max(axis=0)[used_I] / mean_I[used_I]).max(initial=0.0))


def average_bits(bits_M: FloatArray, parameters_M: FloatArray) -> float:
    """Bits of a parameter, mean over all parameters of the modules: sum of bits times parameters over parameters."""
    return float((bits_M * parameters_M).sum() / parameters_M.sum())
