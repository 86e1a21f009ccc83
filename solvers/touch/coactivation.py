"""Co-activation search under a load cap: experts that tokens choose together move to one rank, no rank gets too busy.

For the de-duplicated dispatch modes, where a token costs one copy per rank (and node) it touches. Layers separate
except for the caps, which are on means over layers; so each layer is annealed at several prices of PAR, pooled and in
windows, and the cheapest combination that meets the caps is taken.

Experts that tokens choose together are busy together, so few ranks touched and even windows are opposed: a cap on PAR
over all tokens says little about the window that an iteration waits for.

Legend: L layers, H expert sets, E experts, K top-k, R ranks, N nodes, F request folds, B draws, C slots per rank,
W windows.
"""

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from placer.core.problem import PlacementProblem
from solvers.balance.lpt import lpt_slots
from solvers.interrupts import interruptible
from solvers.ranks import rank_of_expert, slots_of_ranks
from solvers.result import SolveResult, StoppedBy
from solvers.touch.caps import JUDGE_DRAWS, JUDGE_SPREAD, NEAR_FLOOR, load_draws, promise, refuse_impossible_cap
from solvers.touch.frontier import Candidate, cheapest_under_caps, implied_prices
from solvers.touch.layer import PAIRED_EXPERTS, better, candidate, prepare
from solvers.touch.nodes import gather_in_nodes
from solvers.touch.objective import node_price, touch_objective

