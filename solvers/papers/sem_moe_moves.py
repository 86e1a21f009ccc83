"""The two steps of Sem-MoE's Algorithm 1, compiled: experts into equal clusters, requests into balanced ones.

Legend: J requests, E experts, I clusters.
"""

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["place_experts", "schedule_requests"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

MOST_PASSES = 50


@njit(cache=True)
def place_experts(
    near_EI: FloatArray, affinity_EE: FloatArray, load_E: FloatArray, order_E: IntArray
) -> IntArray:  # pragma: no cover - compiled
    """Cluster of each expert, equal counts: greedy by load, then pairs in `order_E` exchanged while more stays local.

    Score of a cluster: mean affinity to the experts in it + share of the expert's activations by requests of the
    cluster - load in it / mean load of a cluster.
    """
    experts, clusters = near_EI.shape
    width = experts // clusters
    mean = max(1e-300, load_E.sum() / clusters)
    cluster_E = np.full(experts, -1, dtype=np.int64)
    count_I, load_I = np.zeros(clusters, dtype=np.int64), np.zeros(clusters)
    for expert in np.argsort(-load_E, kind="mergesort"):
        best, best_score = -1, -np.inf
        for cluster in range(clusters):
            if count_I[cluster] == width:
                continue
            affinity = 0.0
            for other in range(experts):
                if cluster_E[other] == cluster:
                    affinity += affinity_EE[expert, other]
            near = near_EI[expert, cluster] / max(1e-300, load_E[expert])
            value = affinity / max(1, count_I[cluster]) + near - load_I[cluster] / mean
            if value > best_score:
                best, best_score = cluster, value
        cluster_E[expert] = best
        count_I[best] += 1
        load_I[best] += load_E[expert]
    for _ in range(MOST_PASSES):
        changed = False
        for place in range(experts):
            for later in range(place + 1, experts):
                one, two = order_E[place], order_E[later]
                here, there = cluster_E[one], cluster_E[two]
                gain = near_EI[one, there] + near_EI[two, here] - near_EI[one, here] - near_EI[two, there]
                if gain > 1e-9:
                    cluster_E[one], cluster_E[two] = there, here
                    changed = True
        if not changed:
            break
    return cluster_E


@njit(cache=True)
def schedule_requests(
    near_JI: FloatArray, tokens_J: FloatArray, theta: float
) -> IntArray:  # pragma: no cover - compiled
    """Cluster of each request: longest first where the printed objective rises least, then moves and exchanges."""
    requests, clusters = near_JI.shape
    mean = tokens_J.sum() / clusters
    cluster_J = np.zeros(requests, dtype=np.int64)
    load_I = np.zeros(clusters)
    for request in np.argsort(-tokens_J, kind="mergesort"):
        best, best_cost = -1, np.inf
        for cluster in range(clusters):
            balance = abs(load_I[cluster] + tokens_J[request] - mean) - abs(load_I[cluster] - mean)
            cost = theta * balance - (1 - theta) * near_JI[request, cluster]
            if cost < best_cost:
                best, best_cost = cluster, cost
        cluster_J[request] = best
        load_I[best] += tokens_J[request]
    for _ in range(MOST_PASSES):
        changed = False
        for one in range(requests):
            for cluster in range(clusters):
                here = cluster_J[one]
                if cluster == here:
                    continue
                balance = _apart(load_I, here, cluster, tokens_J[one], mean)
                if theta * balance - (1 - theta) * (near_JI[one, cluster] - near_JI[one, here]) < -1e-9:
                    load_I[here] -= tokens_J[one]
                    load_I[cluster] += tokens_J[one]
                    cluster_J[one] = cluster
                    changed = True
            for two in range(one + 1, requests):
                here, there = cluster_J[one], cluster_J[two]
                if here == there:
                    continue
                shift = tokens_J[one] - tokens_J[two]
                gain = near_JI[one, there] + near_JI[two, here] - near_JI[one, here] - near_JI[two, there]
                if theta * _apart(load_I, here, there, shift, mean) - (1 - theta) * gain < -1e-9:
                    load_I[here] -= shift
                    load_I[there] += shift
                    cluster_J[one], cluster_J[two] = there, here
                    changed = True
        if not changed:
            break
    return cluster_J


@njit(cache=True)
def _apart(load_I: FloatArray, here: int, there: int, shift: float, mean: float) -> float:  # pragma: no cover
    """Change of the imbalance when `shift` tokens go from one cluster to another."""
    before = abs(load_I[here] - mean) + abs(load_I[there] - mean)
    return abs(load_I[here] - shift - mean) + abs(load_I[there] + shift - mean) - before
