"""Co-activation search under a load cap: experts that tokens choose together move to one rank, no rank gets too busy.

For the de-duplicated dispatch modes, where a token costs one copy per rank (and node) it touches. Layers separate
except for the cap, which is on the mean over layers; so each layer is annealed at several prices of PAR and the
cheapest combination that meets the cap is taken.

Legend: L layers, H expert sets, E experts, K top-k, R ranks, N nodes, F request folds, B draws, C slots per rank.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from placer.core.evaluate import par
from placer.core.plan import canonical_slots
from placer.core.problem import PlacementProblem
from placer.core.profile import ExpertSets
from solvers.balance.lpt import lpt_slots
from solvers.result import SolveResult, StoppedBy
from solvers.touch.anneal import anneal_layer, incidence, pair_weights, touched
from solvers.touch.caps import JUDGE_DRAWS, JUDGE_SPREAD, NEAR_FLOOR, load_draws, promise, refuse_impossible_cap
from solvers.touch.frontier import Candidate, cheapest_under_caps, implied_price

__all__ = ["capacity_bound", "node_price", "solve_coactivation", "touch_objective"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

SCAN_PRICES = (0.4, 1.0, 2.0, 4.0, 10.0, 25.0)
"""Copies per token and layer that one unit of PAR is worth, in the first, short pass over the frontier."""

REFINE_FACTORS = (0.75, 1.0, 1.33)
DRAWS = 32
SEARCH_SPREAD = 0.5
"""The search sees draws of half a sample's deviation: wider ones drown small gains, none at all ignores drift."""
VISITS_PER_LAYER = 8e8


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer, ready to anneal."""

    sets: ExpertSets
    first_E: IntArray
    set_I: npt.NDArray[np.int32]
    pair_EE: FloatArray
    draw_EB: FloatArray
    judge_EB: FloatArray
    load_E: IntArray
    tokens: int
    steps: int


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
    Guarantee: none beyond the bound; deterministic for a seed unless the time limit stops it.
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
    start_LE = _rank_of_expert(balanced_LP, ranks, profile.model.num_experts)
    draws_LEB = load_draws(profile.load_FLE, DRAWS, seed, spread=SEARCH_SPREAD)
    judge_LEB = load_draws(profile.load_FLE, JUDGE_DRAWS, seed + 1, spread=JUDGE_SPREAD)
    prepared = [_prepare(problem, layer, draws_LEB[layer], judge_LEB[layer]) for layer in range(layers)]
    node_weight = node_price(problem)
    pools = [[_candidate(problem, item, start_LE[layer], node_weight)] for layer, item in enumerate(prepared)]
    if start_LP is not None and (problem.uneven or start_LP.shape == (layers, problem.num_slots)):
        given_LE = _rank_of_expert(start_LP, ranks, profile.model.num_experts)
        for layer, item in enumerate(prepared):
            if room_LR is not None and (np.bincount(given_LE[layer], minlength=ranks) > room_LR[layer]).any():
                continue
            pools[layer].append(_candidate(problem, item, given_LE[layer], node_weight))
    cap_seen = problem.max_par if problem.max_par is not None else np.inf
    floor = float(np.mean([pool[0].par for pool in pools]))
    cap = max(cap_seen, floor + NEAR_FLOOR)
    objective_name, bound = touch_objective(problem)
    stopped_by: StoppedBy = "effort"
    prices = list(SCAN_PRICES) if np.isfinite(cap) else []
    total = layers * (len(prices) + (len(REFINE_FACTORS) if prices else 1))
    done = 0
    for phase in ("scan", "refine"):
        share = 0.04 if phase == "scan" else 0.27
        if phase == "refine":
            price = implied_price(pools, cap) if np.isfinite(cap) else 0.0
            prices = [price * factor for factor in REFINE_FACTORS] if price > 0 else [0.0]
            share = share if price > 0 else 0.8
        for index, price in enumerate(prices):
            chosen = cheapest_under_caps(pools, cap, cap_seen)
            if _cost(chosen) <= bound / (1 - gap) and _meets(chosen, cap, cap_seen):
                stopped_by = "gap"
                break
            for layer, item in enumerate(prepared):
                if time.perf_counter() - started > time_limit_s:
                    stopped_by = "time_limit"
                    break
                begin_E = min(pools[layer], key=lambda c: c.touched + price * c.par).placement
                rng = np.random.default_rng([seed, phase == "refine", index, layer])
                room_R = None if room_LR is None else room_LR[layer]
                found_E = _anneal(problem, item, begin_E, room_R, node_weight, price, share, rng)
                pools[layer].append(_candidate(problem, item, found_E, node_weight))
                done += 1
                if progress:
                    progress(done, total)
    chosen = cheapest_under_caps(pools, cap, cap_seen)
    rank_LE = np.stack([candidate.placement for candidate in chosen])
    objective = _cost(chosen)
    if progress:
        progress(total, total)
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
        message=promise(chosen, cap_seen, len(profile.load_FLE)),
    )


def capacity_bound(problem: PlacementProblem, slots: int) -> float:
    """Mean groups (ranks, nodes) of `slots` slots touched is at least this: k distinct experts fill ceil(k / slots)."""
    per_layer = []
    for sets in problem.profile.sets:
        size_H = (sets.expert_HK >= 0).sum(axis=1)
        weight = sets.weight_H * (size_H > 0)
        least = -(-size_H // slots)
        per_layer.append(float((least * weight).sum() / max(1, weight.sum())))
    return float(np.mean(per_layer))


def touch_objective(problem: PlacementProblem) -> tuple[str, float]:
    """Name of what both touching solvers minimise, and a lower bound on it."""
    weight = node_price(problem)
    name = "ranks_touched" if weight == 0 else f"ranks_touched + {weight:.3g} * nodes_touched"
    most = int(problem.room_LR.max())
    on_ranks = capacity_bound(problem, most)
    on_nodes = capacity_bound(problem, most * problem.cluster.ranks_per_node)
    return name, on_ranks + weight * on_nodes


def node_price(problem: PlacementProblem) -> float:
    """What touching one more node costs against one more rank: the ratio of their links' bytes per second."""
    cluster = problem.cluster
    if problem.mode != "per_node" or cluster.nodes == 1:
        return 0.0
    return cluster.intra.gbytes_per_s / cluster.inter.gbytes_per_s


