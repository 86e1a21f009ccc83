"""Small deployments for the simulator's tests: by hand, and at random for hypothesis."""

import dataclasses
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from hypothesis import strategies as st

from placer.core.cluster import ClusterSpec, Compute, LinkClass
from placer.core.model import ModelSpec
from placer.core.modes import DISPATCH_MODES, REPLICA_CHOICES, DispatchMode
from placer.core.plan import Plan
from placer.core.timeline import Timeline
from sim import simulate

COPY_NS = 1000
"""What one token copy takes on the tiny cluster's rank ports."""
PAIR_NS = 2000
"""What one (token, expert) pair takes on the tiny cluster; an expert's weight read (1000 ns) hides behind it."""


def tiny_model(layers: int, experts: int, *, attention_params: int = 0) -> ModelSpec:
    return ModelSpec.uniform(
        "tiny",
        num_experts=experts,
        top_k=1,
        num_hidden_layers=layers,
        hidden_size=1000,
        moe_intermediate_size=1,
        matrices_per_expert=1,
        weight_bytes=1.0,
        activation_bytes=1.0,
        attention_params=attention_params,
    )


def tiny_cluster(nodes: int, ranks_per_node: int, *, alpha_us: float = 0.0, **rest: LinkClass) -> ClusterSpec:
    link = LinkClass(gbytes_per_s=1.0, alpha_us=alpha_us)
    return ClusterSpec(
        name="tiny",
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        memory_gib=1.0,
        intra=link,
        inter=rest.pop("inter", link),
        compute=Compute(tflops=0.001, weight_read_gbytes_per_s=1.0),
        **rest,
    )


def linear_plan(cluster: ClusterSpec, layers: int, experts: int, mode: str = "per_rank") -> Plan:
    return Plan(
        model="tiny",
        num_experts=experts,
        num_ranks=cluster.num_ranks,
        ranks_per_node=cluster.ranks_per_node,
        moe_layers=tuple(range(layers)),
        slot_expert_LP=np.tile(np.arange(experts), (layers, 1)),
        mode=mode,
    )


@dataclass(frozen=True)
class Case:
    plan: Plan
    model: ModelSpec
    cluster: ClusterSpec
    expert_LTK: npt.NDArray[np.int16]
    source_T: npt.NDArray[np.int64]
    batch_tokens: int

    def simulate(self, fidelity: str, **rest: object) -> Timeline:
        inputs = (self.plan, self.model, self.cluster, self.expert_LTK, self.source_T)
        return simulate(*inputs, fidelity=fidelity, batch_tokens=self.batch_tokens, **rest)


@st.composite
def clusters(draw: st.DrawFn, *, alike: bool = False) -> ClusterSpec:
    def link() -> LinkClass:
        speed = draw(st.sampled_from([0.7, 1.0, 13.0]))
        return LinkClass(gbytes_per_s=speed, alpha_us=draw(st.sampled_from([0.0, 0.3333, 2.0])))

    nodes, ranks_per_node = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    ranks = nodes * ranks_per_node
    speeds = st.lists(st.sampled_from([0.5, 1.0, 1.7]), min_size=ranks, max_size=ranks)
    return ClusterSpec(
        name="random",
        nodes=nodes,
        ranks_per_node=ranks_per_node,
        rank_speed=tuple([] if alike else draw(st.one_of(st.just([]), speeds))),
        memory_gib=1.0,
        intra=link(),
        inter=link(),
        compute=Compute(tflops=0.0031, weight_read_gbytes_per_s=0.77, launch_us=draw(st.sampled_from([0.0, 1.7]))),
        uplink=link() if draw(st.booleans()) else None,
    )


