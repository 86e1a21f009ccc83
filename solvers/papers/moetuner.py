"""MoETuner's two integer programs (Go & Mahajan, arXiv 2502.06643) in PuLP: balanced clusters, then clusters to ranks.

ILP 1, each layer alone:      min sum_c |T_c - mean|, T_c = tokens of cluster c; every expert in exactly one cluster.
ILP 2, all layers together:   min sum_l max over rank pairs of C[l,c,c'] / B[g,g'] * y[l,c,g] * y[l+1,c',g'],
                              one cluster per rank and layer; C = tokens that go from cluster c of l to c' of l + 1.

The printed ILP 1 asks for clusters of at least one expert; engines need equal ones, so `sizes="equal"` is the default.
A pair on one rank costs nothing, which makes ILP 2 worth solving on a uniform network too; there, with equal sizes, it
needs no integer program (`ilp2_uniform`). ILP 1 does not see the
flows, so the two are not optimal together: an oracle and a baseline, not the method to use.

Legend: L routing sites, E logical experts, P slots, R ranks, C clusters (as many as ranks).
"""

import time
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from placer.core.cluster import ClusterSpec
from placer.core.errors import SolverError, UsageError
from placer.core.plan import canonical_slots
from placer.core.problem import PlacementProblem
from solvers.exact.isolate import IsolationTimeoutError, run_isolated
from solvers.exact.pulp_run import Backend, State, run_program, value_of
from solvers.papers.ilp2_uniform import assign_ranks_uniform
from solvers.result import SolveResult, StoppedBy

__all__ = ["Settings", "Stage", "assign_ranks", "cluster_layer", "pair_gbytes_RR", "solve_moetuner"]

Sizes = Literal["equal", "nonempty"]

NAME = "moetuner"
LEAST_SHARE_S = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What both programs share. `capacity`: the experts of a cluster (sizes "equal") or the most of them."""

    capacity: int
    max_par: float | None = None
    backend: Backend = "highs"
    sizes: Sizes = "equal"
    relative_gap: float = 0.0


@dataclass(frozen=True, slots=True)
class Stage:
    """One integer program's answer: `value` (None where nothing was found), its objective, and a proven lower bound."""

    state: State
    value: npt.NDArray[np.int64] | None = None
    objective: float = 0.0
    bound: float = 0.0


def solve_moetuner(
    problem: PlacementProblem,
    *,
    time_limit_s: float,
    backend: Backend = "highs",
    sizes: Sizes = "equal",
    relative_gap: float = 0.0,
) -> SolveResult:
    """The two-stage placement, with objective "slowest_pair_ns": sum over layers of the slowest rank pair's transfer.

    Parameters
    ----------
    problem
        no replicas; `max_par`, which the paper does not have, caps every layer's clusters where that can be, and is
        then checked on the mean over layers
    time_limit_s
        half for ILP 1 (shared by the layers), the rest for ILP 2; the process is killed at 1.5 times that plus 5 s
    backend
        "highs" or "cbc"
    sizes
        "equal": E / R experts a rank in every layer. "nonempty": the paper's, at least 1 and at most the slots of a
        rank in a layer (`redundant` then gives room, not replicas, and `allow_empty_slots` must be set), and E * L / R
        over all layers
    relative_gap
        where each program may stop; the paper stops at 0.025

    Returns stopped_by "effort" when both stages ended by themselves and "time_limit" else, and no bound: those of the
    two programs, which `message` reports, bound neither each other nor other placements. Status "infeasible" means that
    the only layer provably has no clusters under the cap; "error" that nothing was found in time, or that the two
    stages end in a placement above the cap, or (sizes "nonempty" only) that ILP 2 has no solution for ILP 1's clusters.

    Raises
    ------
    UsageError
        for replicas, an unknown backend or sizes, or a profile of several layers without transitions
    DependencyError
        when CBC is not installed

    Notes
    -----
    Complexity: ILP 1 has R * E binaries a layer, ILP 2 L * R^2 binaries and L * R^3 rows; both are NP-hard and have
    weak relaxations. With equal sizes and one bandwidth ILP 2 takes O(L R^3) instead and is always optimal. Mixtral's
    32 layers of 8 experts on 4 ranks is the paper's own size.
    """
    settings = Settings(
        capacity=problem.slots_per_rank,
        max_par=problem.max_par,
        backend=backend,
        sizes=sizes,
        relative_gap=relative_gap,
    )
    _check(problem, settings)
    started = time.perf_counter()
    profile = problem.profile
    gbytes_RR = pair_gbytes_RR(problem.cluster) / profile.model.token_bytes
    arguments = (profile.load_LE, profile.transition_LEE, gbytes_RR, settings, time_limit_s)
    try:
        clusters, places = run_isolated(solve_stages, arguments, time_limit_s=time_limit_s)
    except IsolationTimeoutError as error:
        return _failed("time_limit", str(error), started)
    except SolverError as error:
        return _failed("error", str(error), started)
    if places is None:
        layer = profile.model.moe_layers[len(clusters) - 1]
        return _without_clusters(clusters[-1], f"layer {layer} (row {len(clusters) - 1})", problem, started)
    if places.value is None:
        if places.state == "infeasible":
            why = (
                "ILP 2: the clusters of ILP 1 cannot give every rank E * L / R experts over all layers; use equal sizes"
            )
            return _failed("infeasible", why, started)
        return _failed("time_limit", "ILP 2: no assignment found in the time left", started)
    rank_LE = np.array(
        [rank_C[stage.value] for rank_C, stage in zip(places.value, clusters, strict=True) if stage.value is not None]
    )
    par = _mean_par(profile.load_LE, rank_LE, problem.cluster.num_ranks)
    if problem.max_par is not None and par > problem.max_par + 1e-9:
        why = f"ILP 1 reaches a mean PAR of {par:.4f} and the cap is {problem.max_par}; raise --max-par, or use cpsat"
        return _failed("infeasible", why, started)
    proven = sum(stage.state == "optimal" for stage in clusters)
    ended = proven == len(clusters) and places.state == "optimal"
    return SolveResult(
        solver=NAME,
        status="solved",
        stopped_by="effort" if ended else "time_limit",
        slot_expert_LP=_slots(rank_LE, problem.cluster.num_ranks, problem.slots_per_rank),
        objective_name="slowest_pair_ns",
        objective=places.objective,
        seconds=time.perf_counter() - started,
        message=f"ILP 1: deviation {sum(s.objective for s in clusters):.0f} tokens, bound "
        f"{sum(s.bound for s in clusters):.0f}, {proven} of {len(clusters)} layers proven; ILP 2: "
        f"{places.objective:.0f} ns, bound {places.bound:.0f} ns for these clusters",
    )


