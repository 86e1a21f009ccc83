"""The CP-SAT model of a few small layers, and its search: each layer alone, then together where a load cap joins them.

    x[e,r]  expert e lives on rank r              sum_r x[e,r] = 1, sum_e x[e,r] = C, C = E / R
    y[h,r]  expert set h touches rank r           y[h,r] >= x[e,r] for e in h
    s[e,f]  experts e and f live on one rank      sum_f s[e,f] = C - 1
    z       the largest rank load of a layer      z >= sum_e load_e x[e,r]
    cap     mean over layers of z / mean load <= max_par

The pairs s do not change the problem; they give the bound its strength. Without them the relaxation spreads every
expert evenly over the ranks and touches one rank a token. With them, a set of k experts in groups of sizes g touches
sum 1 / g_e ranks, and 1 / g lies above its chords through t and t + 1, so for every t:

    t (t + 1) sum_r y[h,r] >= 2 t k - 2 sum_{e<f in h} s[e,f]

Legend: L layers, E logical experts, R ranks, H expert sets, K top-k.
"""

import math
import time
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["CpsatAnswer", "LayerModel", "search_layers"]

LEAST_SHARE_S = 0.05
MOST_PAIRED_EXPERTS = 64
"""Beyond it the E^2 R clauses of the pairs cost more time to build than their bound is worth."""

OBJECTIVE_SCALE, CAP_SCALE = 2**30, 2**50
TOLERANCE = 1e-9


