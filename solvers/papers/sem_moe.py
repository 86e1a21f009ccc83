"""Sem-MoE's co-clustering of requests and experts (arXiv 2503.04398): experts next to the requests that use them.

    min  theta * sum_i |sum_j R[i,j] a[j] - S / I|
         + (1 - theta) * sum_{i1 != i2} sum_{j,k} R[i1,j] C[i2,k] p[j,k] a[j]
    s.t. every request in one cluster, every expert in one cluster, E / I experts per cluster

a[j] is the frequency (tokens) of request j, S their sum, p[j,k] the share of its activations that go to expert k, I the
number of clusters (ranks). The paper clusters token ids or requests for one table of experts; here requests keep their
cluster over L layers, each with its own experts, and the second term is the mean over layers: L = 1 is the paper's.
Printed as "i = 1..t", the last row can only mean i = 1..I, which is what is meant here.

Legend: L layers, J requests, E experts, I clusters, F request folds, P slots.
"""

import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from placer.core.plan import canonical_slots
from placer.core.problem import PlacementProblem
from solvers.papers.sem_moe_moves import place_experts, schedule_requests
from solvers.result import SolveResult

__all__ = ["CoClusters", "co_cluster", "score", "solve_sem_moe"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

ROUNDS = 10
THETA = 0.5


@dataclass(frozen=True, slots=True)
class CoClusters:
    """Clusters of requests, (J,), and of experts, (L, E), with the printed objective and its two parts in tokens."""

    cluster_J: IntArray
    cluster_LE: IntArray
    imbalance: float
    remote: float
    objective: float


def score(
    cluster_J: IntArray,
    cluster_LE: IntArray,
    confidence_LJE: FloatArray,
    frequency_J: npt.NDArray[np.number],
    num_clusters: int,
    theta: float = THETA,
) -> CoClusters:
    """The clusters with the value of the printed objective: imbalance, remote activations, and their weighted sum.

    Raises UsageError where a cluster does not hold E / I experts of every layer.
    """
    layers, experts = cluster_LE.shape
    size_LI = np.stack([np.bincount(row, minlength=num_clusters) for row in cluster_LE])
    if (size_LI * num_clusters != experts).any():
        raise UsageError(
            f"clusters hold {size_LI[0].tolist()} experts in layer 0; each needs {experts} / {num_clusters}"
        )
    tokens_I = np.bincount(cluster_J, weights=frequency_J, minlength=num_clusters)
    imbalance = float(np.abs(tokens_I - frequency_J.sum() / num_clusters).sum())
    apart_LJE = cluster_J[None, :, None] != cluster_LE[:, None, :]
    remote = float((confidence_LJE * frequency_J[None, :, None])[apart_LJE].sum()) / layers
    return CoClusters(cluster_J, cluster_LE, imbalance, remote, theta * imbalance + (1 - theta) * remote)


def co_cluster(
    confidence_LJE: FloatArray,
    frequency_J: npt.NDArray[np.number],
    num_clusters: int,
    *,
    theta: float = THETA,
    seed: int = 0,
) -> CoClusters:
    """Alternating expert placement and request scheduling; the best pair of clusters by the printed objective.

    Starts: experts in contiguous blocks, experts dealt in turn, and experts grouped by affinity among themselves. The
    first two are also kept as they are, with requests in blocks or dealt in turn: the answer is never worse than what
    engines do by default. Weights of the scores inside the greedy are 1 each, the paper's are not known.

    Guarantee: E / I experts per cluster and layer; none on the objective. Deterministic for a seed.
    Complexity: O(starts rounds L (J E + E^2)). Raises UsageError where shapes, theta or the division do not fit.
    Reference: Algorithm 1; version 1 of the paper searched by cross-entropy instead.
    """
    layers, requests, experts = confidence_LJE.shape
    if frequency_J.shape != (requests,) or (frequency_J < 0).any() or (confidence_LJE < 0).any():
        raise UsageError(f"frequency_J is {frequency_J.shape}; give {requests} counts, and confidences, from 0")
    if experts % num_clusters:
        raise UsageError(f"{experts} experts do not divide over {num_clusters} clusters; each holds equally many")
    if not 0 <= theta <= 1:
        raise UsageError(f"theta is {theta!r}; give the weight of balance, 0 to 1")
    weight_LJE = np.ascontiguousarray(confidence_LJE * frequency_J[None, :, None], dtype=np.float64)
    tokens_J = np.asarray(frequency_J, dtype=np.float64)
    rng = np.random.default_rng(seed)
    width = experts // num_clusters
    contiguous_LE = np.tile(np.arange(experts) // width, (layers, 1))
    dealt_LE = np.tile(np.arange(experts) % num_clusters, (layers, 1))
    affine_LE = _place_layers(weight_LJE, None, num_clusters, rng)
    blocks_J = np.arange(requests) * num_clusters // max(1, requests)
    vanilla = [(blocks_J, contiguous_LE), (np.arange(requests) % num_clusters, dealt_LE)]
    found = [score(*pair, confidence_LJE, frequency_J, num_clusters, theta) for pair in vanilla]
    for cluster_LE in (contiguous_LE, dealt_LE, affine_LE):
        best = np.inf
        for _ in range(ROUNDS):
            near_JI = _near_clusters(weight_LJE, cluster_LE, num_clusters)
            cluster_J = schedule_requests(near_JI, tokens_J, theta)
            cluster_LE = _place_layers(weight_LJE, cluster_J, num_clusters, rng)
            found.append(score(cluster_J, cluster_LE, confidence_LJE, frequency_J, num_clusters, theta))
            if found[-1].objective >= best:
                break
            best = found[-1].objective
    return min(found, key=lambda clusters: clusters.objective)


def solve_sem_moe(problem: PlacementProblem, *, seed: int = 0) -> SolveResult:
    """Experts co-clustered with the profile's request folds, all layers together; no replicas, no load cap.

    A profile knows requests only as folds (a hash of the request id), so the folds stand for the paper's requests: what
    fold members share is what can be found, which is little where requests were hashed. Only a trace can do more
    (`placer.core.homes`). The share counts a fold's requests as living on the fold's rank; a plan does not say so.

    Objective "remote_share": share of activations, over all layers, whose expert is not on its fold's rank. The search
    minimises the printed objective (balance of folds and remote activations, theta 1/2), the bound is on the share:
    a request of a layer finds at most its E / R most used experts on its rank. Raises UsageError with redundant slots.
    """
    if problem.redundant:
        raise UsageError(f"sem_moe places no replicas and redundant is {problem.redundant}; use --redundant 0")
    started = time.perf_counter()
    ranks, width = problem.cluster.num_ranks, problem.slots_per_rank
    load_LFE = problem.profile.load_FLE.transpose(1, 0, 2).astype(np.float64)
    total_LF = load_LFE.sum(axis=2)
    confidence_LFE = load_LFE / np.maximum(1, total_LF)[:, :, None]
    found = co_cluster(confidence_LFE, total_LF.mean(axis=0), ranks, seed=seed)
    total = max(1.0, float(load_LFE.sum()))
    home = found.cluster_J[None, :, None] == found.cluster_LE[:, None, :]
    objective = 1 - float(load_LFE[home].sum()) / total
    most = float(np.sort(load_LFE, axis=2)[:, :, -width:].sum())
    order_LE = np.argsort(found.cluster_LE, axis=1, kind="stable").astype(np.int64)
    return SolveResult(
        solver="sem_moe",
        status="solved",
        stopped_by="effort",
        slot_expert_LP=canonical_slots(order_LE, ranks),
        objective_name="remote_share",
        objective=objective,
        bound=min(objective, 1 - most / total),
        bound_by="each fold's most used experts",
        seconds=time.perf_counter() - started,
        message=f"{len(found.cluster_J)} folds as requests; printed objective {found.objective:.0f} a layer: imbalance "
        f"{found.imbalance:.0f}, remote activations {found.remote:.0f}",
    )


def _place_layers(
    weight_LJE: FloatArray, cluster_J: IntArray | None, num_clusters: int, rng: np.random.Generator
) -> IntArray:
    """Experts placed layer by layer, next to the requests of their cluster or (None) by affinity among themselves."""
    rows = []
    for weight_JE in weight_LJE:
        near_EI = np.zeros((weight_JE.shape[1], num_clusters))
        if cluster_J is not None:
            np.add.at(near_EI.T, cluster_J, weight_JE)
        length_E = np.sqrt((weight_JE**2).sum(axis=0))
        unit_JE = weight_JE / np.where(length_E > 0, length_E, 1.0)
        order = rng.permutation(weight_JE.shape[1])
        rows.append(place_experts(near_EI, unit_JE.T @ unit_JE, weight_JE.sum(axis=0), order))
    return np.stack(rows)


def _near_clusters(weight_LJE: FloatArray, cluster_LE: IntArray, num_clusters: int) -> FloatArray:
    """Activations, mean over layers, that each request would find in each cluster, (J, I)."""
    member_LEI = np.eye(num_clusters)[cluster_LE]
    result: FloatArray = np.einsum("lje,lei->ji", weight_LJE, member_LEI, optimize=True) / len(weight_LJE)
    return result
