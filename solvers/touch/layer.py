"""One layer of a touching search without replicas: ready to anneal, and judged exactly.

Legend: L layers, H expert sets, E experts, K top-k, R ranks, B draws, W windows, P slots, I (expert, set) incidences.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.evaluate import par
from placer.core.problem import PlacementProblem
from placer.core.profile import ExpertSets
from solvers.touch.anneal import anneal_layer, incidence, pair_weights, touched
from solvers.touch.frontier import Candidate

__all__ = ["PAIRED_EXPERTS", "TouchLayer", "better", "candidate", "prepare"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

VISITS_PER_LAYER = 8e8
PAIR_STEPS = 1_000
HOT, WARM, COLD = 0.24, 0.08, 0.008
"""First temperature, that for layers which start from an annealing on pairs, and the last; in units of one exchange."""

PAIRED_EXPERTS = 64
"""Layers of so many experts start from an annealing on pairs alone, which looks at no sets and so costs little."""


@dataclass(frozen=True, slots=True)
class TouchLayer:
    """What annealing one layer takes. The first `draws` columns of draw_EB are draws of requests, the rest windows."""

    sets: ExpertSets
    first_E: IntArray
    set_I: npt.NDArray[np.int32]
    pair_EE: FloatArray
    draw_EB: FloatArray
    draws: int
    judge_EB: FloatArray
    window_EW: FloatArray
    load_E: IntArray
    tokens: int
    steps: int


def prepare(
    problem: PlacementProblem,
    layer: int,
    draw_EB: FloatArray,
    draws: int,
    judge_EB: FloatArray,
    window_EW: FloatArray,
) -> TouchLayer:
    """The layer with its incidences and pairs; `judge_EB` and `window_EW` are what its candidates are judged on."""
    sets = problem.profile.sets[layer]
    experts = problem.profile.model.num_experts
    first_E, set_I = incidence(sets.expert_HK, experts)
    visits = max(1.0, 2.0 * len(set_I) / experts)
    return TouchLayer(
        sets=sets,
        first_E=first_E,
        set_I=set_I,
        pair_EE=pair_weights(sets.expert_HK, sets.weight_H, experts),
        draw_EB=np.ascontiguousarray(draw_EB),
        draws=draws,
        judge_EB=judge_EB,
        window_EW=window_EW,
        load_E=problem.profile.load_LE[layer],
        tokens=max(1, int(sets.weight_H.sum())),
        steps=int(np.clip(VISITS_PER_LAYER / visits, 2_000, 12_000 * experts)),
    )


def candidate(problem: PlacementProblem, item: TouchLayer, rank_E: IntArray, node_weight: float) -> Candidate:
    """The candidate that a placement is: its cost, PAR on the judging draws, as seen, and in windows."""
    ranks, node_R = problem.cluster.num_ranks, problem.cluster.node_R
    cost = touched(item.sets.expert_HK, item.sets.weight_H, rank_E, ranks)
    if node_weight > 0:
        nodes = touched(item.sets.expert_HK, item.sets.weight_H, node_R[rank_E], problem.cluster.nodes)
        cost += node_weight * nodes
    load_RB = np.zeros((ranks, item.judge_EB.shape[1]))
    np.add.at(load_RB, rank_E, item.judge_EB)
    load_RW = np.zeros((ranks, item.window_EW.shape[1]))
    np.add.at(load_RW, rank_E, item.window_EW)
    speed_R = problem.cluster.speed_R
    return Candidate(
        touched=cost / item.tokens,
        par=float(par(load_RB.T, speed_R).mean()),
        par_seen=float(par(np.bincount(rank_E, weights=item.load_E, minlength=ranks), speed_R)),
        placement=rank_E,
        window=float(par(load_RW.T, speed_R).mean()),
    )


def better(
    problem: PlacementProblem,
    item: TouchLayer,
    begin_E: IntArray,
    room_R: IntArray | None,
    node_weight: float,
    prices: tuple[float, float],
    pair_value: float,
    share: float,
    rng: np.random.Generator,
) -> IntArray:
    """A better placement of one layer at these prices of PAR and of window PAR; on pairs alone with a `pair_value`."""
    experts, top_k = problem.profile.model.num_experts, item.sets.expert_HK.shape[1]
    # one exchange changes the sets of two experts: that is the natural unit of temperature; on pairs, it changes an
    # expert's company
    unit, hot, cold = item.tokens * top_k / experts * (1 + node_weight), HOT, COLD
    if pair_value > 0:
        company = max(1, len(begin_E) // problem.cluster.num_ranks - 1)
        unit, hot, cold = pair_value * float(np.sort(item.pair_EE, axis=1)[:, -company:].sum(axis=1).mean()), 0.3, 0.01
    elif experts >= PAIRED_EXPERTS:
        hot = WARM
    windows = item.draw_EB.shape[1] - item.draws
    price_B = np.repeat([prices[0] / item.draws, prices[1] / max(1, windows)], [item.draws, windows]) * item.tokens
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
        price_B,
        item.sets.expert_HK,
        item.sets.weight_H,
        np.pad(item.first_E, (0, len(empty)), mode="edge"),
        item.set_I,
        np.pad(item.pair_EE, (0, len(empty))),
        node_weight,
        pair_value,
        PAIR_STEPS * experts if pair_value > 0 else max(1_000, int(item.steps * share)),
        hot * unit,
        cold * unit,
        rng,
    )
    return found_E[:experts]
