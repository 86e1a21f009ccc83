"""Exact placement of small layers with CP-SAT: fewest ranks touched under equal slots and a load cap, no replicas.

Per layer, with x[e,r] = expert e lives on rank r and y[h,r] = expert set h touches rank r:

    min  sum_h weight_h sum_r y[h,r]
    s.t. sum_r x[e,r] = 1,  sum_e x[e,r] = E / R,  sum_e load_e x[e,r] <= max_par * total / R,
         y[h,r] >= x[e,r] for e in h

Layers share nothing, so each is a model of its own. Where the profile has no expert sets the largest load is minimised.

Legend: L routing sites, E logical experts, P slots, R ranks, H expert sets, K top-k.
"""

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from placer.core.errors import SolverError, UsageError
from placer.core.plan import canonical_slots
from placer.core.problem import PlacementProblem
from solvers.isolate import IsolationTimeoutError, run_isolated
from solvers.result import SolveResult

if TYPE_CHECKING:
    from ortools.sat.python import cp_model

__all__ = ["LayerAnswer", "LayerModel", "solve_cpsat", "solve_layers"]

NAME = "cpsat"
LEAST_SHARE_S = 0.05


@dataclass(frozen=True, slots=True)
class LayerModel:
    """One layer: tokens per expert, the most tokens a rank may get (None: no cap), its expert sets (None: no sets)."""

    load_E: npt.NDArray[np.int64]
    max_load: int | None
    expert_HK: npt.NDArray[np.int16] | None = None
    weight_H: npt.NDArray[np.int64] | None = None


@dataclass(frozen=True, slots=True)
class LayerAnswer:
    """Rank of each expert (None where nothing was found), and objective and bound in tokens."""

    state: str
    rank_E: npt.NDArray[np.int64] | None = None
    objective: int = 0
    bound: int = 0


def solve_cpsat(problem: PlacementProblem, *, time_limit_s: float, seed: int = 0, workers: int = 1) -> SolveResult:
    """The placement with the fewest ranks touched, and the bound that CP-SAT proved.

    Parameters
    ----------
    problem
        equal slots and no replicas (`redundant` 0); `max_par` is a hard cap on every layer. With expert sets the
        objective is "ranks_touched" (mean over layers, and over the tokens that the sets stand for, of the distinct
        ranks of a token's experts), without them "par" (mean over layers of max / mean rank load)
    time_limit_s
        seconds shared by all layers; the process is killed at 1.5 times that plus 5 seconds
    seed, workers
        passed to CP-SAT; one worker that ends before its limit gives the same placement for the same seed

    Returns status "infeasible" when a layer provably has no placement under the cap (the message names it), "error"
    with stopped_by "time_limit" when a layer has none yet, else "solved", "optimal" if every layer is proven.

    Raises
    ------
    UsageError
        for replicas, a limit that is no positive number, or workers below 1

    Notes
    -----
    Complexity: E * R + H * R booleans and H * K * R implications a layer; NP-hard. An oracle for about 16 experts on 4
    ranks; beyond 64 experts expect a bound and a placement that a swap search beats.
    Guarantee: bound <= optimum <= objective.
    """
    if problem.redundant:
        raise UsageError(f"cpsat places no replicas and redundant is {problem.redundant}; use --redundant 0")
    if workers < 1:
        raise UsageError(f"workers is {workers}; give 1 or more")
    started = time.perf_counter()
    layers = _layer_models(problem)
    arguments = (layers, problem.cluster.num_ranks, time_limit_s, seed, workers)
    try:
        answers = run_isolated(solve_layers, arguments, time_limit_s=time_limit_s)
    except IsolationTimeoutError as error:
        return _failed("time_limit", str(error), started)
    except SolverError as error:
        return _failed("error", str(error), started)
    return _assemble(problem, layers, answers, started)


def solve_layers(
    layers: list[LayerModel], num_ranks: int, time_limit_s: float, seed: int, workers: int
) -> list[LayerAnswer]:
    """One answer per layer in order, each given an equal share of the time left; stops at the first without one."""
    deadline = time.perf_counter() + time_limit_s
    answers: list[LayerAnswer] = []
    for number, layer in enumerate(layers):
        share_s = max(LEAST_SHARE_S, (deadline - time.perf_counter()) / (len(layers) - number))
        answers.append(_solve_layer(layer, num_ranks, share_s, seed, workers))
        if answers[-1].rank_E is None:
            break
    return answers


