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
from placer.core.evaluate_profile import distinct
from placer.core.plan import canonical_slots
from placer.core.problem import PlacementProblem
from placer.core.replicas import layer_slots, serve_sets, served_share
from solvers.balance.lpt import lpt_slots
from solvers.result import SolveResult, StoppedBy
from solvers.touch.anneal import incidence
from solvers.touch.caps import JUDGE_DRAWS, JUDGE_SPREAD, NEAR_FLOOR, load_draws, promise, refuse_impossible_cap
from solvers.touch.coactivation import node_price, touch_objective
from solvers.touch.frontier import Candidate, cheapest_under_caps
from solvers.touch.replica_anneal import MAX_RANKS, anneal_replicas

__all__ = ["solve_replicated"]

IntArray = npt.NDArray[np.int64]
PRICES = (1.0, 2.5, 8.0)
"""Copies per token and layer that one unit of PAR is worth, one pass each."""

SERVED_PER_PASS = 6e6


class _Layer:
    """One layer, ready to anneal and to judge."""

    def __init__(self, problem: PlacementProblem, layer: int, judge_EB: npt.NDArray[np.float64], seed: int) -> None:
        self.problem, self.judge_EB = problem, judge_EB
        self.sets = problem.profile.sets[layer].split_heavy()
        self.experts = problem.profile.model.num_experts
        self.first_E, self.set_I = incidence(self.sets.expert_HK, self.experts)
        rng = np.random.default_rng([seed, layer])
        # candidates are judged by the core's replica choice, with other draws than those they were annealed on
        self.draw_HK = rng.integers(0, 2**32, self.sets.expert_HK.shape, dtype=np.uint32)
        self.load_E = problem.profile.load_LE[layer]
        self.tokens = max(1, int(self.sets.weight_H.sum()))
        self.visit_first = problem.replica_choice == "visit_first"
        self.node_weight = node_price(problem)

    def judge(self, row_P: IntArray) -> Candidate:
        """The candidate that a row of slots is: its cost, and its PAR on draws and as seen."""
        cluster, sets = self.problem.cluster, self.sets
        slots = layer_slots(row_P, self.experts, cluster.num_ranks, cluster.ranks_per_node)
        slot_HK = serve_sets(slots, self.problem.replica_choice, sets.expert_HK)
        share_ER = np.zeros((self.experts, cluster.num_ranks))
        np.add.at(share_ER, (row_P, slots.rank_P), served_share(slots, slot_HK, sets.weight_H))
        rank_HK = np.where(slot_HK >= 0, slots.rank_P[slot_HK], -1)
        ranks = distinct(rank_HK) @ sets.weight_H
        nodes = distinct(np.where(rank_HK >= 0, slots.node_R[rank_HK], -1)) @ sets.weight_H
        return Candidate(
            touched=float(ranks + self.node_weight * nodes) / self.tokens,
            par=float(par(self.judge_EB.T @ share_ER).mean()),
            par_seen=float(par(self.load_E @ share_ER)),
            placement=row_P,
        )

    def anneal(self, row_P: IntArray, price: float, seed: tuple[int, ...]) -> Candidate:
        """A better candidate for this price of PAR, from `row_P`."""
        unit = self.tokens * self.sets.expert_HK.shape[1] / self.experts * (1 + self.node_weight)
        found_RC = anneal_replicas(
            row_P.reshape(self.problem.cluster.num_ranks, -1),
            self.experts,
            self.problem.cluster.node_R,
            self.sets.expert_HK,
            self.sets.weight_H,
            self.draw_HK,
            self.first_E,
            self.set_I,
            self.visit_first,
            self.node_weight,
            price * self.tokens,
            int(min(SERVED_PER_PASS, 20_000.0 * len(self.set_I))),
            0.24 * unit,
            0.008 * unit,
            np.random.default_rng(seed),
        )
        return self.judge(canonical_slots(found_RC.reshape(1, -1), len(found_RC))[0])


def solve_replicated(
    problem: PlacementProblem,
    *,
    seed: int = 0,
    time_limit_s: float = 60.0,
    start_LP: IntArray | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> SolveResult:
    """Few ranks touched with `problem.redundant` replicas per layer at mean PAR <= problem.max_par, up to 64 ranks.

    The cap is as in solve_coactivation. Objective: mean ranks touched as the replica choice serves the expert sets.
    Guarantee: none beyond the bound. Complexity: O(L * SERVED_PER_PASS). Deterministic unless the time limit stops it.
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
    layers = [_Layer(problem, layer, judge_LEB[layer], seed) for layer in range(profile.model.num_sites)]
    starts = [lpt_slots(profile.load_LE, problem.num_slots, cluster.num_ranks, seed=seed)]
    if start_LP is not None and start_LP.shape == starts[0].shape:
        starts.append(start_LP)
    pools = [[item.judge(start[layer]) for start in starts] for layer, item in enumerate(layers)]
    cap_seen = problem.max_par if problem.max_par is not None else np.inf
    cap = max(cap_seen, float(np.mean([pool[0].par for pool in pools])) + NEAR_FLOOR)
    prices = PRICES if np.isfinite(cap) else (0.0,)
    stopped_by: StoppedBy = "effort"
    for step, price in enumerate(prices):
        for layer, item in enumerate(layers):
            if time.perf_counter() - started > time_limit_s:
                stopped_by = "time_limit"
                break
            begin = min(pools[layer], key=lambda c: c.touched + price * c.par)
            pools[layer].append(item.anneal(begin.placement, price, (seed, step, layer)))
            if progress:
                progress(step * len(layers) + layer + 1, len(prices) * len(layers))
    chosen = cheapest_under_caps(pools, cap, cap_seen)
    objective = float(np.mean([candidate.touched for candidate in chosen]))
    objective_name, bound = touch_objective(problem)
    return SolveResult(
        solver="replicated",
        status="solved",
        stopped_by="optimal" if objective <= bound + 1e-12 else stopped_by,
        slot_expert_LP=np.stack([candidate.placement for candidate in chosen]),
        objective_name=objective_name,
        objective=objective,
        bound=bound,
        bound_by="capacity: ceil(k / slots)",
        seconds=time.perf_counter() - started,
        message=promise(chosen, cap_seen, len(profile.load_FLE)),
    )
