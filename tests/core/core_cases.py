"""Small clusters, models, plans and routed tokens for the core's tests, by hand and at random.

Legend: L sites, T tokens, K top-k, E experts, P slots, R ranks, W windows.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st

from placer.core.cluster import ClusterSpec, Compute, LinkClass
from placer.core.model import ModelSpec
from placer.core.modes import DISPATCH_MODES, REPLICA_CHOICES
from placer.core.plan import Plan
from placer.core.profile import ExpertSets, Profile

UNSET = 255


def make_cluster(nodes: int = 1, ranks_per_node: int = 4, **changes: Any) -> ClusterSpec:
    fields: dict[str, Any] = {
        "name": "toy",
        "memory_gib": 1.0,
        "intra": LinkClass(gbytes_per_s=1.0, alpha_us=0.5),
        "inter": LinkClass(gbytes_per_s=0.25, alpha_us=2.0),
        "compute": Compute(tflops=0.001, weight_read_gbytes_per_s=2.0, launch_us=0.3),
    }
    return ClusterSpec(nodes=nodes, ranks_per_node=ranks_per_node, **fields | changes)


def make_model(layers: int = 2, experts: int = 8, top_k: int = 2, **changes: Any) -> ModelSpec:
    sizes: dict[str, Any] = {"hidden_size": 10, "moe_intermediate_size": 4}
    return ModelSpec.uniform("toy", num_experts=experts, top_k=top_k, num_hidden_layers=layers, **sizes | changes)


def make_plan(slot_expert_LP: Any, cluster: ClusterSpec, experts: int, **changes: Any) -> Plan:
    slot_expert_LP = np.asarray(slot_expert_LP, dtype=np.int64)
    fields: dict[str, Any] = {
        "model": "toy",
        "moe_layers": tuple(range(len(slot_expert_LP))),
        "mode": "per_rank",
        "num_hidden_layers": len(slot_expert_LP),
    }
    return Plan(
        num_experts=experts,
        num_ranks=cluster.num_ranks,
        ranks_per_node=cluster.ranks_per_node,
        slot_expert_LP=slot_expert_LP,
        **fields | changes,
    )


def legal_row(experts: int, ranks: int, slots_per_rank: int, rng: np.random.Generator) -> np.ndarray:
    """Every expert somewhere, replicas on distinct ranks, every slot filled: dealt like cards, copies side by side."""
    count = np.ones(experts, dtype=np.int64)
    for _ in range(ranks * slots_per_rank - experts):
        count[rng.choice(np.flatnonzero(count < ranks))] += 1
    order = rng.permutation(experts)
    deck = np.repeat(order, count[order])
    return np.concatenate([rng.permutation(deck[rank::ranks]) for rank in rng.permutation(ranks)])


def random_experts(rng: np.random.Generator, shape_LTK: tuple[int, int, int], experts: int, unset: float) -> np.ndarray:
    """expert_LTK uint8 with distinct ids in a row; a share `unset` of the entries is 255, the sentinel."""
    layers, tokens, top_k = shape_LTK
    ids = np.argsort(rng.random((layers, tokens, experts)), axis=2)[:, :, :top_k].astype(np.uint8)
    ids[rng.random(ids.shape) < unset] = UNSET
    return ids


@dataclass(frozen=True)
class Case:
    """A legal plan and tokens for it."""

    plan: Plan
    model: ModelSpec
    cluster: ClusterSpec
    expert_LTK: np.ndarray
    source_T: np.ndarray
    window_tokens: int
    batch_tokens: int


@st.composite
def cases(draw: st.DrawFn, *, replicas: bool = True, uplinks: bool = True) -> Case:
    nodes, ranks_per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ranks = nodes * ranks_per_node
    if replicas:
        experts = draw(st.integers(1, 8))
        slots_per_rank = draw(st.integers(-(-experts // ranks), experts))
    else:
        slots_per_rank = draw(st.integers(1, 3))
        experts = ranks * slots_per_rank
    layers, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 25))
    top_k = draw(st.integers(1, min(4, experts)))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    uplink = LinkClass(gbytes_per_s=0.3, alpha_us=1.5) if uplinks and draw(st.booleans()) else None
    cluster = make_cluster(nodes, ranks_per_node, uplink=uplink)
    share_LP = None
    slots_LP = np.stack([legal_row(experts, ranks, slots_per_rank, rng) for _ in range(layers)])
    if replicas and draw(st.booleans()):
        share_LP = rng.random(slots_LP.shape) + 0.05
        for row, share in zip(slots_LP, share_LP, strict=True):
            share /= np.bincount(row, weights=share)[row]
    plan = make_plan(
        slots_LP,
        cluster,
        experts,
        mode=draw(st.sampled_from(DISPATCH_MODES)),
        replica_choice=draw(st.sampled_from(REPLICA_CHOICES)),
        replica_share_LP=share_LP,
    )
    return Case(
        plan=plan,
        model=make_model(layers, experts, top_k, attention_params=draw(st.sampled_from([0, 500]))),
        cluster=cluster,
        expert_LTK=random_experts(rng, (layers, tokens, top_k), experts, draw(st.sampled_from([0.0, 0.3]))),
        source_T=rng.integers(0, ranks, tokens),
        window_tokens=draw(st.integers(1, 12)),
        batch_tokens=draw(st.integers(1, 12)),
    )


def count_profile(case: Case) -> Profile:
    """The Profile of a case's tokens, counted token by token."""
    layers, experts = case.model.num_sites, case.model.num_experts
    tokens = case.expert_LTK.shape[1]
    windows = reference_windows(tokens, case.window_tokens)
    load_WLE = np.zeros((max(windows) + 1, layers, experts), dtype=np.int64)
    transition_LEE = np.zeros((layers - 1, experts, experts), dtype=np.int64)
    sets = []
    for layer in range(layers):
        kinds: Counter[tuple[int, ...]] = Counter()
        for token in range(tokens):
            ids = [int(e) for e in case.expert_LTK[layer, token] if e != UNSET]
            for expert in ids:
                load_WLE[windows[token], layer, expert] += 1
                for after in case.expert_LTK[layer + 1, token] if layer + 1 < layers else []:
                    if after != UNSET:
                        transition_LEE[layer, expert, after] += 1
            if ids:
                kinds[tuple(sorted(ids))] += 1
        width = case.expert_LTK.shape[2]
        rows = [list(kind) + [-1] * (width - len(kind)) for kind in sorted(kinds)]
        weights = [kinds[kind] for kind in sorted(kinds)]
        expert_HK = np.array(rows, dtype=np.int16).reshape(-1, width)
        sets.append(ExpertSets(expert_HK, np.array(weights, dtype=np.int64)))
    return Profile(
        model=case.model,
        trace_sha256="0" * 64,
        num_tokens=tokens,
        num_requests=1,
        window_tokens=case.window_tokens,
        load_WLE=load_WLE,
        load_FLE=load_WLE.sum(axis=0)[None],
        transition_LEE=transition_LEE,
        sets=tuple(sets),
    )


def reference_windows(tokens: int, window_tokens: int) -> list[int]:
    """Window of each token; the last tokens join the window before where they are less than half of one."""
    whole, rest = divmod(tokens, window_tokens)
    count = max(1, whole + (1 if 2 * rest >= window_tokens else 0))
    return [min(token // window_tokens, count - 1) for token in range(tokens)]


def load_profile_of(load_WLE: Any, model: ModelSpec) -> Profile:
    """A Profile of counts alone."""
    load_WLE = np.asarray(load_WLE, dtype=np.int64)
    return Profile(
        model=model,
        trace_sha256="0" * 64,
        num_tokens=int(load_WLE.sum()),
        num_requests=0,
        window_tokens=1,
        load_WLE=load_WLE,
        load_FLE=load_WLE.sum(axis=0)[None],
    )
