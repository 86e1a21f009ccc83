"""Tiny problems and brute force for the exact solvers. Legend: L layers, E experts, R ranks, H expert sets, K top-k."""

import itertools
from collections.abc import Iterator

import numpy as np

from placer.core.cluster import ClusterSpec, Compute, LinkClass
from placer.core.model import ModelSpec
from placer.core.problem import PlacementProblem
from placer.core.profile import ExpertSets, Profile


def make_cluster(ranks: int, *, nodes: int = 1, uplink_gbytes_per_s: float | None = None) -> ClusterSpec:
    return ClusterSpec(
        name="tiny",
        nodes=nodes,
        ranks_per_node=ranks // nodes,
        memory_gib=80,
        intra=LinkClass(gbytes_per_s=100.0),
        inter=LinkClass(gbytes_per_s=20.0),
        compute=Compute(tflops=100.0, weight_read_gbytes_per_s=1000.0),
        uplink=None if uplink_gbytes_per_s is None else LinkClass(gbytes_per_s=uplink_gbytes_per_s),
    )


def make_problem(
    expert_LTK: np.ndarray,
    *,
    num_experts: int,
    cluster: ClusterSpec,
    with_sets: bool = True,
    with_transitions: bool = True,
    max_par: float | None = None,
    redundant: int = 0,
    allow_empty_slots: bool = False,
) -> PlacementProblem:
    """The problem of a trace of expert ids, (layers, tokens, top-k), -1 where a token chose fewer."""
    layers, tokens, top_k = expert_LTK.shape
    one_hot_LTE = np.zeros((layers, tokens, num_experts), dtype=np.int64)
    for layer, token, choice in itertools.product(range(layers), range(tokens), range(top_k)):
        if expert_LTK[layer, token, choice] >= 0:
            one_hot_LTE[layer, token, expert_LTK[layer, token, choice]] = 1
    sets = []
    for ids_TK in np.sort(expert_LTK, axis=2)[:, :, ::-1]:
        rows, weight = np.unique(ids_TK, axis=0, return_counts=True)
        sets.append(ExpertSets(rows.astype(np.int16), weight.astype(np.int64)))
    transition_LEE = np.einsum("lte,ltf->lef", one_hot_LTE[:-1], one_hot_LTE[1:])
    profile = Profile(
        model=ModelSpec.uniform("tiny", num_experts=num_experts, top_k=top_k, num_hidden_layers=layers),
        trace_sha256="",
        num_tokens=tokens,
        num_requests=1,
        window_tokens=tokens,
        load_WLE=one_hot_LTE.sum(axis=1)[None],
        load_FLE=one_hot_LTE.sum(axis=1)[None],
        transition_LEE=transition_LEE if with_transitions else None,
        sets=tuple(sets) if with_sets else (),
    )
    return PlacementProblem(
        profile=profile,
        cluster=cluster,
        max_par=max_par,
        redundant=redundant,
        allow_empty_slots=allow_empty_slots,
    )


def random_trace(layers: int, tokens: int, top_k: int, experts: int, seed: int) -> np.ndarray:
    """Ids with a popularity that differs between experts, distinct within a token."""
    generator = np.random.default_rng(seed)
    popularity = generator.dirichlet(np.full(experts, 0.7)) + 1e-6
    noise = generator.gumbel(size=(layers, tokens, experts)) + np.log(popularity)
    return np.argsort(-noise, axis=2)[:, :, :top_k]


def equal_placements(experts: int, ranks: int) -> Iterator[np.ndarray]:
    """rank_E of every placement with the same number of experts on each rank."""
    for rank_E in itertools.product(range(ranks), repeat=experts):
        if all(rank_E.count(rank) == experts // ranks for rank in range(ranks)):
            yield np.array(rank_E)


def load_R(load_E: np.ndarray, rank_E: np.ndarray, ranks: int) -> np.ndarray:
    return np.array([load_E[rank_E == rank].sum() for rank in range(ranks)])


def ranks_touched(expert_TK: np.ndarray, rank_E: np.ndarray) -> int:
    """Sum over tokens of the distinct ranks of their experts, token by token."""
    return sum(len({int(rank_E[expert]) for expert in token if expert >= 0}) for token in expert_TK)


def rank_LE(slot_expert_LP: np.ndarray, experts: int, ranks: int) -> np.ndarray:
    """Rank of each expert, from slots in contiguous blocks; asserts that each expert is there once."""
    layers, slots = slot_expert_LP.shape
    found = np.full((layers, experts), -1)
    for layer in range(layers):
        for slot, expert in enumerate(slot_expert_LP[layer].tolist()):
            if expert >= 0:
                assert found[layer, expert] == -1
                found[layer, expert] = slot // (slots // ranks)
    assert (found >= 0).all()
    return found