__all__ = ["solve_coactivation"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

SCAN_PRICES = (0.4, 1.0, 2.0, 4.0, 10.0, 25.0)
"""Copies per token and layer that one unit of PAR is worth, in the first, short pass over the frontier."""

REFINE_FACTORS = (0.75, 1.0, 1.33)
WINDOW_FACTORS = (0.0, 1.0)
"""In the first pass, what a unit of window PAR is worth against one of PAR: nothing, or as much."""

PAIR_VALUE = 0.45
"""Ranks that a pair together saves, while only pairs are looked at."""

DRAWS, WINDOWS, MOST_LOADS = 32, 48, 6_000
"""The search sees so many draws and windows, fewer where E times their number would be above MOST_LOADS."""

SEARCH_SPREAD = 0.5
"""The search sees draws of half a sample's deviation: wider ones drown small gains, none at all ignores drift."""


def solve_coactivation(
    problem: PlacementProblem,
    *,
    seed: int = 0,
    time_limit_s: float = 60.0,
    gap: float = 0.0,
    start_LP: IntArray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SolveResult:
    """Few ranks touched at mean PAR <= problem.max_par (None: PAR is free); no replicas beyond the experts themselves.

    The cap is meant for requests that were not seen: PAR is estimated on draws of the request folds with the variance
    of a fresh sample (`load_draws`), and that estimate is kept under the cap, or under NEAR_FLOOR more than the
    estimate of the best balanced placement where the requests differ too much for the cap. PAR on the requests seen is
    under the cap always.
    Objective: mean over layers and tokens of ranks touched, in `per_node` mode plus nodes touched at the links' price.
    Guarantee: none beyond the bound; deterministic for a seed unless the time limit stops it. Ctrl-C
    ends the search with the best so far.
    Complexity: O(L * VISITS_PER_LAYER). Raises UsageError without expert sets, InfeasibleError for an impossible cap.
    """
    started = time.perf_counter()
    profile, cluster = problem.profile, problem.cluster
    if not profile.sets:
        raise UsageError(
            "the profile has load counts only, no expert sets; use --solver lpt, or give a per-token trace"
        )
    if problem.redundant:
        raise UsageError("coactivation places one copy of each expert; use --solver replicated with --redundant")
    refuse_impossible_cap(problem)
    layers, ranks = profile.model.num_sites, cluster.num_ranks
    room_LR = problem.room_LR if problem.uneven else None
    balanced_LP = lpt_slots(
        profile.load_LE, problem.num_slots, ranks, seed=seed, speed_R=cluster.speed_R, room_LR=room_LR
    )
    start_LE = rank_of_expert(balanced_LP, ranks, profile.model.num_experts)
    loads = max(8, min(DRAWS + WINDOWS, MOST_LOADS // profile.model.num_experts))
    draws_LEB = load_draws(profile.load_FLE, min(DRAWS, loads // 2), seed, spread=SEARCH_SPREAD)
    judge_LEB = load_draws(profile.load_FLE, JUDGE_DRAWS, seed + 1, spread=JUDGE_SPREAD)
    windows_W = np.unique(np.linspace(0, len(profile.load_WLE) - 1, loads - draws_LEB.shape[2]).astype(np.int64))
    prepared = []
    for layer in range(layers):
        window_EW = profile.load_WLE[:, layer].T.astype(np.float64)
        searched_EB = np.concatenate((draws_LEB[layer], window_EW[:, windows_W]), axis=1)
        prepared.append(prepare(problem, layer, searched_EB, draws_LEB.shape[2], judge_LEB[layer], window_EW))
    node_weight = node_price(problem)
    pools = [[candidate(problem, item, start_LE[layer], node_weight)] for layer, item in enumerate(prepared)]
    if start_LP is not None and (problem.uneven or start_LP.shape == (layers, problem.num_slots)):
        given_LE = rank_of_expert(start_LP, ranks, profile.model.num_experts)
        for layer, item in enumerate(prepared):
            if room_LR is not None and (np.bincount(given_LE[layer], minlength=ranks) > room_LR[layer]).any():
                continue
            pools[layer].append(candidate(problem, item, given_LE[layer], node_weight))
    cap_seen = problem.max_par if problem.max_par is not None else np.inf
    floor = float(np.mean([pool[0].par for pool in pools]))
    cap = max(cap_seen, floor + NEAR_FLOOR)
    cap_window = problem.max_window_par if problem.max_window_par is not None else np.inf
    objective_name, bound = touch_objective(problem)
    stopped_by: StoppedBy = "effort"
    paired = profile.model.num_experts >= PAIRED_EXPERTS
    factors = WINDOW_FACTORS if np.isfinite(cap_window) else WINDOW_FACTORS[:1]
    scan = [(price, price * factor) for price in SCAN_PRICES for factor in factors if np.isfinite(cap)]
    scan += [(0.0, price) for price in SCAN_PRICES if np.isfinite(cap_window) and not scan]
    if paired:
        scan = [prices for prices in (scan or [(0.0, 0.0)]) if prices[0] in (0.0, SCAN_PRICES[1], SCAN_PRICES[3])]
    total = layers * (len(scan) + (len(REFINE_FACTORS) if scan else 1))
    done = 0
    with interruptible() as interrupt:
        for phase in ("scan", "refine"):
            # large layers try far more exchanges than they look at
            share, steps = 0.3 if paired else 0.04, scan
            if phase == "refine":
                par_price, window_price = implied_prices(pools, cap, cap_window)
                free = par_price <= 0 and window_price <= 0
                steps = [(par_price * f, window_price * f) for f in ((0.0,) if free else REFINE_FACTORS)]
                share = 0.8 if free or paired else 0.27
            for index, prices in enumerate(steps):
                chosen = cheapest_under_caps(pools, cap, cap_seen, cap_window)
                if _cost(chosen) <= bound / (1 - gap) and _meets(chosen, cap, cap_seen, cap_window):
                    stopped_by = "gap"
                    break
                for layer, item in enumerate(prepared):
                    if time.perf_counter() - started > time_limit_s:
                        stopped_by = "time_limit"
                        break
                    begin = min(pools[layer], key=lambda c: c.touched + prices[0] * c.par + prices[1] * c.window)
                    rng = np.random.default_rng([seed, phase == "refine", index, layer])
                    begin_E, room_R = begin.placement, None if room_LR is None else room_LR[layer]
                    if phase == "scan" and paired:
                        begin_E = better(problem, item, begin_E, room_R, 0.0, prices, PAIR_VALUE, share, rng)
                        begin_E = gather_in_nodes(problem, item, begin_E, rng)
                    found_E = better(problem, item, begin_E, room_R, node_weight, prices, 0.0, share, rng)
                    pools[layer].append(candidate(problem, item, found_E, node_weight))
                    done += 1
                    if progress:
                        progress(done, total)
    if interrupt.happened:
        stopped_by = "interrupt"
    chosen = cheapest_under_caps(pools, cap, cap_seen, cap_window)
    rank_LE = np.stack(
        [
            gather_in_nodes(problem, item, one.placement, np.random.default_rng(seed))
            for item, one in zip(prepared, chosen, strict=True)
        ]
    )
    gathered = zip(prepared, rank_LE, strict=True)
    objective = _cost([candidate(problem, item, rank_E, node_weight) for item, rank_E in gathered])
    if progress:
        progress(total, total)
    message = promise(chosen, cap_seen, len(profile.load_FLE))
    window = float(np.mean([one.window for one in chosen]))
    if window > cap_window + 1e-9:
        message += (
            f"; mean PAR in windows is {window:.3f}, above its cap {cap_window:g}: no placement found that meets it"
        )
    return SolveResult(
        solver="coactivation",
        status="solved",
        stopped_by="optimal" if objective <= bound + 1e-12 else stopped_by,
        slot_expert_LP=slots_of_ranks(rank_LE, ranks, None if room_LR is None else int(room_LR.max())),
        objective_name=objective_name,
        objective=objective,
        bound=bound,
        bound_by="capacity: ceil(k / slots)",
        seconds=time.perf_counter() - started,
        message=message,
    )


def _meets(chosen: list[Candidate], cap: float, cap_seen: float, cap_window: float) -> bool:
    means = np.mean([(one.par_seen, one.par, one.window) for one in chosen], axis=0)
    return bool((means <= np.array([cap_seen, cap, cap_window]) + 1e-9).all())


def _cost(chosen: list[Candidate]) -> float:
    return float(np.mean([one.touched for one in chosen]))
