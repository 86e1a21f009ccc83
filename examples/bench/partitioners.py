"""General graph partitioners as baselines: METIS, KaHIP and Mt-KaHyPar, then repair to a legal placement.

    pip install -e '.[bench]'

Ranks touched: one partition a layer, of the graph of co-activation (METIS, KaHIP) or of the hypergraph of expert sets
(Mt-KaHyPar, whose km1 is ranks touched minus one, exactly). Cut: one partition of the whole graph of layers and
transitions, which no partitioner balances layer by layer. Both are then repaired and polished (`repair`).

Legend: L layers, E experts, R ranks, V vertices, M edges (each once), H expert sets.
"""

import importlib.util
import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from repair import layer_limits, members, polish_cut, polish_touched, repair_counts, repair_load

from placer.core.errors import DependencyError, UsageError
from placer.core.plan import canonical_slots
from placer.core.problem import PlacementProblem
from solvers.balance.load import mean_par, rank_load_LR
from solvers.result import SolveResult

__all__ = ["TOOLS", "available", "solve_by_partition"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Cut = Callable[[int, IntArray, IntArray, int, int], IntArray]

TOOLS = {"metis": "pymetis", "kahip": "kahip", "mtkahypar": "mtkahypar"}
"""Name of each baseline and the Python package it needs."""

IMBALANCE = 0.03
CUT_SWEEPS, TOUCH_SWEEPS = 4, 4
CAP_TRIES, CAP_STEP = 4, 1.5
"""Where mean PAR ends above the cap, repair starts again from the blocks with a cap lower by CAP_STEP times that."""

ECO_VERTICES, QUALITY_VERTICES, ECO_PARTS = 4_096, 4_096, 16
"""Beyond these KaHIP runs `fast` instead of `eco`, and Mt-KaHyPar `default` instead of `quality`."""


def available(tool: str) -> bool:
    """Is the package of this baseline installed."""
    return importlib.util.find_spec(TOOLS[tool]) is not None


def solve_by_partition(problem: PlacementProblem, tool: str, *, seed: int = 0) -> SolveResult:
    """Partition, capacity repair, load repair, polish; cut in `coherent` mode, ranks touched in the others.

    Every layer is kept under its share of `max_par` where its loads allow. Raises UsageError for replicas or a profile
    without sets (transitions in `coherent` mode), DependencyError where the package is absent.
    Guarantee: none. Complexity: the partitioner's, then O(L sweeps E I) with I memberships of a layer's sets.
    """
    if not available(tool):
        raise DependencyError(f"{tool} needs the package {TOOLS[tool]}; install it with: pip install -e '.[bench]'")
    profile, ranks = problem.profile, problem.cluster.num_ranks
    if problem.redundant:
        raise UsageError(f"{tool} places no replicas and redundant is {problem.redundant}; use --redundant 0")
    if problem.mode == "coherent" and profile.transition_LEE is None:
        raise UsageError("the profile has no transitions between layers; give a per-token trace")
    if problem.mode != "coherent" and not profile.sets:
        raise UsageError("the profile has load counts only, no expert sets; give a per-token trace")
    started = time.perf_counter()
    blocks_LE = _chain_blocks(problem, tool, seed) if problem.mode == "coherent" else _layer_blocks(problem, tool, seed)
    finish = _finish_chain if problem.mode == "coherent" else _finish_layers
    cap = problem.max_par
    for _ in range(CAP_TRIES):
        slots_LP = finish(problem, blocks_LE, layer_limits(profile.load_LE, ranks, cap))
        above = mean_par(rank_load_LR(profile.load_LE, slots_LP, ranks)) - (problem.max_par or np.inf)
        if cap is None or above <= 0:
            break
        # repair of load ended above the limit in some layers: the others make up for it
        cap = max(1.0, cap - CAP_STEP * above)
    return SolveResult(
        solver=tool,
        status="solved",
        stopped_by="effort",
        slot_expert_LP=slots_LP,
        seconds=time.perf_counter() - started,
    )


def _layer_blocks(problem: PlacementProblem, tool: str, seed: int) -> IntArray:
    """Block of each expert, every layer by itself: few ranks touched by its sets, or few pairs apart, (L, E)."""
    profile, ranks = problem.profile, problem.cluster.num_ranks
    experts = profile.model.num_experts
    assert profile.coactivation_LEE is not None
    rows = []
    for pair_EE, sets in zip(profile.coactivation_LEE, profile.sets, strict=True):
        if tool == "mtkahypar":
            rows.append(_mtkahypar_sets(ranks, experts, sets.expert_HK, sets.weight_H, seed))
            continue
        edge_M2 = np.argwhere(np.triu(pair_EE, 1) > 0)
        weight_M = np.asarray(pair_EE)[edge_M2[:, 0], edge_M2[:, 1]].astype(np.int64)
        rows.append(PARTITION[tool](experts, edge_M2, weight_M, ranks, seed))
    return np.stack(rows)


def _chain_blocks(problem: PlacementProblem, tool: str, seed: int) -> IntArray:
    """Block of each expert in one partition of all layers and their transitions, (L, E)."""
    flow_LEE, layers, experts = _flow(problem), problem.profile.model.num_sites, problem.profile.model.num_experts
    where_M3 = np.argwhere(flow_LEE > 0)
    weight_M = flow_LEE[tuple(where_M3.T)].astype(np.int64)
    edge_M2 = np.stack((where_M3[:, 0] * experts + where_M3[:, 1], (where_M3[:, 0] + 1) * experts + where_M3[:, 2]), 1)
    part_V = PARTITION[tool](layers * experts, edge_M2, weight_M, problem.cluster.num_ranks, seed)
    return part_V.reshape(layers, experts)


def _finish_layers(problem: PlacementProblem, blocks_LE: IntArray, limit_L: FloatArray) -> IntArray:
    """Slots after repair by pairs and polish by sets, layer by layer, (L, P)."""
    profile, ranks = problem.profile, problem.cluster.num_ranks
    experts = profile.model.num_experts
    assert profile.coactivation_LEE is not None
    value_ER, rank_LE = np.zeros((experts, ranks)), blocks_LE.copy()
    for layer, sets in enumerate(profile.sets):
        pair_EE = np.asarray(profile.coactivation_LEE[layer], dtype=np.float64)
        load_E, limit = profile.load_LE[layer].astype(np.float64), limit_L[layer]
        rank_E = repair_counts(blocks_LE[layer], value_ER, pair_EE)
        rank_E = repair_load(rank_E, value_ER, pair_EE, load_E, limit)
        first_E, set_I = members(sets.expert_HK, experts)
        expert_HK, weight_H = np.array(sets.expert_HK), np.array(sets.weight_H)
        rank_LE[layer] = polish_touched(rank_E, expert_HK, weight_H, first_E, set_I, ranks, load_E, limit, TOUCH_SWEEPS)
    return _slots(rank_LE, ranks)


def _finish_chain(problem: PlacementProblem, blocks_LE: IntArray, limit_L: FloatArray) -> IntArray:
    """Slots after repair beside the neighbouring layers, then sweeps of polish over the chain, (L, P)."""
    ranks, flow_LEE = problem.cluster.num_ranks, _flow(problem)
    layers, experts = blocks_LE.shape
    load_LE, no_pairs_EE = problem.profile.load_LE.astype(np.float64), np.zeros((experts, experts))
    rank_LE = blocks_LE.copy()
    for layer in range(layers):
        value_ER = _value(flow_LEE, rank_LE, layer, ranks)
        rank_E = repair_counts(rank_LE[layer], value_ER, no_pairs_EE)
        rank_LE[layer] = repair_load(rank_E, value_ER, no_pairs_EE, load_LE[layer], limit_L[layer])
    for _ in range(CUT_SWEEPS):
        before_LE = rank_LE.copy()
        for layer in range(layers):
            value_ER = _value(flow_LEE, rank_LE, layer, ranks)
            rank_LE[layer] = polish_cut(rank_LE[layer], value_ER, load_LE[layer], limit_L[layer])
        if np.array_equal(before_LE, rank_LE):
            break
    return _slots(rank_LE, ranks)


def _slots(rank_LE: IntArray, ranks: int) -> IntArray:
    return canonical_slots(np.argsort(rank_LE, axis=1, kind="stable"), ranks)


def _flow(problem: PlacementProblem) -> FloatArray:
    return np.asarray(problem.profile.transition_LEE, dtype=np.float64)


def _value(flow_LEE: FloatArray, rank_LE: IntArray, layer: int, ranks: int) -> FloatArray:
    """Transitions that each expert of a layer would keep on each rank, neighbouring layers as they are, (E, R)."""
    value_ER = np.zeros((rank_LE.shape[1], ranks))
    if layer > 0:
        value_ER += flow_LEE[layer - 1].T @ np.eye(ranks)[rank_LE[layer - 1]]
    if layer + 1 < len(rank_LE):
        value_ER += flow_LEE[layer] @ np.eye(ranks)[rank_LE[layer + 1]]
    return value_ER


def _both_ways(vertices: int, edge_M2: IntArray, weight_M: IntArray) -> tuple[IntArray, IntArray, IntArray]:
    """Compressed rows of an undirected graph as METIS and KaHIP take it: first neighbour, neighbours, weights."""
    tail = np.concatenate((edge_M2[:, 0], edge_M2[:, 1]))
    head = np.concatenate((edge_M2[:, 1], edge_M2[:, 0]))
    order = np.lexsort((head, tail))
    first_V = np.concatenate(([0], np.cumsum(np.bincount(tail, minlength=vertices))))
    return first_V, head[order], np.concatenate((weight_M, weight_M))[order]


def _metis(vertices: int, edge_M2: IntArray, weight_M: IntArray, parts: int, seed: int) -> IntArray:
    import pymetis

    first_V, head, weight = _both_ways(vertices, edge_M2, weight_M)
    adjacency = pymetis.CSRAdjacency(first_V, head)
    _, part_V = pymetis.part_graph(parts, adjacency, eweights=weight, options=pymetis.Options(seed=seed))
    return np.asarray(part_V, dtype=np.int64)


def _kahip(vertices: int, edge_M2: IntArray, weight_M: IntArray, parts: int, seed: int) -> IntArray:
    import kahip

    first_V, head, weight = _both_ways(vertices, edge_M2, weight_M)
    how = kahip.FAST if vertices > ECO_VERTICES or parts > ECO_PARTS else kahip.ECO
    graph = ([1] * vertices, first_V.tolist(), weight.tolist(), head.tolist())
    _, part_V = kahip.kaffpa(*graph, parts, IMBALANCE, True, seed, how)
    return np.asarray(part_V, dtype=np.int64)


def _mtkahypar_context(vertices: int, parts: int, objective: str, seed: int) -> tuple[object, object]:
    import mtkahypar

    library = mtkahypar.initialize(1, False)
    mtkahypar.set_seed(seed)
    preset = mtkahypar.PresetType.DEFAULT if vertices > QUALITY_VERTICES else mtkahypar.PresetType.QUALITY
    context = library.context_from_preset(preset)
    context.set_partitioning_parameters(parts, IMBALANCE, getattr(mtkahypar.Objective, objective))
    context.logging = False
    return library, context


def _mtkahypar(vertices: int, edge_M2: IntArray, weight_M: IntArray, parts: int, seed: int) -> IntArray:
    library, context = _mtkahypar_context(vertices, parts, "CUT", seed)
    graph = library.create_graph(  # type: ignore[attr-defined]
        context, vertices, len(edge_M2), edge_M2.tolist(), [1] * vertices, weight_M.tolist()
    )
    return np.asarray(graph.partition(context).get_partition(), dtype=np.int64)


def _mtkahypar_sets(
    parts: int, experts: int, expert_HK: npt.NDArray[np.int16], weight_H: IntArray, seed: int
) -> IntArray:
    library, context = _mtkahypar_context(experts, parts, "KM1", seed)
    pins = [[expert for expert in row if expert >= 0] for row in expert_HK.tolist()]
    kept = [index for index, row in enumerate(pins) if len(row) > 1]
    nets, weight = [pins[index] for index in kept], [int(weight_H[index]) for index in kept]
    graph = library.create_hypergraph(  # type: ignore[attr-defined]
        context, experts, len(nets), nets, [1] * experts, weight
    )
    return np.asarray(graph.partition(context).get_partition(), dtype=np.int64)


PARTITION: dict[str, Cut] = {"metis": _metis, "kahip": _kahip, "mtkahypar": _mtkahypar}