def pair_gbytes_RR(cluster: ClusterSpec) -> npt.NDArray[np.float64]:
    """B, the bandwidth between two ranks in GB/s, (R, R); infinite on the diagonal, where nothing is sent."""
    node_R = cluster.node_R
    across = cluster.inter.gbytes_per_s
    if cluster.uplink is not None:
        across = min(across, cluster.uplink.gbytes_per_s)
    gbytes_RR = np.where(node_R[:, None] == node_R[None, :], float(cluster.intra.gbytes_per_s), float(across))
    np.fill_diagonal(gbytes_RR, np.inf)
    return gbytes_RR


def solve_stages(
    load_LE: npt.NDArray[np.int64],
    transition_LEE: npt.NDArray[np.int64] | None,
    tokens_per_ns_RR: npt.NDArray[np.float64],
    settings: Settings,
    time_limit_s: float,
) -> tuple[list[Stage], Stage | None]:
    """One Stage of ILP 1 per layer (stopping at the first without an answer), then ILP 2's (None if not reached)."""
    started = time.perf_counter()
    layers, ranks = len(load_LE), len(tokens_per_ns_RR)
    clusters: list[Stage] = []
    member_LEC = np.zeros((layers, load_LE.shape[1], ranks))
    for row, load_E in enumerate(load_LE):
        left_s = time_limit_s / 2 - (time.perf_counter() - started)
        share_s = max(LEAST_SHARE_S, left_s / (layers - row))
        stage = cluster_layer(load_E, ranks, settings, share_s)
        if stage.state == "infeasible" and layers > 1:
            # the cap is on the mean over layers: others may make up for this one
            stage = cluster_layer(load_E, ranks, replace(settings, max_par=None), share_s)
        clusters.append(stage)
        if clusters[-1].value is None:
            return clusters, None
        member_LEC[row] = np.eye(ranks)[clusters[-1].value]
    flow_LCC = np.zeros((layers - 1, ranks, ranks))
    if transition_LEE is not None:
        flow_LCC = member_LEC[:-1].transpose(0, 2, 1) @ transition_LEE @ member_LEC[1:]
    size_LC = member_LEC.sum(axis=1).astype(np.int64)
    if settings.sizes == "equal" and _one_rate(tokens_per_ns_RR):
        rank_LC, flow = assign_ranks_uniform(flow_LCC)
        slowest_ns = flow / float(tokens_per_ns_RR.min())
        return clusters, Stage("optimal", rank_LC, slowest_ns, slowest_ns)
    left_s = time_limit_s - (time.perf_counter() - started)
    return clusters, assign_ranks(flow_LCC, tokens_per_ns_RR, size_LC, settings, max(LEAST_SHARE_S, left_s))


