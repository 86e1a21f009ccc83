"""Legal plans of any shape for the exporters' tests. Legend: L MoE layers, P slots, R ranks, E experts."""

import numpy as np
from hypothesis import strategies as st

from placer.core.model import ModelSpec
from placer.core.plan import Plan


def make_plan(
    *,
    num_experts: int = 8,
    num_ranks: int = 4,
    redundant: int = 4,
    moe_layers: tuple[int, ...] = (3, 4, 5),
    num_hidden_layers: int = 6,
    seed: int = 0,
) -> tuple[Plan, ModelSpec]:
    """A random legal plan and its model."""
    generator = np.random.default_rng(seed)
    rows = [random_row(num_experts, num_ranks, redundant, generator) for _ in moe_layers]
    plan = Plan(
        model="tiny",
        num_experts=num_experts,
        num_ranks=num_ranks,
        ranks_per_node=1,
        moe_layers=moe_layers,
        slot_expert_LP=np.array(rows, dtype=np.int64),
        mode="per_rank",
    )
    model = ModelSpec.uniform(
        "tiny", num_experts=num_experts, top_k=1, moe_layers=moe_layers, num_hidden_layers=num_hidden_layers
    )
    return plan, model


def random_row(experts: int, ranks: int, redundant: int, generator: np.random.Generator) -> list[int]:
    """Slots of one layer: replicas of an expert are dealt to consecutive ranks, so never two to one rank."""
    count = np.ones(experts, dtype=np.int64)
    for _ in range(redundant):
        count[generator.choice(np.flatnonzero(count < ranks))] += 1
    order = generator.permutation(experts)
    dealt = np.repeat(order, count[order])
    hands = [generator.permutation(dealt[rank::ranks]) for rank in range(ranks)]
    return np.concatenate([hands[rank] for rank in generator.permutation(ranks)]).tolist()


@st.composite
def plans(draw: st.DrawFn) -> tuple[Plan, ModelSpec]:
    """Legal plans with and without replicas and dense layers."""
    ranks = draw(st.integers(1, 5))
    experts = draw(st.integers(1, 9))
    slots_per_rank = draw(st.integers(-(-experts // ranks), experts))
    hidden = draw(st.integers(1, 6))
    layers = draw(st.sets(st.integers(0, hidden - 1), min_size=1))
    return make_plan(
        num_experts=experts,
        num_ranks=ranks,
        redundant=slots_per_rank * ranks - experts,
        moe_layers=tuple(sorted(layers)),
        num_hidden_layers=hidden,
        seed=draw(st.integers(0, 2**32 - 1)),
    )