def slots_of_ranks(rank_LE: IntArray, num_ranks: int, width: int | None = None) -> IntArray:
    """slot_expert_LP of a placement given as the rank of each expert, equal counts per rank.

    With `width` counts may differ: every rank has so many slots, and -1 in those it does not use.
    """
    order_LE = np.argsort(rank_LE, axis=1, kind="stable")
    if width is None:
        return canonical_slots(order_LE, num_ranks)
    slots = np.full((len(rank_LE), num_ranks, width), -1, dtype=np.int64)
    for layer, (rank_E, order_E) in enumerate(zip(rank_LE, order_LE, strict=True)):
        ranks = rank_E[order_E]
        slots[layer, ranks, np.arange(len(ranks)) - np.searchsorted(ranks, ranks)] = order_E
    return slots.reshape(len(rank_LE), -1)


def _rank_of_expert(slots_LP: IntArray, num_ranks: int, experts: int) -> IntArray:
    """Rank of each expert of a placement without replicas, (L, E)."""
    # empty slots (-1) come first
    return np.argsort(slots_LP, axis=1, kind="stable")[:, -experts:] // (slots_LP.shape[1] // num_ranks)


def _prepare(problem: PlacementProblem, layer: int, draw_EB: FloatArray, judge_EB: FloatArray) -> _Layer:
    sets = problem.profile.sets[layer]
    experts = problem.profile.model.num_experts
    first_E, set_I = incidence(sets.expert_HK, experts)
    visits = max(1.0, 2.0 * len(set_I) / experts)
    steps = int(np.clip(VISITS_PER_LAYER / visits, 2_000, 12_000 * experts))
    load_E = problem.profile.load_LE[layer]
    pair_EE = pair_weights(sets.expert_HK, sets.weight_H, experts)
    return _Layer(sets, first_E, set_I, pair_EE, draw_EB, judge_EB, load_E, max(1, int(sets.weight_H.sum())), steps)


def _candidate(problem: PlacementProblem, item: _Layer, rank_E: IntArray, node_weight: float) -> Candidate:
    ranks, node_R = problem.cluster.num_ranks, problem.cluster.node_R
    cost = touched(item.sets.expert_HK, item.sets.weight_H, rank_E, ranks)
    if node_weight > 0:
        nodes = touched(item.sets.expert_HK, item.sets.weight_H, node_R[rank_E], problem.cluster.nodes)
        cost += node_weight * nodes
    load_RB = np.zeros((ranks, item.judge_EB.shape[1]))
    np.add.at(load_RB, rank_E, item.judge_EB)
    seen_R = np.bincount(rank_E, weights=item.load_E, minlength=ranks)
    speed_R = problem.cluster.speed_R
    return Candidate(
        touched=cost / item.tokens,
        par=float(par(load_RB.T, speed_R).mean()),
        par_seen=float(par(seen_R, speed_R)),
        placement=rank_E,
    )


def _anneal(
    problem: PlacementProblem,
    item: _Layer,
    begin_E: IntArray,
    room_R: IntArray | None,
    node_weight: float,
    price: float,
    share: float,
    rng: np.random.Generator,
) -> IntArray:
    experts, top_k = problem.profile.model.num_experts, item.sets.expert_HK.shape[1]
    # one exchange changes the sets of two experts: that is the natural unit of temperature
    unit = item.tokens * top_k / experts * (1 + node_weight)
    speed_R = problem.cluster.speed_R
    slow_R = np.ones(problem.cluster.num_ranks) if speed_R is None else speed_R.mean() / speed_R
    # an empty slot is an expert of no load and in no set: exchanging it with one moves that one alone
    empty = np.zeros(0, dtype=np.int64)
    if room_R is not None:
        empty = np.repeat(np.arange(len(room_R)), room_R - np.bincount(begin_E, minlength=len(room_R)))
    found_E, _ = anneal_layer(
        np.concatenate((begin_E, empty)),
        problem.cluster.node_R,
        slow_R,
        experts,
        np.pad(item.draw_EB, ((0, len(empty)), (0, 0))),
        item.sets.expert_HK,
        item.sets.weight_H,
        np.pad(item.first_E, (0, len(empty)), mode="edge"),
        item.set_I,
        np.pad(item.pair_EE, (0, len(empty))),
        node_weight,
        price * item.tokens,
        max(1_000, int(item.steps * share)),
        0.24 * unit,
        0.008 * unit,
        rng,
    )
    return found_E[:experts]


def _meets(chosen: list[Candidate], cap: float, cap_seen: float) -> bool:
    par_seen = float(np.mean([candidate.par_seen for candidate in chosen]))
    return par_seen <= cap_seen + 1e-9 and float(np.mean([candidate.par for candidate in chosen])) <= cap + 1e-9


def _cost(chosen: list[Candidate]) -> float:
    return float(np.mean([candidate.touched for candidate in chosen]))
