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
from solvers.result import SolveResult

__all__ = ["TOOLS", "available", "solve_by_partition"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]
Cut = Callable[[int, IntArray, IntArray, int, int], IntArray]

TOOLS = {"metis": "pymetis", "kahip": "kahip", "mtkahypar": "mtkahypar"}
"""Name of each baseline and the Python package it needs."""

IMBALANCE = 0.03
CUT_SWEEPS, TOUCH_SWEEPS = 4, 4
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
    started = time.perf_counter()
    limit_L = layer_limits(profile.load_LE, ranks, problem.max_par)
    if problem.mode == "coherent":
        if profile.transition_LEE is None:
            raise UsageError("the profile has no transitions between layers; give a per-token trace")
        rank_LE = _whole_chain(problem, tool, limit_L, seed)
    else:
        if not profile.sets:
            raise UsageError("the profile has load counts only, no expert sets; give a per-token trace")
        rank_LE = np.stack([_one_layer(problem, tool, layer, limit_L[layer], seed) for layer in range(len(limit_L))])
    return SolveResult(
        solver=tool,
        status="solved",
        stopped_by="effort",
        slot_expert_LP=canonical_slots(np.argsort(rank_LE, axis=1, kind="stable"), ranks),
        seconds=time.perf_counter() - started,
    )


def _one_layer(problem: PlacementProblem, tool: str, layer: int, limit: float, seed: int) -> IntArray:
    """Rank of each expert of one layer for few ranks touched, (E,)."""
    profile, ranks = problem.profile, problem.cluster.num_ranks
    experts, sets = profile.model.num_experts, profile.sets[layer]
    assert profile.coactivation_LEE is not None
    pair_EE = np.asarray(profile.coactivation_LEE[layer], dtype=np.float64)
    if tool == "mtkahypar":
        rank_E = _mtkahypar_sets(ranks, experts, sets.expert_HK, sets.weight_H, seed)
    else:
        edge_M2 = np.argwhere(np.triu(pair_EE, 1) > 0)
        weight_M = pair_EE[edge_M2[:, 0], edge_M2[:, 1]].astype(np.int64)
        rank_E = PARTITION[tool](experts, edge_M2, weight_M, ranks, seed)
    value_ER, load_E = np.zeros((experts, ranks)), profile.load_LE[layer].astype(np.float64)
    rank_E = repair_counts(rank_E, value_ER, pair_EE)
    rank_E = repair_load(rank_E, value_ER, pair_EE, load_E, limit)
    first_E, set_I = members(sets.expert_HK, experts)
    expert_HK, weight_H = np.array(sets.expert_HK), np.array(sets.weight_H)
    return np.asarray(polish_touched(rank_E, expert_HK, weight_H, first_E, set_I, ranks, load_E, limit, TOUCH_SWEEPS))


def _whole_chain(problem: PlacementProblem, tool: str, limit_L: FloatArray, seed: int) -> IntArray:
    """Rank of each expert of each layer for a small cut, (L, E)."""
    profile, ranks = problem.profile, problem.cluster.num_ranks
    assert profile.transition_LEE is not None
    layers, experts = profile.model.num_sites, profile.model.num_experts
    where_M3 = np.argwhere(profile.transition_LEE > 0)
    weight_M = np.asarray(profile.transition_LEE)[tuple(where_M3.T)].astype(np.int64)
    edge_M2 = np.stack((where_M3[:, 0] * experts + where_M3[:, 1], (where_M3[:, 0] + 1) * experts + where_M3[:, 2]), 1)
    rank_LE = PARTITION[tool](layers * experts, edge_M2, weight_M, ranks, seed).reshape(layers, experts)
    flow_LEE = np.asarray(profile.transition_LEE, dtype=np.float64)
    load_LE, no_pairs_EE = profile.load_LE.astype(np.float64), np.zeros((experts, experts))
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
    return rank_LE


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
