"""Plans for the engines' readers, and the bad plans that they should never be given."""

from dataclasses import replace

import numpy as np

from placer.core.model import ModelSpec
from placer.core.plan import Plan

EXPERTS, RANKS, REDUNDANT, MOE_LAYERS, HIDDEN_LAYERS = 16, 4, 4, (3, 4, 6), 7


def consumer_plan(seed: int) -> tuple[Plan, ModelSpec]:
    """A random legal plan: 7 hidden layers of which 3 are MoE, 16 experts and 4 replicas on 4 ranks."""
    generator = np.random.default_rng(seed)
    rows = []
    for _ in MOE_LAYERS:
        hot = generator.choice(EXPERTS, size=REDUNDANT, replace=False)
        count = np.ones(EXPERTS, dtype=np.int64)
        count[hot] += 1
        order = generator.permutation(EXPERTS)
        dealt = np.repeat(order, count[order])
        rows.append(np.concatenate([generator.permutation(dealt[rank::RANKS]) for rank in range(RANKS)]))
    plan = Plan(
        model="tiny",
        num_experts=EXPERTS,
        num_ranks=RANKS,
        ranks_per_node=2,
        moe_layers=MOE_LAYERS,
        slot_expert_LP=np.array(rows, dtype=np.int64),
        mode="per_rank",
    )
    model = ModelSpec.uniform(
        "tiny", num_experts=EXPERTS, top_k=2, moe_layers=MOE_LAYERS, num_hidden_layers=HIDDEN_LAYERS
    )
    return plan, model


def bad_plans() -> dict[str, Plan]:
    """The faults that engines accept, each made from a legal plan so that it breaks one rule only."""
    plan, _ = consumer_plan(0)
    slots = plan.slot_expert_LP
    row = slots[1]
    per_rank = plan.slots_per_rank
    placed = np.bincount(row)
    lonely = int(np.flatnonzero(placed[row] == 1)[0])
    spare = spare_slot(row)

    def mates(slot: int) -> list[int]:
        return row[slot // per_rank * per_rank :][:per_rank].tolist()

    def with_slot(slot: int, expert: int) -> Plan:
        changed = slots.copy()
        changed[1, slot] = expert
        return replace(plan, slot_expert_LP=changed)

    return {
        "fewer layer rows": replace(plan, slot_expert_LP=slots[:2], moe_layers=plan.moe_layers[:2]),
        "more layer rows": replace(plan, slot_expert_LP=slots[[0, 1, 2, 2]], moe_layers=(2, *plan.moe_layers)),
        "too many slots": replace(plan, slot_expert_LP=np.hstack([slots, slots[:, :1]])),
        "too few slots": replace(plan, slot_expert_LP=np.array([np.delete(r, spare_slot(r)) for r in slots])),
        "an expert never placed": with_slot(lonely, next(e for e in range(EXPERTS) if e not in mates(lonely))),
        "id out of range": with_slot(spare, EXPERTS),
        "id -1": with_slot(spare, -1),
        "two replicas on one rank": with_slot(spare, next(e for e in mates(spare) if e != row[spare])),
    }


def spare_slot(row: np.ndarray) -> int:
    """A slot whose expert has another one."""
    return int(np.flatnonzero(np.bincount(row)[row] > 1)[0])
