"""Tiny problems given by their expert sets, and what the best placement of them costs, by looking at all."""

import itertools
from collections.abc import Iterator
from functools import cache

import numpy as np

from placer.core.cluster import ClusterSpec, Compute, LinkClass
from placer.core.model import ModelSpec
from placer.core.problem import PlacementProblem
from placer.core.profile import ExpertSets, Profile


def problem_of_sets(
    layers: list[ExpertSets], experts: int, ranks: int, *, nodes: int = 1, **limits: object
) -> PlacementProblem:
    top_k = layers[0].expert_HK.shape[1]
    model = ModelSpec.uniform("tiny", num_experts=experts, top_k=top_k, num_hidden_layers=len(layers), hidden_size=64)
    load_LE = np.zeros((len(layers), experts), dtype=np.int64)
    for layer, sets in enumerate(layers):
        present = sets.expert_HK >= 0
        np.add.at(
            load_LE[layer], sets.expert_HK[present], np.broadcast_to(sets.weight_H[:, None], present.shape)[present]
        )
    profile = Profile(
        model=model,
        trace_sha256="",
        num_tokens=int(layers[0].weight_H.sum()),
        num_requests=1,
        window_tokens=1,
        load_WLE=load_LE[None],
        load_FLE=load_LE[None],
        sets=tuple(layers),
    )
    cluster = ClusterSpec(
        name="tiny",
        nodes=nodes,
        ranks_per_node=ranks // nodes,
        memory_gib=80,
        intra=LinkClass(gbytes_per_s=400, alpha_us=2),
        inter=LinkClass(gbytes_per_s=50, alpha_us=5),
        compute=Compute(tflops=400, weight_read_gbytes_per_s=3000, launch_us=10),
    )
    return PlacementProblem(profile=profile, cluster=cluster, **limits)  # type: ignore[arg-type]


def random_sets(rng: np.random.Generator, count: int, experts: int, top_k: int, *, ragged: bool = False) -> ExpertSets:
    """Sets of skewed popularity; `ragged` ones have members missing, in any column."""
    popular_E = rng.lognormal(0, 0.7, experts)
    rows = np.stack(
        [np.sort(rng.choice(experts, top_k, replace=False, p=popular_E / popular_E.sum())) for _ in range(count)]
    ).astype(np.int16)
    if ragged:
        rows[rng.random(rows.shape) < 0.3] = -1
    return ExpertSets(rows, rng.integers(1, 20, count))


@cache
def every_assignment(experts: int, ranks: int) -> tuple[tuple[int, ...], ...]:
    """Rank of each expert for all placements with equal counts; all labels, so that nodes are all there too."""
    width = experts // ranks
    return tuple(
        given for given in itertools.product(range(ranks), repeat=experts) if (np.bincount(given) == width).all()
    )


def groups_touched(sets: ExpertSets, group_E: np.ndarray) -> float:
    """Mean over tokens of distinct groups of a set's members."""
    total = 0.0
    for row, weight in zip(sets.expert_HK, sets.weight_H, strict=True):
        total += weight * len({int(group_E[expert]) for expert in row if expert >= 0})
    return total / float(sets.weight_H.sum())


def frontier(problem: PlacementProblem, layer: int, node_weight: float = 0.0) -> list[tuple[float, float]]:
    """(cost, PAR) of every placement of one layer that no other beats in both."""
    profile, cluster = problem.profile, problem.cluster
    found = set()
    for given in every_assignment(profile.model.num_experts, cluster.num_ranks):
        rank_E = np.array(given)
        cost = groups_touched(profile.sets[layer], rank_E)
        if node_weight:
            cost += node_weight * groups_touched(profile.sets[layer], rank_E // cluster.ranks_per_node)
        load_R = np.bincount(rank_E, weights=profile.load_LE[layer], minlength=cluster.num_ranks)
        found.add((cost, float(load_R.max() / load_R.mean())))
    kept: list[tuple[float, float]] = []
    for cost, par in sorted(found):
        if not kept or par < kept[-1][1] - 1e-12:
            kept.append((cost, par))
    return kept


def least_touched(problem: PlacementProblem, node_weight: float = 0.0) -> float:
    """The optimum: least mean cost over layers at mean PAR within the cap."""
    fronts = [frontier(problem, layer, node_weight) for layer in range(len(problem.profile.sets))]
    cap = problem.max_par if problem.max_par is not None else np.inf
    costs = [
        float(np.mean([cost for cost, _ in chosen]))
        for chosen in itertools.product(*fronts)
        if np.mean([par for _, par in chosen]) <= cap + 1e-12
    ]
    return min(costs, default=np.inf)


def least_par(problem: PlacementProblem) -> float:
    return float(np.mean([frontier(problem, layer)[-1][1] for layer in range(len(problem.profile.sets))]))


def _replicated(experts: int, ranks: int, per_rank: int) -> Iterator[tuple[frozenset[int], ...]]:
    choices = [frozenset(held) for held in itertools.combinations(range(experts), per_rank)]
    for held_R in itertools.product(choices, repeat=ranks):
        if len(frozenset().union(*held_R)) == experts:
            yield held_R


def least_with_replicas(problem: PlacementProblem, node_weight: float = 0.0) -> float:
    """The optimum with redundant slots, every token served by the fewest ranks (and nodes) that hold its set."""
    profile, cluster = problem.profile, problem.cluster
    best_L = np.full(len(profile.sets), np.inf)
    for held_R in _replicated(profile.model.num_experts, cluster.num_ranks, problem.slots_per_rank):
        for layer, sets in enumerate(profile.sets):
            total = 0.0
            for row, weight in zip(sets.expert_HK, sets.weight_H, strict=True):
                total += weight * _cover({int(e) for e in row if e >= 0}, held_R, cluster.ranks_per_node, node_weight)
            best_L[layer] = min(best_L[layer], total / float(sets.weight_H.sum()))
    return float(best_L.mean())


@cache
def _cover_of(need: frozenset[int], held_R: tuple[frozenset[int], ...], width: int, node_weight: float) -> float:
    best = np.inf
    for count in range(len(held_R) + 1):
        for chosen in itertools.combinations(range(len(held_R)), count):
            if need <= frozenset().union(*(held_R[rank] for rank in chosen)):
                best = min(best, count + node_weight * len({rank // width for rank in chosen}))
    return best


def _cover(need: set[int], held_R: tuple[frozenset[int], ...], width: int, node_weight: float) -> float:
    return _cover_of(frozenset(need), held_R, width, node_weight)


def set_partitions(members: int) -> Iterator[list[int]]:
    """Part of each member, for every partition."""
    for label in itertools.product(range(members), repeat=members):
        if all(part <= max(label[:at], default=-1) + 1 for at, part in enumerate(label)):
            yield list(label)