@st.composite
def cases(draw: st.DrawFn, *, replicas: bool = True, top_k: int = 3) -> Case:
    cluster = draw(clusters())
    ranks = cluster.num_ranks
    layers, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 24))
    experts = ranks * draw(st.integers(1, 2)) + draw(st.integers(0, 1))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    per_rank = -(-experts // ranks) + (draw(st.integers(0, 1)) if replicas else 0)
    slot_expert_LP = np.stack([random_slots(rng, experts, ranks, per_rank, replicas) for _ in range(layers)])
    expert_LTK = random_experts(rng, layers, tokens, min(top_k, experts), experts)
    expert_LTK[rng.random(expert_LTK.shape) < draw(st.sampled_from([0.0, 0.2]))] = -1
    model = ModelSpec.uniform(
        "random",
        num_experts=experts,
        top_k=expert_LTK.shape[2],
        num_hidden_layers=layers,
        hidden_size=333,
        moe_intermediate_size=7,
        attention_params=draw(st.sampled_from([0, 1234])),
    )
    plan = Plan(
        model="random",
        num_experts=experts,
        num_ranks=ranks,
        ranks_per_node=cluster.ranks_per_node,
        moe_layers=model.moe_layers,
        slot_expert_LP=slot_expert_LP,
        mode=draw(st.sampled_from(DISPATCH_MODES)),
        replica_choice=draw(st.sampled_from(REPLICA_CHOICES)),
    )
    return Case(plan, model, cluster, expert_LTK, rng.integers(0, ranks, tokens), draw(st.sampled_from([5, 12, 64])))


def random_slots(rng: np.random.Generator, experts: int, ranks: int, per_rank: int, replicas: bool) -> np.ndarray:
    """One layer's slots: every expert once, then replicas (distinct on a rank) or empty slots."""
    slots = np.full((ranks, per_rank), -1, dtype=np.int64)
    for at, expert in enumerate(rng.permutation(experts).tolist()):
        slots[at % ranks, at // ranks] = expert
    if replicas:
        for rank in range(ranks):
            spare = np.setdiff1d(np.arange(experts), slots[rank])
            free = np.flatnonzero(slots[rank] == -1)[: len(spare)]
            slots[rank, free] = rng.permutation(spare)[: len(free)]
    return slots.reshape(-1)


def random_experts(rng: np.random.Generator, layers: int, tokens: int, top_k: int, experts: int) -> np.ndarray:
    """Distinct experts of each token, (L, T, K) int16."""
    order = np.argsort(rng.random((layers, tokens, experts)), axis=2)
    return order[:, :, :top_k].astype(np.int16)


def relabel(case: Case, seed: int, *, local_alike: bool) -> tuple[Case, np.ndarray]:
    """The same deployment with other names for nodes, ranks and experts, and the new name of each rank.

    `local_alike`: the ranks of all nodes permute alike.
    """
    rng = np.random.default_rng(seed)
    cluster, plan = case.cluster, case.plan
    per_node = cluster.ranks_per_node
    node = rng.permutation(cluster.nodes)
    local = np.stack([rng.permutation(per_node) for _ in range(cluster.nodes)])
    if local_alike:
        local = np.tile(local[0], (cluster.nodes, 1))
    rank = np.arange(cluster.num_ranks)
    new_rank_R = node[rank // per_node] * per_node + local[rank // per_node, rank % per_node]
    new_expert_E = rng.permutation(plan.num_experts)
    old = plan.slot_expert_LP.reshape(len(plan.moe_layers), cluster.num_ranks, -1)
    new = np.empty_like(old)
    new[:, new_rank_R] = np.where(old >= 0, new_expert_E[old], -1)
    speed = tuple(np.array(cluster.rank_speed)[np.argsort(new_rank_R)].tolist()) if cluster.rank_speed else ()
    renamed = dataclasses.replace(
        case,
        cluster=dataclasses.replace(cluster, rank_speed=speed),
        plan=dataclasses.replace(plan, slot_expert_LP=new.reshape(plan.slot_expert_LP.shape)),
        expert_LTK=np.where(case.expert_LTK >= 0, new_expert_E[case.expert_LTK], -1),
        source_T=new_rank_R[case.source_T],
    )
    return renamed, new_rank_R


def alike_case(
    cluster: ClusterSpec, mode: DispatchMode, seed: int, *, layers: int, top_k: int, tokens_per_rank: int
) -> Case:
    """Every rank's tokens go to the same relative places (so many nodes and so many ranks further on)."""
    rng = np.random.default_rng(seed)
    nodes, per_node, ranks, per_rank = cluster.nodes, cluster.ranks_per_node, cluster.num_ranks, 3
    rank = np.arange(ranks)
    shape = (layers, tokens_per_rank, top_k)
    far, near = rng.integers(0, nodes, shape), rng.integers(0, per_node, shape)
    target = ((rank // per_node)[:, None, None, None] + far) % nodes * per_node
    target = target + ((rank % per_node)[:, None, None, None] + near) % per_node
    expert_RLTK = target * per_rank + np.arange(top_k)  # column k uses expert k of its rank: never one expert twice
    expert_LTK = expert_RLTK.transpose(1, 0, 2, 3).reshape(layers, ranks * tokens_per_rank, top_k)
    experts = ranks * per_rank
    model = ModelSpec.uniform(
        "alike", num_experts=experts, top_k=top_k, num_hidden_layers=layers, hidden_size=333, moe_intermediate_size=7
    )
    plan = Plan(
        model="alike",
        num_experts=experts,
        num_ranks=ranks,
        ranks_per_node=per_node,
        moe_layers=model.moe_layers,
        slot_expert_LP=np.tile(np.arange(experts), (layers, 1)),
        mode=mode,
    )
    return Case(plan, model, cluster, expert_LTK.astype(np.int16), np.repeat(rank, tokens_per_rank), 10**6)