def _layer_models(problem: PlacementProblem) -> list[LayerModel]:
    profile, ranks = problem.profile, problem.cluster.num_ranks
    models = []
    for row, load_E in enumerate(profile.load_LE):
        cap = None
        if problem.max_par is not None:
            # the small term forgives the rounding of a cap written in decimals, never a whole token
            cap = math.floor(problem.max_par * int(load_E.sum()) / ranks + 1e-9)
        if profile.sets:
            models.append(LayerModel(load_E, cap, profile.sets[row].expert_HK, profile.sets[row].weight_H))
        else:
            models.append(LayerModel(load_E, cap))
    return models


def _solve_layer(layer: LayerModel, num_ranks: int, time_limit_s: float, seed: int, workers: int) -> LayerAnswer:
    from ortools.sat.python import cp_model

    started = time.perf_counter()
    model = cp_model.CpModel()
    experts = len(layer.load_E)
    by_load = np.argsort(-layer.load_E, kind="stable").tolist()
    lives: list[list[cp_model.IntVar]] = [[] for _ in range(experts)]
    for place, expert in enumerate(by_load):
        lives[expert] = [model.new_bool_var(f"x{expert}_{rank}") for rank in range(num_ranks)]
        model.add_exactly_one(lives[expert])
        # equal ranks may be renamed: number them by their heaviest expert
        for rank in range(place + 1, num_ranks):
            model.add(lives[expert][rank] == 0)
    for rank in range(num_ranks):
        model.add(sum(lives[expert][rank] for expert in range(experts)) == experts // num_ranks)
        if layer.max_load is not None:
            model.add(_rank_load(lives, layer, rank) <= layer.max_load)
    if layer.expert_HK is None or layer.weight_H is None:
        largest = model.new_int_var(-(-int(layer.load_E.sum()) // num_ranks), int(layer.load_E.sum()), "largest")
        for rank in range(num_ranks):
            model.add(_rank_load(lives, layer, rank) <= largest)
        model.minimize(largest)
    else:
        model.minimize(_ranks_touched(model, lives, layer.expert_HK, layer.weight_H, experts // num_ranks))

    start_E = _start(layer.load_E, num_ranks)
    for expert, row in enumerate(lives):
        for rank, x in enumerate(row):
            model.add_hint(x, int(start_E[expert] == rank))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = max(LEAST_SHARE_S, time_limit_s - (time.perf_counter() - started))
    solver.parameters.num_workers = workers
    solver.parameters.random_seed = seed % 2**31
    status = solver.solve(model)
    if status == cp_model.INFEASIBLE:
        return LayerAnswer("infeasible")
    if status == cp_model.MODEL_INVALID:
        return LayerAnswer(f"invalid: {model.validate()}")
    found = [start_E] if _fits(layer, start_E, num_ranks) else []
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found.append(np.array([[solver.value(x) for x in row] for row in lives]).argmax(axis=1))
    if not found:
        return LayerAnswer("unknown")
    # the solver's own first, so that it wins a tie; a search cut short may return worse than its hint
    rank_E = min(reversed(found), key=lambda rank_E: _count(layer, rank_E, num_ranks))
    objective = _count(layer, rank_E, num_ranks)
    bound = min(objective, math.ceil(max(_floor(layer, num_ranks), solver.best_objective_bound - 1e-6)))
    return LayerAnswer("optimal" if bound == objective else "feasible", rank_E, objective, bound)


def _start(load_E: npt.NDArray[np.int64], num_ranks: int) -> npt.NDArray[np.int64]:
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


def _fits(layer: LayerModel, rank_E: npt.NDArray[np.int64], num_ranks: int) -> bool:
    load_R = np.bincount(rank_E, weights=layer.load_E, minlength=num_ranks)
    return layer.max_load is None or bool(load_R.max() <= layer.max_load)


def _count(layer: LayerModel, rank_E: npt.NDArray[np.int64], num_ranks: int) -> int:
    """The objective of a placement, counted anew: a stopped solver may leave y above x."""
    if layer.expert_HK is None or layer.weight_H is None:
        return int(np.bincount(rank_E, weights=layer.load_E, minlength=num_ranks).max())
    touched_HR = np.zeros((len(layer.weight_H), num_ranks), dtype=np.int64)
    row_N, place_N = np.nonzero(layer.expert_HK >= 0)
    touched_HR[row_N, rank_E[layer.expert_HK[row_N, place_N]]] = 1
    return int(touched_HR.sum(axis=1) @ layer.weight_H)


def _floor(layer: LayerModel, num_ranks: int) -> int:
    """What no placement goes below: k experts touch at least k / slots-of-a-rank ranks; a mean is below its maximum."""
    if layer.expert_HK is None or layer.weight_H is None:
        return max(-(-int(layer.load_E.sum()) // num_ranks), int(layer.load_E.max()))
    least_H = -(-(layer.expert_HK >= 0).sum(axis=1) // (len(layer.load_E) // num_ranks))
    return int(least_H @ layer.weight_H)


def _rank_load(lives: "list[list[cp_model.IntVar]]", layer: LayerModel, rank: int) -> "cp_model.LinearExprT":
    return sum(int(load) * lives[expert][rank] for expert, load in enumerate(layer.load_E))


def _ranks_touched(
    model: "cp_model.CpModel",
    lives: "list[list[cp_model.IntVar]]",
    expert_HK: npt.NDArray[np.int16],
    weight_H: npt.NDArray[np.int64],
    slots_per_rank: int,
) -> "cp_model.LinearExprT":
    ranks = len(lives[0])
    terms = []
    for chosen_K, weight in zip(expert_HK.tolist(), weight_H.tolist(), strict=True):
        chosen = sorted({expert for expert in chosen_K if expert >= 0})
        if not chosen or not weight:
            continue
        touches = lives[chosen[0]] if len(chosen) == 1 else [model.new_bool_var("") for _ in range(ranks)]
        if len(chosen) > 1:
            for rank in range(ranks):
                for expert in chosen:
                    model.add_implication(lives[expert][rank], touches[rank])
            model.add(sum(touches) >= -(-len(chosen) // slots_per_rank))
        terms.append(int(weight) * sum(touches))
    return sum(terms)


def _assemble(
    problem: PlacementProblem, layers: list[LayerModel], answers: list[LayerAnswer], started: float
) -> SolveResult:
    ranks, ids = problem.cluster.num_ranks, problem.profile.model.moe_layers
    last, row = answers[-1], len(answers) - 1
    if last.rank_E is None:
        where = f"layer {ids[row]} (row {row})"
        if last.state == "infeasible":
            load_E = layers[row].load_E
            least = int(load_E.max()) * ranks / max(1, int(load_E.sum()))
            return SolveResult(
                solver=NAME,
                status="infeasible",
                stopped_by="infeasible",
                seconds=time.perf_counter() - started,
                message=f"{where}: no placement with equal slots keeps max / mean load within {problem.max_par} "
                f"(its heaviest expert alone needs {least:.4f}); raise --max-par",
            )
        if last.state == "unknown":
            return _failed("time_limit", f"{where}: no placement found in its share of the time limit", started)
        return _failed("error", f"{where}: CP-SAT refused the model ({last.state})", started)
    rank_LE = np.array([answer.rank_E for answer in answers])
    slot_expert_LP = canonical_slots(np.argsort(rank_LE, axis=1, kind="stable").astype(np.int64), ranks)
    touched = bool(problem.profile.sets)
    scale_L = [_unit(layer, ranks, touched=touched) for layer in layers]
    proven = all(answer.state == "optimal" for answer in answers)
    return SolveResult(
        solver=NAME,
        status="solved",
        stopped_by="optimal" if proven else "time_limit",
        slot_expert_LP=slot_expert_LP,
        objective_name="ranks_touched" if touched else "par",
        objective=float(np.mean([a.objective * s for a, s in zip(answers, scale_L, strict=True)])),
        bound=float(np.mean([a.bound * s for a, s in zip(answers, scale_L, strict=True)])),
        bound_by=NAME,
        seconds=time.perf_counter() - started,
        message=f"{sum(a.state == 'optimal' for a in answers)} of {len(answers)} layers proven optimal",
    )


def _unit(layer: LayerModel, ranks: int, *, touched: bool) -> float:
    """What one token of a layer's objective is in the unit reported."""
    if touched and layer.weight_H is not None:
        return 1.0 / max(1, int(layer.weight_H.sum()))
    return ranks / max(1, int(layer.load_E.sum()))


def _failed(stopped_by: str, message: str, started: float) -> SolveResult:
    return SolveResult(
        solver=NAME,
        status="error",
        stopped_by="time_limit" if stopped_by == "time_limit" else "error",
        seconds=time.perf_counter() - started,
        message=message,
    )
