"""A load cap that is meant for requests not seen yet: what their load may be, and what can be promised.

Legend: L layers, E experts, F request folds, B draws.
"""

import numpy as np
import numpy.typing as npt

from placer.core.errors import InfeasibleError
from placer.core.evaluate import par
from placer.core.problem import PlacementProblem
from solvers.balance.load import par_bound, rank_load_LR
from solvers.balance.lpt import lpt_slots
from solvers.touch.frontier import Candidate

__all__ = [
    "JUDGE_DRAWS",
    "JUDGE_SPREAD",
    "NEAR_FLOOR",
    "balanced_window_par",
    "load_draws",
    "promise",
    "refuse_impossible_cap",
]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

NEAR_FLOOR = 0.02
"""PAR this near to the best balanced placement costs nearly all that co-activation gains, for no more than noise."""

JUDGE_SPREAD = 2.0**0.5
MIN_FOLDS = 4
WINDOW_SHARE = 0.82
JUDGE_DRAWS = 128
"""Candidates are compared on other draws than those they were annealed on, or the best of many would look too good."""


def load_draws(load_FLE: IntArray, draws: int, seed: int, *, spread: float) -> FloatArray:
    """Loads that a fresh sample of requests might show, (L, E, B).

    Each draw resamples the F folds with replacement and doubles the variance (what is judged differs from what was seen
    by two independent samples). With fewer than MIN_FOLDS folds that says nothing, so the one draw is the load itself.
    """
    folds = len(load_FLE)
    load_LE = load_FLE.sum(axis=0).astype(np.float64)
    if folds < MIN_FOLDS:
        return load_LE[:, :, None]
    rng = np.random.default_rng(seed)
    times_BF = rng.multinomial(folds, np.full(folds, 1.0 / folds), size=draws)
    weight_BF = 1.0 + spread * (times_BF - 1.0)
    drawn = np.tensordot(weight_BF, load_FLE.astype(np.float64), axes=(1, 0))
    return np.ascontiguousarray(np.maximum(drawn, 0.0).transpose(1, 2, 0))


def balanced_window_par(problem: PlacementProblem) -> float:
    """A cap on window PAR that leaves unseen windows as even as a plan for load alone does.

    A search that sees the windows fits them better than it will fit others: on real traces its excess over 1 grows by
    about a tenth, while that of a load-only plan does not. So the cap is below what the load-only plan has.
    """
    profile, ranks = problem.profile, problem.cluster.num_ranks
    speed_R, room_LR = problem.cluster.speed_R, problem.room_LR if problem.uneven else None
    slots_LP = lpt_slots(profile.load_LE, problem.num_slots, ranks, speed_R=speed_R, room_LR=room_LR)
    windows_WLR = np.stack([rank_load_LR(load_LE, slots_LP, ranks) for load_LE in profile.load_WLE])
    return 1.0 + WINDOW_SHARE * (float(par(windows_WLR, speed_R).mean()) - 1.0)


def refuse_impossible_cap(problem: PlacementProblem) -> None:
    """Raises InfeasibleError where the load bound alone is above `problem.max_par`."""
    least = par_bound(problem)
    if problem.max_par is not None and least > problem.max_par + 1e-12:
        raise InfeasibleError(
            f"max_par {problem.max_par:g} cannot be met: one expert alone carries so much that no placement has "
            f"PAR below {least:.4f}; raise --max-par or add --redundant slots"
        )


def promise(chosen: list[Candidate], cap: float, folds: int) -> str:
    """One line for the user: the PAR to expect of unseen requests, and whether the cap holds for them."""
    if folds < MIN_FOLDS:
        return "too few requests to say anything about unseen ones"
    estimate = float(np.mean([candidate.par for candidate in chosen]))
    text = f"PAR on unseen requests is estimated at {estimate:.3f}"
    if estimate > cap + 1e-9:
        text += f", above the cap {cap:g} that those planned on meet: requests differ too much for a tighter promise"
    return text
