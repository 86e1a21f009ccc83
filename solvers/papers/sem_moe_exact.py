"""Sem-MoE's 0-1 program in CP-SAT, for about 12 requests and 8 experts; in a process of its own.

    r[j,i], c[l,k,i]  request j, expert k of layer l in cluster i        d[i] >= |I * tokens of cluster i - S|
    z[l,j,k]          both in one cluster: z and r[j,i] imply c[l,k,i]   only z that are worth something

Legend: L layers, J requests, E experts, I clusters.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.errors import SolverError, UsageError
from solvers.exact.isolate import run_isolated
from solvers.papers.sem_moe import THETA, CoClusters, score

__all__ = ["ExactClusters", "co_cluster_exact", "search_clusters"]

SCALE = 1e7


@dataclass(frozen=True, slots=True)
class ExactClusters:
    """The best clusters found, a lower bound on the printed objective, and whether CP-SAT proved them optimal."""

    clusters: CoClusters
    bound: float
    proven: bool


def co_cluster_exact(
    confidence_LJE: npt.NDArray[np.float64],
    frequency_J: npt.NDArray[np.integer],
    num_clusters: int,
    *,
    time_limit_s: float,
    theta: float = THETA,
    seed: int = 0,
) -> ExactClusters:
    """`search_clusters` in a process that is killed at 1.5 times the limit plus 5 s; see there."""
    arguments = (confidence_LJE, frequency_J, num_clusters, theta, time_limit_s, seed)
    return run_isolated(search_clusters, arguments, time_limit_s=time_limit_s)


def search_clusters(
    confidence_LJE: npt.NDArray[np.float64],
    frequency_J: npt.NDArray[np.integer],
    num_clusters: int,
    theta: float,
    time_limit_s: float,
    seed: int,
) -> ExactClusters:
    """Optimum of the printed objective, up to the rounding of weights to 1e-7 tokens, with one worker.

    Raises UsageError for frequencies that are not whole or experts that do not divide, SolverError where nothing was
    found in time.
    """
    from ortools.sat.python import cp_model

    layers, requests, experts = confidence_LJE.shape
    if frequency_J.dtype.kind not in "iu":
        raise UsageError(f"frequency_J is {frequency_J.dtype}; the program needs whole tokens")
    if experts % num_clusters:
        raise UsageError(f"{experts} experts do not divide over {num_clusters} clusters; each holds equally many")
    model = cp_model.CpModel()
    clusters = range(num_clusters)
    in_JI = [[model.new_bool_var("") for _ in clusters] for _ in range(requests)]
    in_LEI = [[[model.new_bool_var("") for _ in clusters] for _ in range(experts)] for _ in range(layers)]
    for row in in_JI:
        model.add_exactly_one(row)
    for in_EI in in_LEI:
        for row in in_EI:
            model.add_exactly_one(row)
        for cluster in clusters:
            model.add(sum(row[cluster] for row in in_EI) == experts // num_clusters)
    # clusters have no names: number them by the experts of layer 0
    for expert in range(min(experts, num_clusters)):
        for cluster in range(expert + 1, num_clusters):
            model.add(in_LEI[0][expert][cluster] == 0)
    tokens = int(frequency_J.sum())
    apart_I = [model.new_int_var(0, tokens * num_clusters, "") for _ in clusters]
    for cluster in clusters:
        held = num_clusters * sum(int(a) * row[cluster] for a, row in zip(frequency_J, in_JI, strict=True))
        model.add(apart_I[cluster] >= held - tokens)
        model.add(apart_I[cluster] >= tokens - held)
    weight_LJE = confidence_LJE * frequency_J[None, :, None]
    worth_LJE = np.rint(weight_LJE * ((1 - theta) / layers * SCALE)).astype(np.int64)
    local = []
    for layer, request, expert in np.argwhere(worth_LJE > 0).tolist():
        both = model.new_bool_var("")
        for cluster in clusters:
            model.add_implication(both, in_LEI[layer][expert][cluster]).only_enforce_if(in_JI[request][cluster])
        local.append(int(worth_LJE[layer, request, expert]) * both)
    price = round(theta * SCALE / num_clusters)
    model.minimize(price * sum(apart_I) + int(worth_LJE.sum()) - sum(local))
    solver = cp_model.CpSolver()
    solver.parameters.max_time_in_seconds = time_limit_s
    solver.parameters.random_seed = seed
    solver.parameters.num_workers = 1
    status = solver.solve(model)
    if status not in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        raise SolverError(f"CP-SAT found no clusters ({solver.status_name(status)}); give it more time")
    cluster_J = np.array([[solver.value(v) for v in row] for row in in_JI]).argmax(axis=1).astype(np.int64)
    chosen = [[[solver.value(v) for v in row] for row in in_EI] for in_EI in in_LEI]
    cluster_LE = np.array(chosen).argmax(axis=2).astype(np.int64)
    found = score(cluster_J, cluster_LE, confidence_LJE, frequency_J, num_clusters, theta)
    # each rounded weight may be half a step off, and so may the price of an apart token
    slip = 0.5 * (worth_LJE.size + 2 * tokens * num_clusters)
    bound = min(found.objective, max(0.0, (solver.best_objective_bound - slip) / SCALE))
    return ExactClusters(found, bound, status == cp_model.OPTIMAL)
