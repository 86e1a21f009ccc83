"""Replicas chosen for co-activation and load together: few ranks touched, redundant slots included.

A replica on a rank that a token visits anyway costs no copy, if the engine chooses replicas that way (visit_first). The
search serves every expert set as the engine would; under another replica choice it takes replicas to be drawn by hash.

Legend: L layers, H expert sets, E experts, K top-k, R ranks, C slots per rank, P slots, B draws.
"""

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from placer.core.evaluate import par
from placer.core.evaluate_profile import serve_layer
from placer.core.plan import canonical_slots
from placer.core.problem import PlacementProblem
from placer.core.replicas import layer_slots
from solvers.balance.lpt import lpt_slots
from solvers.interrupts import interruptible
from solvers.result import SolveResult, StoppedBy
from solvers.touch.anneal import incidence
from solvers.touch.caps import JUDGE_DRAWS, JUDGE_SPREAD, load_draws, promise, refuse_impossible_cap
from solvers.touch.frontier import Candidate, cheapest_under_caps, implied_prices
from solvers.touch.objective import node_price, touch_objective
from solvers.touch.replica_anneal import anneal_replicas
from solvers.touch.replica_serve import MAX_RANKS

__all__ = ["solve_replicated"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
SCAN_PRICES = (4.0, 8.0, 16.0, 32.0)
"""Copies per token and layer that one unit of PAR is worth in the first pass, each from the balanced start."""

REFINE_FACTORS = (0.7, 1.0, 1.4, 1.0)
DRAWS = 32
SEARCH_SPREAD = 0.5
"""As in solve_coactivation."""

SCAN_EFFORT, REFINE_EFFORT = 8e6, 4e6
"""Expert sets looked at per layer and pass."""

MOVES_PER_SLOT = 500
WINDOW_WEIGHT, CAPPED_WINDOW_WEIGHT = 0.1, 0.6
"""Part of the price of PAR that is set on the load windows seen, the rest on draws of all requests; where PAR in
windows has a cap of its own, the second in the first pass, then what the caps imply."""

MOST_WINDOWS = 64
MARGIN = 0.01
"""As NEAR_FLOOR of solve_coactivation; here the floor is that of the search, not of a placement for load alone."""


class _Layer:
    """One layer, ready to anneal and to judge."""

    def __init__(
        self, problem: PlacementProblem, layer: int, draw_EB: FloatArray, judge_EB: FloatArray, seed: int
    ) -> None:
        self.problem, self.judge_EB = problem, judge_EB
        sets = problem.profile.sets[layer].split_heavy(1000)
        self.split = problem.profile.sets[layer].split_heavy()
        self.experts = problem.profile.model.num_experts
        self.first_E, self.set_I = incidence(sets.expert_HK, self.experts)
        self.expert_HK = np.where(sets.expert_HK < 0, self.experts, sets.expert_HK).astype(np.int16)
        self.weight_H = sets.weight_H
        rng = np.random.default_rng([seed, layer])
        self.draw_H = rng.integers(0, 2**32, len(self.weight_H))
        self.load_E = problem.profile.load_LE[layer]
        self.tokens = max(1, int(self.weight_H.sum()))
        self.visit_first = problem.replica_choice == "visit_first"
        self.node_weight = node_price(problem)
        load_WE = problem.profile.load_WLE[:, layer]
        every = np.linspace(0, len(load_WE) - 1, min(len(load_WE), MOST_WINDOWS)).astype(np.int64)
        self.draw_EB = np.concatenate([draw_EB, load_WE[every].T.astype(np.float64)], axis=1)
        draws = draw_EB.shape[1]
        # a few hundred moves per slot are enough, however few sets there are
        self.most_effort = MOVES_PER_SLOT * problem.num_slots * (1.0 + 2 * len(self.set_I) / self.experts)
        self.draws, self.windows, self.load_WE = draws, len(every), load_WE

    def effort(self, refine: bool) -> float:
        """Expert sets that one full pass may look at."""
        return min(REFINE_EFFORT if refine else SCAN_EFFORT, self.most_effort)

    def judge(self, row_P: IntArray, share_P: FloatArray) -> Candidate:
        """The candidate that a row of slots is: its cost, and its PAR on draws and as seen."""
        cluster = self.problem.cluster
        slots = layer_slots(row_P, self.experts, cluster.num_ranks, cluster.ranks_per_node, share_P)
        served = serve_layer(slots, self.problem.replica_choice, self.split)
        share_ER = np.zeros((self.experts, cluster.num_ranks))
        np.add.at(share_ER, (row_P, slots.rank_P), served.share_P)
        return Candidate(
            touched=(served.ranks + self.node_weight * served.nodes) / self.tokens,
            par=float(par(self.judge_EB.T @ share_ER).mean()),
            par_seen=float(par(self.load_E @ share_ER)),
            placement=np.stack([row_P.astype(np.float64), share_P]),  # experts, shares
            window=float(par(self.load_WE @ share_ER).mean()),
        )

    def anneal(
        self, start: FloatArray, prices: tuple[float, float], refine: bool, effort: float, seed: tuple[int, ...]
    ) -> Candidate:
        """A better candidate from the rows and shares `start`, at prices of PAR on draws and in windows.

        `refine` stays near the start.
        """
        unit = self.tokens * self.expert_HK.shape[1] / self.experts * (1 + self.node_weight)
        ranks = self.problem.cluster.num_ranks
        held_RC = start[0].astype(np.int64).reshape(ranks, -1)
        rank_P = np.repeat(np.arange(ranks), held_RC.shape[1])
        share_ER = np.zeros((self.experts, ranks))
        share_ER[held_RC.reshape(-1), rank_P] = start[1]
        price_B = np.repeat([prices[0] / self.draws, prices[1] / self.windows], [self.draws, self.windows])
        found_RC, found_ER, _ = anneal_replicas(
            held_RC,
            share_ER,
            self.problem.cluster.node_R,
            self.draw_EB,
            price_B * self.tokens,
            self.expert_HK,
            self.weight_H,
            self.draw_H,
            self.first_E,
            self.set_I,
            self.visit_first,
            self.node_weight,
            effort,
            (0.03 if refine else 0.12) * unit,
            0.004 * unit,
            1.0 if refine else 0.01,
            0.15 if refine else 0.03,
            0.5 if refine else 0.0,
            np.random.default_rng(seed),
        )
        row_P = canonical_slots(found_RC.reshape(1, -1), ranks)[0]
        return self.judge(row_P, found_ER[row_P, rank_P])


def _cap(pools: list[list[Candidate]], cap_seen: float) -> float:
    """The cap on PAR expected of unseen requests: what was asked for, or little above the least that was found."""
    return max(cap_seen, float(np.mean([min(c.par for c in pool) for pool in pools])) + MARGIN)


def _even_shares(row_P: IntArray, experts: int) -> FloatArray:
    return np.asarray(1.0 / np.bincount(row_P, minlength=experts)[row_P])


def solve_replicated(
    problem: PlacementProblem,
    *,
    seed: int = 0,
    time_limit_s: float = 60.0,
    start_LP: IntArray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SolveResult:
    """Few ranks touched with `problem.redundant` replicas per layer at mean PAR <= problem.max_par, up to 64 ranks.

    Each layer is annealed from the balanced start at several prices of PAR, then from the best found at the price that
    the cap implies; the cheapest combination under the cap is taken. PAR on the requests seen is under the cap if any
    combination is; on unseen ones it is estimated as in solve_coactivation and kept under the cap, or MARGIN above the
    least found where the requests differ too much. Objective: mean ranks touched as visit_first serves the expert sets.
    Guarantee: none beyond the bound. Complexity: O(L * (SCAN_EFFORT + REFINE_EFFORT)) sets looked at. Deterministic
    unless the time limit cuts it short. Ctrl-C ends the search with the best so far.
    Raises UsageError without expert sets or beyond 64 ranks, InfeasibleError for an impossible cap.
    """
    started = time.perf_counter()
    profile, cluster = problem.profile, problem.cluster
    if not profile.sets:
        raise UsageError(
            "the profile has load counts only, no expert sets; use --solver lpt, or give a per-token trace"
        )
    problem.refuse_unlike_ranks("replicated")
    if cluster.num_ranks > MAX_RANKS:
        raise UsageError(f"replicated serves at most {MAX_RANKS} ranks, the cluster has {cluster.num_ranks}; use lpt")
    refuse_impossible_cap(problem)
    judge_LEB = load_draws(profile.load_FLE, JUDGE_DRAWS, seed + 1, spread=JUDGE_SPREAD)
    draws_LEB = load_draws(profile.load_FLE, DRAWS, seed, spread=SEARCH_SPREAD)
    layers = [
        _Layer(problem, layer, draws_LEB[layer], judge_LEB[layer], seed) for layer in range(profile.model.num_sites)
    ]
    starts = [lpt_slots(profile.load_LE, problem.num_slots, cluster.num_ranks, seed=seed)]
    if start_LP is not None and start_LP.shape == starts[0].shape:
        starts.append(start_LP)
    pools = [
        [item.judge(start[layer], _even_shares(start[layer], item.experts)) for start in starts]
        for layer, item in enumerate(layers)
    ]
    cap_seen = problem.max_par if problem.max_par is not None else np.inf
    cap_window = problem.max_window_par if problem.max_window_par is not None else np.inf
    on_windows = CAPPED_WINDOW_WEIGHT if np.isfinite(cap_window) else WINDOW_WEIGHT
    stopped_by: StoppedBy = "effort"
    passes = [(False, price) for price in SCAN_PRICES] + [(True, factor) for factor in REFINE_FACTORS]
    left = sum(item.effort(refine) for refine, _ in passes for item in layers)
    done, began = 0.0, 0.0
    with interruptible() as interrupt:
        for turn, (refine, price) in enumerate(passes):
            if refine and np.isfinite(cap_seen):
                implied = implied_prices(pools, _cap(pools, cap_seen), cap_window)
                price *= max(1.0, sum(implied))
                if np.isfinite(cap_window) and sum(implied) > 0:
                    on_windows = min(1.0, max(WINDOW_WEIGHT, implied[1] / sum(implied)))
            elif not np.isfinite(cap_seen):
                price = 0.0
            for layer, item in enumerate(layers):
                now = time.perf_counter()
                if now - started > time_limit_s:
                    stopped_by = "time_limit"
                    break
                prices = ((1 - on_windows) * price, on_windows * price)
                begin = pools[layer][0]
                if refine:
                    begin = min(pools[layer], key=lambda c: c.touched + prices[0] * c.par + prices[1] * c.window)
                if turn + layer == 0:
                    # compiles, so that the rate is not misjudged
                    item.anneal(begin.placement, prices, refine, 0.0, (seed,))
                    began = now = time.perf_counter()
                # where time is short, every pass gets a little of it
                scale = 1.0
                if done > 0:
                    scale = min(1.0, (time_limit_s - (now - started)) * done / ((now - began) * left))
                if scale < 1:
                    stopped_by = "time_limit"
                effort = item.effort(refine) * scale
                pools[layer].append(item.anneal(begin.placement, prices, refine, effort, (seed, turn, layer)))
                done, left = done + effort, left - item.effort(refine)
                if progress:
                    progress(turn * len(layers) + layer + 1, len(passes) * len(layers))
    if interrupt.happened:
        stopped_by = "interrupt"
    chosen = cheapest_under_caps(pools, _cap(pools, cap_seen), cap_seen, cap_window)
    objective = float(np.mean([candidate.touched for candidate in chosen]))
    objective_name, bound = touch_objective(problem)
    return SolveResult(
        solver="replicated",
        status="solved",
        stopped_by="optimal" if objective <= bound + 1e-12 else stopped_by,
        slot_expert_LP=np.stack([candidate.placement[0] for candidate in chosen]).astype(np.int64),
        replica_share_LP=np.stack([candidate.placement[1] for candidate in chosen]),
        objective_name=objective_name,
        objective=objective,
        bound=bound,
        bound_by="capacity: ceil(k / slots)",
        seconds=time.perf_counter() - started,
        message=promise(chosen, cap_seen, len(profile.load_FLE)),
    )
