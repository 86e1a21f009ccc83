"""Shadow weights: how much of each site's time is the disk's, found by ascent on a bound; choices come along the way.

A site's makespan is at least the larger of what processor and disk have to do, so at least any mixture of the two
with shares 1 - s and s. For fixed shares the best ceilings and resident planes are a multiple-choice knapsack, whose
relaxation gives a bound; the shares that make it largest say where a saved read saves time, and knapsacks near them
give good choices. Ours: D2MoE plans no bits; its budget only decides which planes stay (section 4.4, algorithm 2).

Legend: L routing sites, B iterations, E experts, O options.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from solvers.bits.knapsack import KnapsackResult, solve_greedy
from solvers.bits.options import LevelOptions

__all__ = ["Shadow", "ascend"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

STEPS = 120
PATIENCE = 8
LEAST_STEP = 1e-3
STARTS = (0.5, 0.0, 1.0)
SAFETY = 1e-9
MOST_CHOICES = 6
LEAST_SHARE = 0.02
"""Where the processor is the bottleneck, a read less helps a little still: at its start, and in imperfect orders."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Shadow:
    """The shares at the best bound, that bound, and choices of options worth judging, the most promising first.

    bound_ns: mean nanoseconds of an iteration; no residency, order, buffer and (within the loss limit) ceilings without
    a cache or prefetch are faster. None where nothing fits the limits.
    """

    share_LB: FloatArray
    bound_ns: float | None
    choices: tuple[IntArray, ...]


def ascend(
    options: LevelOptions,
    *,
    most_bytes: int,
    buffer_bytes: int,
    most_loss: float | None = None,
    start_LB: FloatArray | None = None,
    steps: int = STEPS,
) -> Shadow:
    """Subgradient ascent with Polyak's steps towards the best mixture-free value seen.

    `most_bytes` for resident planes, beside a buffer of `buffer_bytes` that holds any one expert's missing planes.
    Complexity: O(steps (B L E K + C log C)), C the classes. Guarantee: bound_ns holds for every choice that keeps these
    limits, whatever the steps. Deterministic.
    """
    sites, iterations, experts = options.shape_LBE
    best = -np.inf
    target, theta, waited = np.inf, 1.0, 0
    found: list[tuple[float, bytes, IntArray]] = []

    def answer_at(shares_LB: FloatArray) -> KnapsackResult:
        return solve_greedy(options.knapsack(options.cost_LEO(shares_LB), most_bytes, buffer_bytes, most_loss))

    starts = [np.full((sites, iterations), share) for share in STARTS] if start_LB is None else [start_LB]
    share_LB = max(starts, key=lambda shares_LB: answer_at(shares_LB).bound or -np.inf)
    best_share_LB = share_LB
    for step in range(steps):
        answer = answer_at(share_LB)
        if answer.bound is None:
            return Shadow(share_LB=share_LB, bound_ns=None, choices=())
        value = answer.bound
        if value > best * (1 + 1e-6) or not np.isfinite(best):
            waited = 0
        if value > best:
            best, best_share_LB = value, share_LB
        waited += 1
        if answer.choice_C is None:
            break
        choice_LE = answer.choice_C.reshape(sites, experts)
        compute_LB, input_LB = options.machine_ns_LB(choice_LE)
        whole = float(np.maximum(compute_LB, input_LB).sum())
        found.append((whole, choice_LE.tobytes(), choice_LE))
        target = min(target, whole)
        if waited > PATIENCE:
            theta, waited, share_LB = theta / 2, 0, best_share_LB
        slope_LB = input_LB - compute_LB
        # shares at an end cannot go on in that direction
        slope_LB[((share_LB <= 0) & (slope_LB < 0)) | ((share_LB >= 1) & (slope_LB > 0))] = 0
        norm = float((slope_LB**2).sum())
        if target - best <= SAFETY * abs(target) or norm == 0 or theta < LEAST_STEP or step == steps - 1:
            break
        share_LB = np.clip(share_LB + theta * max(target - value, 0.0) / norm * slope_LB, 0.0, 1.0)
    unique = {key: (whole, choice_LE) for whole, key, choice_LE in found}
    ranked = [choice_LE for _, (_, choice_LE) in sorted(unique.items(), key=lambda one: (one[1][0], one[0]))]
    last = answer_at(np.maximum(best_share_LB, LEAST_SHARE)).choice_C
    if last is not None:
        ranked.insert(0, last.reshape(sites, experts))
    return Shadow(
        share_LB=best_share_LB,
        bound_ns=options.outside_ns + best * (1 - SAFETY) / max(1, iterations),
        choices=tuple(ranked[:MOST_CHOICES]),
    )
