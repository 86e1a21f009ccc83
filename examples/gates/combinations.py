"""What the gates measure: placements, dispatch modes and homes, planned on one half of the tokens, run on the other.

Legend: L layers, T tokens, K top-k, R ranks, C planted clusters.
"""

from dataclasses import dataclass, replace

import numpy as np

from placer.core.cluster import ClusterSpec
from placer.core.homes import request_tokens, request_touch
from placer.core.model import ModelSpec
from placer.core.modes import DispatchMode
from placer.core.plan import Plan, canonical_slots
from placer.pipeline import solve
from solvers.affinity.align_homes import align_for_homes
from solvers.affinity.homes import assign_homes
from solvers.ranks import relabel_ranks
from traces.trace import RoutingTrace

__all__ = ["Combination", "Halves", "at_home", "combinations", "mixed", "planted", "resized"]

SLACK = 0.05
MAX_PAR = 1.10


@dataclass(frozen=True, slots=True, kw_only=True)
class Combination:
    """One thing to predict and to measure; `source_T` is the rank on which each judged token's attention runs."""

    placement: str
    mode: DispatchMode
    homes: str
    plan: Plan
    source_T: np.ndarray

    @classmethod
    def of(cls, plan: Plan, placement: str, mode: str, homes: str, source_T: np.ndarray) -> "Combination":
        """The plan run under `mode`, whatever it was solved for."""
        mode_: DispatchMode = mode  # type: ignore[assignment] # the examples' own lists
        return cls(placement=placement, mode=mode_, homes=homes, plan=replace(plan, mode=mode_), source_T=source_T)

    @property
    def name(self) -> str:
        """Unique within a group."""
        return f"{self.placement}, {self.mode}, {self.homes} homes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Halves:
    """Requests to plan on and requests to run; `index_T` is the request of each token, counted from 0."""

    name: str
    train: RoutingTrace
    test: RoutingTrace


def mixed(trace: RoutingTrace, tokens: int, seed: int) -> RoutingTrace:
    """`tokens` of the trace in random order: an iteration then serves many requests, as decoding does."""
    order_T = np.random.default_rng(seed).permutation(trace.num_tokens)[:tokens]
    return trace.select_tokens(order_T)


def resized(trace: RoutingTrace, hidden_size: int, intermediate_size: int) -> RoutingTrace:
    """The same routing with the sizes of the replay: float32 experts, nothing but experts."""
    model = replace(
        trace.model,
        hidden_size=hidden_size,
        moe_intermediate_size=intermediate_size,
        matrices_per_expert=3,
        weight_bytes=4.0,
        activation_bytes=4.0,
        attention_params=0,
        shared_intermediate_size=0,
    )
    return replace(trace, model=model)


def planted(clusters: int, tokens: int, seed: int, *, layers: int = 8, experts: int = 32, stay: float = 0.85):
    """Tokens that belong to one of as many clusters of experts as there are ranks, and stay with it: the best case.

    Each of two experts of a token comes from its cluster with probability `stay`, else from any. Ids are shuffled.
    """
    layout_rng, rng = np.random.default_rng(99), np.random.default_rng(seed)
    size = experts // clusters
    cluster_T = rng.integers(0, clusters, tokens)
    expert_LTK = np.empty((layers, tokens, 2), dtype=np.uint8)
    for layer in range(layers):
        order_E = layout_rng.permutation(experts)
        own_TK = rng.random((tokens, 2)) < stay
        of_TK = np.where(own_TK, cluster_T[:, None], rng.integers(0, clusters, (tokens, 2)))
        first_T, step_T = rng.integers(0, size, tokens), rng.integers(1, size, tokens)
        expert_LTK[layer] = order_E[of_TK * size + np.stack([first_T, (first_T + step_T) % size], axis=1)]
    return RoutingTrace(
        model=ModelSpec.uniform("planted", num_experts=experts, top_k=2, num_hidden_layers=layers),
        expert_LTK=expert_LTK,
        request_id_T=np.arange(tokens, dtype=np.int32),
        position_T=np.zeros(tokens, dtype=np.int32),
        phase_T=np.zeros(tokens, dtype=np.uint8),
        provenance=f"planted clusters, seed {seed}",
        notes=(f"planted: {clusters} clusters, a token's expert is its cluster's with probability {stay}",),
    )


def combinations(halves: Halves, cluster: ClusterSpec, seconds: float, seed: int) -> list[Combination]:
    """Every combination of one group; the first is the baseline: experts by index, one copy per expert, dealt homes."""
    train, test, ranks = halves.train, halves.test, cluster.num_ranks
    dealt_T = np.arange(test.num_tokens) % ranks
    placements = {
        "linear": solve(train, cluster, solver="linear").plan,
        "eplb": solve(train, cluster, solver="eplb").plan,
        "random": _random(solve(train, cluster, solver="linear").plan, seed),
        "coactivation": solve(train, cluster, solver="coactivation", max_par=MAX_PAR, time_limit_s=seconds).plan,
        "affinity": solve(
            train, cluster, solver="affinity", mode="coherent", max_par=MAX_PAR, time_limit_s=seconds
        ).plan,
    }
    wanted = [("linear", mode) for mode in ("per_expert", "per_rank", "per_node", "coherent")]
    wanted += [("coactivation", mode) for mode in ("per_expert", "per_rank", "per_node")]
    wanted += [("affinity", mode) for mode in ("per_expert", "coherent")]
    if halves.train.model.name != "planted":
        # planted loads are even and clusters shuffled: there, balancing and chance are linear again
        wanted += [(name, mode) for name in ("eplb", "random") for mode in ("per_expert", "per_rank", "coherent")]
    # with one rank a node, per_node is per_rank
    wanted = [(name, mode) for name, mode in wanted if mode != "per_node" or cluster.ranks_per_node > 1]
    found = [Combination.of(placements[name], name, mode, "dealt", dealt_T) for name, mode in wanted]
    local, home_T = at_home(placements["affinity"], train, test)
    found += [
        Combination.of(local, "affinity", mode, "local", home_T) for mode in ("per_expert", "per_rank", "coherent")
    ]
    return found


def _random(plan: Plan, seed: int) -> Plan:
    rng = np.random.default_rng(seed)
    slot_expert_LP = np.stack([rng.permutation(row) for row in plan.slot_expert_LP])
    return replace(plan, slot_expert_LP=canonical_slots(slot_expert_LP, plan.num_ranks), solver="random")


def at_home(plan: Plan, train: RoutingTrace, test: RoutingTrace) -> tuple[Plan, np.ndarray]:
    """The plan with ranks labelled for homes, and every request on the rank that it touches most, balanced.

    Homes know the judged requests' own routing: what the runtime does is the question here, not a predictor.
    """
    index_T, requests = _index(train)
    labels = align_for_homes(
        request_touch(plan, train.expert_LTK, index_T, requests),
        request_tokens(index_T, requests),
        ranks_per_node=plan.ranks_per_node,
        slack=SLACK,
    )
    labelled = replace(plan, slot_expert_LP=relabel_ranks(plan.slot_expert_LP, labels.order_LR))
    index_T, requests = _index(test)
    touch_QR = request_touch(labelled, test.expert_LTK, index_T, requests).sum(axis=0)
    home_Q = assign_homes(touch_QR, request_tokens(index_T, requests), plan.num_ranks, SLACK)
    return labelled, home_Q[index_T]


def _index(trace: RoutingTrace) -> tuple[np.ndarray, int]:
    ids, index_T = np.unique(trace.request_id_T, return_inverse=True)
    return index_T, len(ids)
