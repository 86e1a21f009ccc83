"""Small problems that the solver tests share."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from placer.core.cluster import ClusterSpec, Compute, LinkClass
from placer.core.model import ModelSpec
from placer.core.problem import PlacementProblem
from placer.core.profile import Profile
from traces.summarize import summarize
from traces.trace import RoutingTrace


def cluster(ranks: int, nodes: int = 1) -> ClusterSpec:
    return ClusterSpec(
        name="test",
        nodes=nodes,
        ranks_per_node=ranks // nodes,
        memory_gib=80,
        intra=LinkClass(gbytes_per_s=400, alpha_us=2),
        inter=LinkClass(gbytes_per_s=50, alpha_us=5),
        compute=Compute(tflops=400, weight_read_gbytes_per_s=3000, launch_us=10),
    )


def trace_of(expert_LTK: np.ndarray, experts: int, requests: int = 16) -> RoutingTrace:
    layers, tokens, top_k = expert_LTK.shape
    model = ModelSpec.uniform("test", num_experts=experts, top_k=top_k, num_hidden_layers=layers, hidden_size=64)
    request_T = (np.arange(tokens) * requests // tokens).astype(np.int32)
    return RoutingTrace(model=model, expert_LTK=expert_LTK.astype(np.uint8), request_id_T=request_T)


def random_trace(seed: int, *, layers: int = 2, tokens: int = 400, experts: int = 6, top_k: int = 2) -> RoutingTrace:
    """Skewed routing with co-activation: experts have positions on a ring and tokens choose near a random point."""
    rng = np.random.default_rng(seed)
    popularity = rng.lognormal(0.0, 0.7, size=(layers, 1, experts))
    where_T = rng.random((layers, tokens, 1))
    place_E = rng.permuted(np.tile(np.arange(experts) / experts, (layers, 1)), axis=1)[:, None, :]
    distance = np.abs((where_T - place_E + 0.5) % 1 - 0.5)
    score = np.log(popularity) - 6 * distance + rng.gumbel(size=distance.shape)
    return trace_of(np.argsort(-score, axis=2)[:, :, :top_k], experts)


def problem_of(trace: RoutingTrace, ranks: int, *, nodes: int = 1, **limits: object) -> PlacementProblem:
    profile = summarize(trace, window_tokens=100)
    return PlacementProblem(profile=profile, cluster=cluster(ranks, nodes), **limits)  # type: ignore[arg-type]


def counts_problem(load_LE: np.ndarray, ranks: int, redundant: int = 0, nodes: int = 1) -> PlacementProblem:
    """A problem that knows loads only."""
    layers, experts = load_LE.shape
    model = ModelSpec.uniform("counts", num_experts=experts, top_k=1, num_hidden_layers=layers, hidden_size=64)
    load = np.asarray(load_LE, dtype=np.int64)[None]
    profile = Profile(
        model=model,
        trace_sha256="",
        num_tokens=int(load.sum()),
        num_requests=1,
        window_tokens=1,
        load_WLE=load,
        load_FLE=load,
    )
    return PlacementProblem(profile=profile, cluster=cluster(ranks, nodes), redundant=redundant)


def every_assignment(experts: int, ranks: int) -> Iterator[np.ndarray]:
    """rank_E of every placement with equal counts, ranks labelled by first appearance."""
    width = experts // ranks
    for rank_E in itertools.product(range(ranks), repeat=experts):
        counts = np.bincount(rank_E, minlength=ranks)
        first = [rank_E.index(rank) for rank in range(ranks) if rank in rank_E]
        if (counts == width).all() and first == sorted(first):
            yield np.array(rank_E)


def without_sets(problem: PlacementProblem) -> PlacementProblem:
    return replace(problem, profile=replace(problem.profile, sets=()))
