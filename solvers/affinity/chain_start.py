"""Layer-by-layer assignment along the chain, and sweeps that assign each layer again between its two neighbours.

Legend: L layers, E experts, R ranks, N nodes.
"""

import time

import numpy as np
import numpy.typing as npt
from numba import njit

from solvers.affinity.assign import assign

__all__ = ["forward", "gain_of_layer", "kept_flow", "sweep"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

LEAST_GAIN = 1e-9
"""Of the flow: an assignment must win more than rounding to count."""


@njit(cache=True)
def gain_of_layer(
    flow_LEE: FloatArray,
    rank_LE: IntArray,
    layer: int,
    ranks: int,
    node_R: IntArray,
    node_weight: float,
    before: bool,
    after: bool,
) -> FloatArray:  # pragma: no cover - compiled
    """Flow that each expert of `layer` would keep on each rank given its neighbours' placement, (E, R).

    + node_weight * flow kept on the rank's node. Only the neighbours asked for count. O(E^2).
    """
    experts = rank_LE.shape[1]
    gain_RE = np.zeros((ranks, experts))
    if before:
        for other in range(experts):
            gain_RE[rank_LE[layer - 1, other]] += flow_LEE[layer - 1, other]
    gain_ER = np.ascontiguousarray(gain_RE.T)
    if after:
        for expert in range(experts):
            for other in range(experts):
                gain_ER[expert, rank_LE[layer + 1, other]] += flow_LEE[layer, expert, other]
    if node_weight > 0:
        nodes = node_R.max() + 1
        for expert in range(experts):
            on_node = np.zeros(nodes)
            for rank in range(ranks):
                on_node[node_R[rank]] += gain_ER[expert, rank]
            for rank in range(ranks):
                gain_ER[expert, rank] += node_weight * on_node[node_R[rank]]
    return gain_ER


@njit(cache=True)
def kept_flow(flow_LEE: FloatArray, group_LE: IntArray) -> float:  # pragma: no cover - compiled
    """Transitions whose two experts share a group (a rank, or a node)."""
    kept = 0.0
    experts = group_LE.shape[1]
    for pair in range(len(flow_LEE)):
        for one in range(experts):
            for two in range(experts):
                if group_LE[pair, one] == group_LE[pair + 1, two]:
                    kept += flow_LEE[pair, one, two]
    return kept


def forward(
    flow_LEE: FloatArray, first_E: IntArray, node_R: IntArray, node_weight: float, price_LR: FloatArray
) -> IntArray:
    """Each layer assigned to the placement of the one before, from `first_E` on, (L, E). O(L E^2 R) at worst.

    With one expert per rank on one node this is optimal: the pairs of layers are L - 1 independent assignments.
    `price_LR` is filled with each assignment's dual prices, as `assign` has them.
    """
    layers, ranks = len(flow_LEE) + 1, len(node_R)
    rank_LE = np.repeat(first_E[None], layers, axis=0)
    for layer in range(1, layers):
        gain_ER = gain_of_layer(flow_LEE, rank_LE, layer, ranks, node_R, node_weight, True, False)
        rank_LE[layer] = assign(gain_ER, price_LR[layer])
    return rank_LE


def sweep(
    flow_LEE: FloatArray,
    rank_LE: IntArray,
    node_R: IntArray,
    node_weight: float,
    price_LR: FloatArray,
    deadline: float,
    most_rounds: int = 50,
) -> IntArray:
    """Assigns layer after layer, forth and back, until no layer gains or time.perf_counter() passes `deadline`.

    Never worse than what it was given. A layer is looked at again only after a neighbour changed.
    """
    layers, experts = rank_LE.shape
    rank_LE = rank_LE.copy()
    stale_L = np.ones(layers, dtype=bool)
    everyone = np.arange(experts)
    for round_ in range(most_rounds):
        order = range(layers) if round_ % 2 == 0 else range(layers - 1, -1, -1)
        for layer in order:
            if not stale_L[layer] or time.perf_counter() > deadline:
                continue
            stale_L[layer] = False
            before, after = layer > 0, layer + 1 < layers
            gain_ER = gain_of_layer(flow_LEE, rank_LE, layer, len(node_R), node_R, node_weight, before, after)
            new_E = assign(gain_ER, price_LR[layer])
            old = gain_ER[everyone, rank_LE[layer]].sum()
            if gain_ER[everyone, new_E].sum() > old + LEAST_GAIN * max(1.0, old):
                rank_LE[layer] = new_E
                stale_L[max(0, layer - 1) : layer + 2] = True
                stale_L[layer] = False
        if not stale_L.any() or time.perf_counter() > deadline:
            break
    return rank_LE