def cluster_layer(load_E: npt.NDArray[np.int64], num_clusters: int, settings: Settings, time_limit_s: float) -> Stage:
    """ILP 1 for one layer: `value` int64 (E,) cluster of each expert, objective sum_c |T_c - mean| in tokens."""
    import pulp

    mean = float(load_E.sum()) / num_clusters
    scale = mean or 1.0
    program = pulp.LpProblem("clusters", pulp.LpMinimize)
    deviation_C = [program.add_variable(f"d{c}", lowBound=0) for c in range(num_clusters)]
    inside: list[dict[int, Any]] = [{} for _ in range(num_clusters)]
    for place, expert in enumerate(np.argsort(-load_E, kind="stable").tolist()):
        # clusters have no names yet: number them by their heaviest expert
        for c in range(min(place + 1, num_clusters)):
            inside[c][expert] = program.add_variable(f"x{c}_{expert}", cat=pulp.LpBinary)
    program += pulp.lpSum(deviation_C)
    for expert in range(len(load_E)):
        program += pulp.lpSum(members[expert] for members in inside if expert in members) == 1
    for deviation, members in zip(deviation_C, inside, strict=True):
        tokens = pulp.lpSum(float(load_E[expert]) / scale * x for expert, x in members.items())
        program += deviation >= tokens - mean / scale
        program += deviation >= mean / scale - tokens
        if settings.sizes == "equal":
            program += pulp.lpSum(members.values()) == settings.capacity
        else:
            program += pulp.lpSum(members.values()) >= 1
            program += pulp.lpSum(members.values()) <= settings.capacity
        if settings.max_par is not None:
            program += tokens <= settings.max_par * mean / scale
    state, bound = run_program(program, settings.backend, settings.relative_gap, time_limit_s)
    if state in ("infeasible", "none"):
        return Stage(state)
    chosen_CE = [[value_of(members.get(expert)) for expert in range(len(load_E))] for members in inside]
    cluster_E = np.argmax(chosen_CE, axis=0).astype(np.int64)
    size_C = np.bincount(cluster_E, minlength=num_clusters)
    if size_C.max() > settings.capacity or size_C.min() < (settings.capacity if settings.sizes == "equal" else 1):
        raise SolverError(
            f"{settings.backend} returned clusters of {size_C.tolist()} experts against the program's rows"
        )
    tokens_C = np.bincount(cluster_E, weights=load_E, minlength=num_clusters)
    return _stage(state, cluster_E, float(np.abs(tokens_C - mean).sum()), bound, scale)


def assign_ranks(
    flow_LCC: npt.NDArray[np.float64],
    rate_RR: npt.NDArray[np.float64],
    size_LC: npt.NDArray[np.int64],
    settings: Settings,
    time_limit_s: float,
) -> Stage:
    """ILP 2: `value` int64 (L, C) rank of each cluster; objective sum_l max over rank pairs of flow / rate.

    `flow_LCC` (L - 1, C, C) is what goes from cluster c of layer l to cluster c' of layer l + 1, `rate_RR` how much of
    it two ranks exchange per nanosecond (infinite on the diagonal), `size_LC` the experts of each cluster.
    """
    import pulp

    layers, ranks = size_LC.shape
    scale = float(flow_LCC.max(initial=0.0) / rate_RR.min()) or 1.0
    program = pulp.LpProblem("ranks", pulp.LpMinimize)
    on: Any = [
        [[program.add_variable(f"y{i}_{c}_{g}", cat=pulp.LpBinary) for g in range(ranks)] for c in range(ranks)]
        for i in range(layers)
    ]
    slowest = [program.add_variable(f"m{i}", lowBound=0) for i in range(layers - 1)]
    program += pulp.lpSum(slowest)
    for i in range(layers):
        for g in range(ranks):
            program += pulp.lpSum(on[i][g]) == 1
            program += pulp.lpSum(on[i][c][g] for c in range(ranks)) == 1
    # ranks of one node may be renamed, and so may whole nodes: name one rank, or all where there is one bandwidth
    for c in range(ranks if _one_rate(rate_RR) else 1):
        program += on[0][c][c] == 1
    if settings.sizes == "nonempty":
        for g in range(ranks):
            held = pulp.lpSum(int(size_LC[i, c]) * on[i][c][g] for i in range(layers) for c in range(ranks))
            program += held * ranks == int(size_LC.sum())
    for i in range(layers - 1):
        for c in range(ranks):
            for after in np.flatnonzero(flow_LCC[i, c]).tolist():
                time_RR = flow_LCC[i, c, after] / rate_RR / scale
                for g in range(ranks):
                    # tighter than one row per pair: all arrivals of `after` in one row
                    arrives = pulp.lpSum(float(t) * y for t, y in zip(time_RR[g], on[i + 1][after], strict=True))
                    program += slowest[i] >= arrives + float(time_RR[g].max()) * (on[i][c][g] - 1)
    state, bound = run_program(program, settings.backend, settings.relative_gap, time_limit_s)
    if state in ("infeasible", "none"):
        return Stage(state)
    rank_LC = np.array([[[value_of(y) for y in row] for row in layer] for layer in on]).argmax(axis=2).astype(np.int64)
    if not np.array_equal(np.sort(rank_LC, axis=1), np.tile(np.arange(ranks), (layers, 1))):
        raise SolverError(f"{settings.backend} returned an assignment that is not one to one")
    slowest_L = [(flow_LCC[i] / rate_RR[np.ix_(rank_LC[i], rank_LC[i + 1])]).max() for i in range(layers - 1)]
    return _stage(state, rank_LC, float(sum(slowest_L)), bound, scale)