@dataclass(frozen=True, slots=True)
class LayerModel:
    """One layer: tokens per expert, and its expert sets with their tokens (None: the largest load is minimised)."""

    load_E: npt.NDArray[np.int64]
    expert_HK: npt.NDArray[np.int16] | None = None
    weight_H: npt.NDArray[np.int64] | None = None

    def count(self, rank_E: npt.NDArray[np.int64], num_ranks: int) -> int:
        """Ranks touched, or the largest load, of a placement in tokens: counted without the model's y and z."""
        if self.expert_HK is None or self.weight_H is None:
            return int(np.bincount(rank_E, weights=self.load_E, minlength=num_ranks).max())
        touched_HR = np.zeros((len(self.weight_H), num_ranks), dtype=np.int64)
        row_N, place_N = np.nonzero(self.expert_HK >= 0)
        touched_HR[row_N, rank_E[self.expert_HK[row_N, place_N]]] = 1
        return int(touched_HR.sum(axis=1) @ self.weight_H)

    def floor(self, num_ranks: int) -> int:
        """What no placement goes below: k experts touch at least k / C ranks; a mean is at most its maximum."""
        if self.expert_HK is None or self.weight_H is None:
            return max(-(-int(self.load_E.sum()) // num_ranks), int(self.load_E.max()))
        least_H = -(-(self.expert_HK >= 0).sum(axis=1) // (len(self.load_E) // num_ranks))
        return int(least_H @ self.weight_H)

    def unit(self, num_ranks: int) -> float:
        """What one token of `count` is worth: 1 / tokens of the sets, or 1 / mean rank load."""
        if self.weight_H is not None:
            return 1.0 / max(1, int(self.weight_H.sum()))
        return num_ranks / max(1, int(self.load_E.sum()))

    def par(self, rank_E: npt.NDArray[np.int64], num_ranks: int) -> float:
        """Largest over mean rank load; 1 where nothing was routed."""
        load_R = np.bincount(rank_E, weights=self.load_E, minlength=num_ranks)
        return float(load_R.max() / load_R.mean()) if load_R.any() else 1.0


@dataclass(frozen=True, slots=True)
class CpsatAnswer:
    """`state` is solved, infeasible, unknown (nothing found in time) or what CP-SAT said of a model it refused.

    `objective` and `bound` are means over layers in the unit of `LayerModel.unit`; `proven` says that no placement is
    better, `note` how that was shown.
    """

    state: str
    rank_LE: npt.NDArray[np.int64] | None = None
    objective: float = 0.0
    bound: float = 0.0
    proven: bool = False
    note: str = ""


def search_layers(
    layers: list[LayerModel], num_ranks: int, max_par: float | None, time_limit_s: float, seed: int, workers: int
) -> CpsatAnswer:
    """The best placement of the layers whose mean PAR is at most `max_par`, with a bound no placement goes below.

    The layers are first solved one by one without the cap, which bounds the capped problem from below and is its
    answer where the placements happen to meet the cap; the other half of the time goes to one model of all layers.
    """
    started = time.perf_counter()
    if max_par is not None and _least_par(layers, num_ranks) > max_par + TOLERANCE:
        return CpsatAnswer("infeasible")
    alone_s = time_limit_s if max_par is None else time_limit_s / 2
    ranks_LE, bound_L = [], []
    for number, layer in enumerate(layers):
        left_s = alone_s - (time.perf_counter() - started)
        control = (max(LEAST_SHARE_S, left_s / (len(layers) - number)), seed, workers)
        state, rank_1E, bound = _search([layer], num_ranks, None, [_lightest(layer.load_E, num_ranks)], None, control)
        if rank_1E is None:
            return CpsatAnswer(state)
        ranks_LE.append(rank_1E[0])
        bound_L.append(bound)
    units = [layer.unit(num_ranks) for layer in layers]
    mean_bound = float(np.mean([bound * unit for bound, unit in zip(bound_L, units, strict=True)]))
    if max_par is None or _mean_par(layers, ranks_LE, num_ranks) <= max_par + TOLERANCE:
        counts = [layer.count(rank_E, num_ranks) for layer, rank_E in zip(layers, ranks_LE, strict=True)]
        proven = sum(count == bound for count, bound in zip(counts, bound_L, strict=True))
        note = f"{proven} of {len(layers)} layers proven optimal"
        return _solved(layers, ranks_LE, num_ranks, mean_bound, proven == len(layers), note)

    start_LE = _start_under_cap(layers, ranks_LE, num_ranks, max_par)
    control = (max(LEAST_SHARE_S, time_limit_s - (time.perf_counter() - started)), seed, workers)
    state, joint_LE, joint_bound = _search(layers, num_ranks, max_par, start_LE, bound_L, control)
    if joint_LE is None:
        return CpsatAnswer(state)
    weights, scale = _objective_weights(layers, num_ranks)
    mean_bound = max(mean_bound, joint_bound / scale / len(layers))
    parts = zip(weights, layers, joint_LE, strict=True)
    proven_joint = joint_bound == sum(weight * layer.count(rank_E, num_ranks) for weight, layer, rank_E in parts)
    note = "layers solved together under the cap on their mean PAR"
    return _solved(layers, joint_LE, num_ranks, mean_bound, proven_joint, note)


def _solved(
    layers: list[LayerModel],
    ranks_LE: list[npt.NDArray[np.int64]],
    num_ranks: int,
    bound: float,
    proven: bool,
    note: str,
) -> CpsatAnswer:
    parts = zip(layers, ranks_LE, strict=True)
    objective = float(np.mean([layer.count(rank_E, num_ranks) * layer.unit(num_ranks) for layer, rank_E in parts]))
    return CpsatAnswer("solved", np.array(ranks_LE), objective, min(bound, objective), proven, note)


def _least_par(layers: list[LayerModel], num_ranks: int) -> float:
    """What the heaviest experts alone force on the mean PAR."""
    shares = [int(layer.load_E.max()) * num_ranks / max(1, int(layer.load_E.sum())) for layer in layers]
    return float(np.mean([max(1.0, share) for share in shares]))


def _mean_par(layers: list[LayerModel], ranks_LE: list[npt.NDArray[np.int64]], num_ranks: int) -> float:
    return float(np.mean([layer.par(r, num_ranks) for layer, r in zip(layers, ranks_LE, strict=True)]))


def _lightest(load_E: npt.NDArray[np.int64], num_ranks: int) -> npt.NDArray[np.int64]:
    """Heaviest expert first, each to the least loaded rank with a free slot (the lowest number among equals)."""
    rank_E = np.zeros(len(load_E), dtype=np.int64)
    load_R = np.zeros(num_ranks, dtype=np.int64)
    free_R = np.full(num_ranks, len(load_E) // num_ranks)
    for expert in np.argsort(-load_E, kind="stable").tolist():
        rank = min(np.flatnonzero(free_R).tolist(), key=lambda rank: (load_R[rank], rank))
        rank_E[expert] = rank
        load_R[rank] += load_E[expert]
        free_R[rank] -= 1
    return rank_E


def _start_under_cap(
    layers: list[LayerModel], ranks_LE: list[npt.NDArray[np.int64]], num_ranks: int, max_par: float
) -> list[npt.NDArray[np.int64]]:
    """The lightest placement of every layer, then those found alone, dearest in PAR last, as far as the cap allows."""
    start_LE = [_lightest(layer.load_E, num_ranks) for layer in layers]
    parts = zip(layers, ranks_LE, start_LE, strict=True)
    extra_L = [layer.par(alone, num_ranks) - layer.par(light, num_ranks) for layer, alone, light in parts]
    for row in np.argsort(extra_L, kind="stable").tolist():
        light, start_LE[row] = start_LE[row], ranks_LE[row]
        if _mean_par(layers, start_LE, num_ranks) > max_par + TOLERANCE:
            start_LE[row] = light
    return start_LE


def _search(
    layers: list[LayerModel],
    num_ranks: int,
    max_par: float | None,
    start_LE: list[npt.NDArray[np.int64]],
    bound_L: list[int] | None,
    control: tuple[float, int, int],
) -> tuple[str, list[npt.NDArray[np.int64]] | None, int]:
    """One CP-SAT run over these layers: state, placement (no worse than a start within the cap), whole-number bound."""
    from ortools.sat.python import cp_model

    time_limit_s, seed, workers = control
    started = time.perf_counter()
    model: Any = cp_model.CpModel()
    lives = [_place(model, layer, num_ranks) for layer in layers]
    counts = [_objective(model, layer, x, num_ranks) for layer, x in zip(layers, lives, strict=True)]
    weights, _ = _objective_weights(layers, num_ranks)
    if bound_L is not None:
        for count, least in zip(counts, bound_L, strict=True):
            model.add(count >= least)
    if max_par is not None:
        _cap(model, layers, lives, num_ranks, max_par)
    model.minimize(sum(weight * count for weight, count in zip(weights, counts, strict=True)))
    for x, start_E in zip(lives, start_LE, strict=True):
        for row, start in zip(x, start_E.tolist(), strict=True):
            for rank, variable in enumerate(row):
                model.add_hint(variable, int(start == rank))

    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = max(LEAST_SHARE_S, time_limit_s - (time.perf_counter() - started))
    solver.parameters.num_workers = workers
    solver.parameters.random_seed = seed % 2**31
    solver.parameters.linearization_level = 2
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return "infeasible", None, 0
    if status == cp_model.MODEL_INVALID:
        return f"CP-SAT refused the model: {model.validate()}", None, 0

    found = [start_LE]
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found.insert(0, [np.array([[solver.value(v) for v in row] for row in x]).argmax(axis=1) for x in lives])
    limit = math.inf if max_par is None else max_par + TOLERANCE
    found = [ranks_LE for ranks_LE in found if _mean_par(layers, ranks_LE, num_ranks) <= limit]
    if not found:
        return "unknown", None, 0

    def cost(ranks_LE: list[npt.NDArray[np.int64]]) -> int:
        parts = zip(weights, layers, ranks_LE, strict=True)
        return sum(weight * layer.count(rank_E, num_ranks) for weight, layer, rank_E in parts)

    # a search cut short may return worse than its hint
    best_LE = min(found, key=cost)
    floor = sum(weight * layer.floor(num_ranks) for weight, layer in zip(weights, layers, strict=True))
    return "solved", best_LE, min(cost(best_LE), math.ceil(max(floor, solver.best_objective_bound - 1e-6)))


def _objective_weights(layers: list[LayerModel], num_ranks: int) -> tuple[list[int], float]:
    """Whole-number weights of the layers' counts, rounded down so that bounds hold, and what divides them to units."""
    unit_L = [layer.unit(num_ranks) for layer in layers]
    if len(set(unit_L)) == 1:
        return [1] * len(layers), 1.0 / unit_L[0]
    scale = OBJECTIVE_SCALE / max(unit_L)
    return [math.floor(unit * scale) for unit in unit_L], scale


def _place(model: Any, layer: LayerModel, num_ranks: int) -> list[list[Any]]:
    experts = len(layer.load_E)
    x: list[list[Any]] = [[] for _ in range(experts)]
    for place, expert in enumerate(np.argsort(-layer.load_E, kind="stable").tolist()):
        x[expert] = [model.new_bool_var("") for _ in range(num_ranks)]
        model.add_exactly_one(x[expert])
        # equal ranks may be renamed: number them by their heaviest expert
        for rank in range(place + 1, num_ranks):
            model.add(x[expert][rank] == 0)
    for rank in range(num_ranks):
        model.add(sum(row[rank] for row in x) == experts // num_ranks)
    return x


def _largest_load(model: Any, layer: LayerModel, x: list[list[Any]], num_ranks: int) -> Any:
    total = int(layer.load_E.sum())
    least = max(-(-total // num_ranks), int(layer.load_E.max()))
    largest = model.new_int_var(least, total, "")
    for rank in range(num_ranks):
        model.add(sum(int(load) * row[rank] for load, row in zip(layer.load_E, x, strict=True)) <= largest)
    return largest


def _cap(model: Any, layers: list[LayerModel], lives: list[list[list[Any]]], num_ranks: int, max_par: float) -> None:
    loaded = [(layer, x, int(layer.load_E.sum())) for layer, x in zip(layers, lives, strict=True) if layer.load_E.any()]
    totals = [total for _, _, total in loaded]
    scale = totals[0] if len(set(totals)) == 1 else CAP_SCALE
    weight_L = [round(scale / total) for total in totals]
    # layers without tokens have PAR 1; what is forgiven is the rounding of weights, and `_search` checks afterwards
    room = (max_par + TOLERANCE) * len(layers) - (len(layers) - len(loaded))
    forgiven = 0 if scale == totals[0] else sum(totals)
    largest = [_largest_load(model, layer, x, num_ranks) for layer, x, _ in loaded]
    model.add(
        sum(w * z for w, z in zip(weight_L, largest, strict=True)) <= math.floor(room * scale / num_ranks) + forgiven
    )


def _objective(model: Any, layer: LayerModel, x: list[list[Any]], num_ranks: int) -> Any:
    if layer.expert_HK is None or layer.weight_H is None:
        return _largest_load(model, layer, x, num_ranks)
    slots = len(x) // num_ranks
    chosen_H = [sorted({expert for expert in row if expert >= 0}) for row in layer.expert_HK.tolist()]
    pairs: dict[tuple[int, int], Any] = {}
    if len(x) <= MOST_PAIRED_EXPERTS and max(map(len, chosen_H), default=0) > 1:
        pairs = _pairs(model, x, slots)
    terms: list[Any] = []
    for chosen, weight in zip(chosen_H, layer.weight_H.tolist(), strict=True):
        if len(chosen) < 2:
            terms.append(int(weight) * len(chosen))
        elif len(chosen) == 2 and pairs:
            terms.append(int(weight) * (2 - pairs[chosen[0], chosen[1]]))
        else:
            terms.append(int(weight) * _touched(model, x, chosen, pairs, slots))
    return sum(terms) + model.new_constant(0)


def _pairs(model: Any, x: list[list[Any]], slots: int) -> dict[tuple[int, int], Any]:
    pairs = {(e, f): model.new_bool_var("") for e, f in combinations(range(len(x)), 2)}
    for (e, f), together in pairs.items():
        for on_e, on_f in zip(x[e], x[f], strict=True):
            model.add_bool_or(~on_e, ~on_f, together)
            model.add_bool_or(~on_e, on_f, ~together)
            model.add_bool_or(on_e, ~on_f, ~together)
    for expert in range(len(x)):
        model.add(sum(together for pair, together in pairs.items() if expert in pair) == slots - 1)
    return pairs


def _touched(model: Any, x: list[list[Any]], chosen: list[int], pairs: dict[tuple[int, int], Any], slots: int) -> Any:
    touches = [model.new_bool_var("") for _ in x[0]]
    for rank, touch in enumerate(touches):
        for expert in chosen:
            model.add_implication(x[expert][rank], touch)
    model.add(sum(touches) >= -(-len(chosen) // slots))
    if pairs:
        together = sum(pairs[pair] for pair in combinations(chosen, 2))
        for t in range(1, min(len(chosen), slots)):
            model.add(t * (t + 1) * sum(touches) + 2 * together >= 2 * t * len(chosen))
    return sum(touches)
