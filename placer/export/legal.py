"""Whether a plan is one that every engine can load; run before each export.

Legend: L routing sites (rows of the plan), P physical slots, R ranks, E logical experts.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from placer.core.errors import ViolationError
from placer.core.model import ModelSpec
from placer.core.plan import Plan

__all__ = ["assert_exportable", "export_violations"]

SHOWN = 3


def export_violations(plan: Plan, model: ModelSpec) -> Iterator[str]:
    """Every rule that the plan breaks as a plan for `model`, one line each; nothing for a legal plan.

    The rules are what the engines need and do not check (each was fed to SGLang 0.5.23, vLLM 0.33.0 or vllm-ascend
    and accepted, or crashed late): one row per MoE layer of the model, equal slots per rank, ids of the model's
    experts only, no empty slot, every expert somewhere in every layer, no expert twice on one rank.
    """
    broken_frame = list(_frame_violations(plan, model))
    yield from broken_frame
    if broken_frame:
        return
    for row, layer in enumerate(plan.moe_layers):
        yield from _layer_violations(plan.slot_expert_LP[row], plan, f"layer {layer} (row {row})")


def assert_exportable(plan: Plan, model: ModelSpec) -> None:
    """Returns nothing for a plan that every engine can load as a plan for `model`.

    Raises ViolationError naming the layer, slot and expert of the first violations and how many more there are.
    """
    found = list(export_violations(plan, model))
    if not found:
        return
    more = f"; and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    raise ViolationError(f"plan cannot be exported: {'; '.join(found[:SHOWN])}{more}")


def _frame_violations(plan: Plan, model: ModelSpec) -> Iterator[str]:
    rows, slots = plan.slot_expert_LP.shape
    if not model.is_uniform:
        yield f"model {model.name!r} has unequal, shared or non-feed-forward experts, which no engine's map can name"
    if plan.num_experts != model.num_experts:
        yield f"plan is for {plan.num_experts} experts a layer; model {model.name!r} has {model.num_experts}"
    if plan.num_hidden_layers not in (None, model.num_hidden_layers):
        yield f"plan is for {plan.num_hidden_layers} hidden layers; model {model.name!r} has {model.num_hidden_layers}"
    if rows != len(plan.moe_layers):
        yield f"plan has {rows} rows but names {len(plan.moe_layers)} MoE layers; solve again"
    if plan.moe_layers != model.moe_layers:
        yield _layers_differ(plan.moe_layers, model)
    if any(later <= earlier for earlier, later in zip(plan.moe_layers, plan.moe_layers[1:], strict=False)):
        yield f"plan.moe_layers {list(plan.moe_layers)} is not ascending; engines number layers in order"
    if not np.issubdtype(plan.slot_expert_LP.dtype, np.integer):
        yield f"plan.slot_expert_LP is {plan.slot_expert_LP.dtype}; expert ids are integers"
    if slots % plan.num_ranks:
        yield (
            f"{slots} slots a layer do not divide over {plan.num_ranks} ranks; every engine gives each rank "
            "an equal block of slots"
        )
    elif slots < plan.num_experts:
        yield f"{slots} slots a layer are too few for {plan.num_experts} experts"


def _layers_differ(layers: tuple[int, ...], model: ModelSpec) -> str:
    missing = sorted(set(model.moe_layers) - set(layers))
    extra = sorted(set(layers) - set(model.moe_layers))
    parts = [f"lacks MoE layer {layer}" for layer in missing[:1]] + [f"names layer {layer}" for layer in extra[:1]]
    return (
        f"plan has rows for {len(layers)} MoE layers, model {model.name!r} has {len(model.moe_layers)}"
        f" (the plan {' and '.join(parts) or 'has them in another order'})"
    )


def _layer_violations(expert_P: npt.NDArray[np.int64], plan: Plan, where: str) -> Iterator[str]:
    slots_per_rank = plan.slots_per_rank
    for slot in np.flatnonzero((expert_P < 0) | (expert_P >= plan.num_experts)).tolist():
        expert = int(expert_P[slot])
        if expert == -1:
            yield f"{where}: slot {slot} on rank {slot // slots_per_rank} is empty (-1); engines need every slot filled"
        else:
            yield f"{where}: slot {slot} holds expert {expert}; ids are 0 to {plan.num_experts - 1}"
    placed = np.bincount(expert_P[(expert_P >= 0) & (expert_P < plan.num_experts)], minlength=plan.num_experts)
    for expert in np.flatnonzero(placed == 0).tolist():
        yield f"{where}: expert {expert} has no slot"
    expert_RP = np.sort(expert_P.reshape(plan.num_ranks, slots_per_rank), axis=1)
    ranks, places = np.nonzero((expert_RP[:, 1:] == expert_RP[:, :-1]) & (expert_RP[:, 1:] >= 0))
    for rank, expert in sorted(set(zip(ranks.tolist(), expert_RP[ranks, places].tolist(), strict=True))):
        first = rank * slots_per_rank
        slots = (first + np.flatnonzero(expert_P[first : first + slots_per_rank] == expert)).tolist()
        yield f"{where}: expert {expert} is {len(slots)} times on rank {rank} (slots {slots}); one slot is enough"