def _one_rate(rate_RR: npt.NDArray[np.float64]) -> bool:
    return len(np.unique(rate_RR[~np.eye(len(rate_RR), dtype=bool)])) <= 1


def _stage(state: State, value: npt.NDArray[np.int64], objective: float, bound: float | None, scale: float) -> Stage:
    if bound is None:
        bound = objective / scale if state == "optimal" else 0.0
    return Stage(state, value, objective, min(max(bound * scale, 0.0), objective))


def _mean_par(load_LE: npt.NDArray[np.int64], rank_LE: npt.NDArray[np.int64], ranks: int) -> float:
    load_LR = np.array(
        [np.bincount(rank_E, weights=load_E, minlength=ranks) for load_E, rank_E in zip(load_LE, rank_LE, strict=True)]
    )
    mean_L = load_LR.mean(axis=1)
    return float(np.where(mean_L > 0, load_LR.max(axis=1) / np.where(mean_L > 0, mean_L, 1.0), 1.0).mean())


def _slots(rank_LE: npt.NDArray[np.int64], ranks: int, slots_per_rank: int) -> npt.NDArray[np.int64]:
    slot_expert_LP = np.full((len(rank_LE), ranks * slots_per_rank), -1, dtype=np.int64)
    for row, rank_E in enumerate(rank_LE):
        for rank in range(ranks):
            experts = np.flatnonzero(rank_E == rank)
            slot_expert_LP[row, rank * slots_per_rank :][: len(experts)] = experts
    return canonical_slots(slot_expert_LP, ranks)


def _check(problem: PlacementProblem, settings: Settings) -> None:
    if settings.backend not in get_args(Backend):
        raise UsageError(f"backend is {settings.backend!r}; use one of {', '.join(get_args(Backend))}")
    if settings.sizes not in get_args(Sizes):
        raise UsageError(f"sizes is {settings.sizes!r}; use one of {', '.join(get_args(Sizes))}")
    if not 0 <= settings.relative_gap < 1:
        raise UsageError(f"relative_gap is {settings.relative_gap}; give 0 or more and less than 1")
    if settings.sizes == "equal" and problem.redundant:
        raise UsageError(f"moetuner places no replicas and redundant is {problem.redundant}; use --redundant 0")
    if settings.sizes == "nonempty" and not problem.allow_empty_slots:
        raise UsageError("sizes 'nonempty' leaves ranks with unequal experts; set allow_empty_slots, or use 'equal'")
    if problem.profile.model.num_sites > 1 and problem.profile.transition_LEE is None:
        raise UsageError("the profile has no transitions between layers, which moetuner's second stage needs")


def _without_clusters(stage: Stage, where: str, problem: PlacementProblem, started: float) -> SolveResult:
    if stage.state != "infeasible":
        return _failed("time_limit", f"ILP 1, {where}: no clusters found in its share of the time limit", started)
    why = f"ILP 1, {where}: no clusters keep max / mean load within {problem.max_par}; raise --max-par"
    return replace(_failed("infeasible", why, started), status="infeasible")


def _failed(stopped_by: StoppedBy, message: str, started: float) -> SolveResult:
    return SolveResult(
        solver=NAME, status="error", stopped_by=stopped_by, seconds=time.perf_counter() - started, message=message
    )
