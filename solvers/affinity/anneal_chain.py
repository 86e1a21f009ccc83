"""Annealing along the chain of layers: exchanges inside a layer, judged in O(1) by the flow to both neighbours.

Legend: L layers, E experts, R ranks, N nodes.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["anneal_block", "near_flow", "rank_loads"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@njit(cache=True)
def near_flow(
    flow_LEE: FloatArray, back_LEE: FloatArray, group_LE: IntArray, groups: int
) -> FloatArray:  # pragma: no cover - compiled
    """Flow of each expert from and to every group of the layers before and after, (L, G, E).

    `back_LEE` is flow_LEE with its experts exchanged. O(L E^2).
    """
    layers, experts = group_LE.shape
    near_LGE = np.zeros((layers, groups, experts))
    for layer in range(layers):
        for other in range(experts):
            if layer > 0:
                near_LGE[layer, group_LE[layer - 1, other]] += flow_LEE[layer - 1, other]
            if layer + 1 < layers:
                near_LGE[layer, group_LE[layer + 1, other]] += back_LEE[layer, other]
    return near_LGE


@njit(cache=True)
def rank_loads(share_LE: FloatArray, rank_LE: IntArray, ranks: int) -> FloatArray:  # pragma: no cover - compiled
    """Rank load over mean rank load, (L, R), from shares that are experts' loads over the mean rank load."""
    load_LR = np.zeros((len(rank_LE), ranks))
    for layer in range(len(rank_LE)):
        for expert in range(rank_LE.shape[1]):
            load_LR[layer, rank_LE[layer, expert]] += share_LE[layer, expert]
    return load_LR


@njit(cache=True)
def _moved(
    flow_LEE: FloatArray,
    back_LEE: FloatArray,
    near_LGE: FloatArray,
    layer: int,
    one: int,
    two: int,
    mine: int,
    yours: int,
) -> None:  # pragma: no cover - compiled
    """Tells the neighbours of `layer` that `one` went from group `mine` to `yours` and `two` the other way."""
    if layer > 0:
        for expert in range(near_LGE.shape[2]):
            moved = back_LEE[layer - 1, one, expert] - back_LEE[layer - 1, two, expert]
            near_LGE[layer - 1, mine, expert] -= moved
            near_LGE[layer - 1, yours, expert] += moved
    if layer + 1 < len(near_LGE):
        for expert in range(near_LGE.shape[2]):
            moved = flow_LEE[layer, one, expert] - flow_LEE[layer, two, expert]
            near_LGE[layer + 1, mine, expert] -= moved
            near_LGE[layer + 1, yours, expert] += moved


@njit(cache=True)
def anneal_block(
    flow_LEE: FloatArray,
    back_LEE: FloatArray,
    near_LRE: FloatArray,
    near_LNE: FloatArray,
    rank_LE: IntArray,
    node_R: IntArray,
    node_weight: float,
    share_LE: FloatArray,
    load_LR: FloatArray,
    cap_L: FloatArray,
    price: float,
    steps: int,
    temperature: float,
    rng: np.random.Generator,
) -> None:  # pragma: no cover - compiled
    """`steps` exchanges tried in every layer in turn, at one temperature; changes rank_LE, near_* and load_LR in place.

    Cost: - flow kept on ranks - node_weight * flow kept on nodes + price * sum over ranks of the load above cap_L. A
    price on the busiest rank alone would leave a layer with two busiest ranks stuck; with an infinite price no rank's
    overload may grow. A try costs O(1), an exchange O(E).
    """
    layers, experts = rank_LE.shape
    for layer in range(layers):
        cap = cap_L[layer]
        for _ in range(steps):
            one, two = int(rng.random() * experts), int(rng.random() * experts)
            mine, yours = rank_LE[layer, one], rank_LE[layer, two]
            if mine == yours:
                continue
            won = near_LRE[layer, yours, one] - near_LRE[layer, mine, one]
            won += near_LRE[layer, mine, two] - near_LRE[layer, yours, two]
            here, there = node_R[mine], node_R[yours]
            across = node_weight > 0 and here != there
            if across:
                on_nodes = near_LNE[layer, there, one] - near_LNE[layer, here, one]
                on_nodes += near_LNE[layer, here, two] - near_LNE[layer, there, two]
                won += node_weight * on_nodes
            shift = share_LE[layer, two] - share_LE[layer, one]
            over = max(0.0, load_LR[layer, mine] + shift - cap) + max(0.0, load_LR[layer, yours] - shift - cap)
            over -= max(0.0, load_LR[layer, mine] - cap) + max(0.0, load_LR[layer, yours] - cap)
            if over != 0.0:
                won -= price * over
            if won <= 0.0 and (temperature == 0.0 or won <= temperature * np.log(rng.random())):
                continue
            rank_LE[layer, one], rank_LE[layer, two] = yours, mine
            load_LR[layer, mine] += shift
            load_LR[layer, yours] -= shift
            _moved(flow_LEE, back_LEE, near_LRE, layer, one, two, mine, yours)
            if across:
                _moved(flow_LEE, back_LEE, near_LNE, layer, one, two, here, there)
