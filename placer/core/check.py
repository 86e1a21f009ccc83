"""Is this plan legal for this problem? Shares no code with any solver; refuses what the engines silently accept."""

from dataclasses import dataclass

import numpy as np

from placer.core.errors import ViolationError
from placer.core.evaluate import par
from placer.core.plan import Plan
from placer.core.problem import PlacementProblem
from placer.core.replicas import layer_slots, serve_sets, served_share

__all__ = ["Violation", "assert_runnable", "check"]


@dataclass(frozen=True, slots=True)
class Violation:
    """One broken rule: a stable code, where it is, and a line that names the value and the mend."""

    code: str
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.code} at {self.where}: {self.message}"


def check(problem: PlacementProblem, plan: Plan) -> list[Violation]:
    """Every rule that `plan` breaks, in reading order; empty means legal.

    Codes: layers, slots, ranks, experts, id-range, empty-slot, missing-expert, same-rank-replicas, share, memory,
    max-par.
    The load cap is judged on the problem's own counts, each replica serving what the replica choice gives it.
    """
    found: list[Violation] = []
    model, cluster = problem.profile.model, problem.cluster
    layers, slots = plan.slot_expert_LP.shape
    if layers != model.num_sites:
        message = f"{layers} rows, but model {model.name!r} has {model.num_sites} MoE layers; solve for this model"
        found.append(Violation("layers", "plan", message))
    if tuple(plan.moe_layers) != model.moe_layers:
        message = (
            f"rows are for layers {_short(plan.moe_layers)}, the model's MoE layers are {_short(model.moe_layers)}"
        )
        found.append(Violation("layers", "plan.moe_layers", message))
    if plan.num_experts != model.num_experts:
        message = f"{plan.num_experts} experts, but the model has {model.num_experts}; solve for this model"
        found.append(Violation("experts", "plan.num_experts", message))
    same_cluster = (plan.num_ranks, plan.ranks_per_node) == (cluster.num_ranks, cluster.ranks_per_node)
    if not same_cluster:
        message = (
            f"{plan.num_ranks} ranks, {plan.ranks_per_node} a node; cluster {cluster.name!r} has {cluster.num_ranks}, "
            f"{cluster.ranks_per_node} a node; solve for this cluster"
        )
        found.append(Violation("ranks", "plan.num_ranks", message))
    if slots % plan.num_ranks:
        message = f"{slots} slots do not divide over {plan.num_ranks} ranks; every rank needs the same number"
        found.append(Violation("slots", "plan.slot_expert_LP", message))
    elif same_cluster and not problem.allow_empty_slots and slots != problem.num_slots:
        message = f"{slots} slots a layer; the problem has {model.num_experts} + {problem.redundant} redundant"
        found.append(Violation("slots", "plan.slot_expert_LP", message))
    if found:
        return found
    for layer in range(layers):
        found.extend(_check_layer(plan, layer, model.num_experts, problem.allow_empty_slots))
    found.extend(_check_memory(problem, plan))
    if not found and problem.max_par is not None:
        found.extend(_check_par(problem, plan))
    return found


def assert_runnable(plan: Plan) -> None:
    """Returns nothing for a plan under which every token is served, legal for a problem or not.

    Empty slots and replicas on one rank are run by the simulator and the executor, so they pass here.
    Raises ViolationError for slots that do not divide over the ranks, ids that do not exist, an expert without a slot
    and shares that are none.
    """
    found = []
    if plan.num_slots == 0 or plan.num_slots % plan.num_ranks:
        message = f"{plan.num_slots} slots do not divide over {plan.num_ranks} ranks; every rank needs the same number"
        found.append(Violation("slots", "plan.slot_expert_LP", message))
    if len(plan.moe_layers) != len(plan.slot_expert_LP):
        message = f"{len(plan.slot_expert_LP)} rows, but plan.moe_layers names {len(plan.moe_layers)} layers"
        found.append(Violation("layers", "plan", message))
    if plan.num_experts > plan.num_slots:
        message = f"{plan.num_experts} experts in {plan.num_slots} slots: at least one has no slot"
        found.append(Violation("missing-expert", "plan.num_experts", message))
    if not found:
        rows = range(len(plan.slot_expert_LP))
        codes = ("id-range", "missing-expert", "share")
        found = [item for row in rows for item in _check_layer(plan, row, plan.num_experts, True) if item.code in codes]
    if found:
        more = f" ({len(found) - 1} more)" if len(found) > 1 else ""
        raise ViolationError(f"the plan cannot be run: {found[0]}{more}; see all with `placer check`")


def _check_layer(plan: Plan, layer: int, experts: int, allow_empty: bool) -> list[Violation]:
    found = []
    row = plan.slot_expert_LP[layer]
    where = f"layer {plan.moe_layers[layer]}"
    for slot in np.flatnonzero((row < -1) | (row >= experts)):
        message = f"slot {slot} has expert {row[slot]}; ids go from 0 to {experts - 1}"
        found.append(Violation("id-range", where, message))
    if not allow_empty and (row == -1).any():
        message = f"slot {int(np.argmax(row == -1))} is empty (-1); engines need an expert in every slot"
        found.append(Violation("empty-slot", where, message))
    if found:
        return found
    per_rank = row.reshape(plan.num_ranks, -1)
    held_RE = np.zeros((plan.num_ranks, experts), dtype=np.int64)
    ranks = np.repeat(np.arange(plan.num_ranks), per_rank.shape[1])
    np.add.at(held_RE, (ranks[row >= 0], row[row >= 0]), 1)
    missing = np.flatnonzero(held_RE.sum(axis=0) == 0)
    if len(missing):
        message = f"expert {missing[0]} has no slot ({len(missing)} missing); its tokens would be lost"
        found.append(Violation("missing-expert", where, message))
    for rank, expert in np.argwhere(held_RE > 1):
        message = f"rank {rank} holds expert {expert} {held_RE[rank, expert]} times; replicas belong on distinct ranks"
        found.append(Violation("same-rank-replicas", where, message))
    if plan.replica_share_LP is not None:
        found.extend(_check_share(plan, layer, experts))
    return found


def _check_share(plan: Plan, layer: int, experts: int) -> list[Violation]:
    assert plan.replica_share_LP is not None
    where = f"layer {plan.moe_layers[layer]}"
    if plan.replica_share_LP.shape != plan.slot_expert_LP.shape:
        message = f"replica_share_LP is {plan.replica_share_LP.shape}, slot_expert_LP {plan.slot_expert_LP.shape}"
        return [Violation("share", where, message)]
    share, row = plan.replica_share_LP[layer], plan.slot_expert_LP[layer]
    if not np.isfinite(share).all() or (share < 0).any():
        return [Violation("share", where, "a share is negative or not a number; shares lie between 0 and 1")]
    total = np.bincount(row[row >= 0], weights=share[row >= 0], minlength=experts)
    if np.abs(total - 1).max() > 1e-3:
        expert = int(np.abs(total - 1).argmax())
        return [Violation("share", where, f"shares of expert {expert} add up to {total[expert]:.4f}; they must be 1")]
    return []


def _check_par(problem: PlacementProblem, plan: Plan) -> list[Violation]:
    load_LR = np.stack([_load(problem, plan, layer) for layer in range(len(plan.slot_expert_LP))])
    mean_par = float(par(load_LR, problem.cluster.speed_R).mean())
    if problem.max_par is None or mean_par <= problem.max_par + 1e-9:
        return []
    message = (
        f"max / mean rank load is {mean_par:.4f} (mean over layers), the limit is {problem.max_par:g}; raise --max-par"
    )
    return [Violation("max-par", "plan", message)]


def _load(problem: PlacementProblem, plan: Plan, layer: int) -> np.ndarray[tuple[int, ...], np.dtype[np.float64]]:
    row, load_E = plan.slot_expert_LP[layer], problem.profile.load_LE[layer]
    given = None if plan.replica_share_LP is None else plan.replica_share_LP[layer]
    slots = layer_slots(row, plan.num_experts, plan.num_ranks, plan.ranks_per_node, given)
    share_P = slots.share_P
    if problem.profile.sets and (slots.count_E > 1).any():
        sets = problem.profile.sets[layer].split_heavy()
        share_P = served_share(slots, serve_sets(slots, plan.replica_choice, sets.expert_HK), sets.weight_H)
    load_P: np.ndarray[tuple[int, ...], np.dtype[np.float64]] = np.where(row >= 0, load_E[row] * share_P, 0.0)
    return load_P.reshape(plan.num_ranks, -1).sum(axis=1)


def _check_memory(problem: PlacementProblem, plan: Plan) -> list[Violation]:
    model, cluster = problem.profile.model, problem.cluster
    held_R = (plan.slot_expert_LP >= 0).reshape(len(plan.slot_expert_LP), plan.num_ranks, -1).sum(axis=(0, 2))
    over_R = held_R * model.expert_bytes - cluster.memory_bytes_R
    worst = int(over_R.argmax())
    if over_R[worst] <= 0:
        return []
    need, has = int(held_R[worst]) * model.expert_bytes, int(cluster.memory_bytes_R[worst])
    message = f"needs {need / 2**30:.1f} GiB of experts; {cluster.name!r} has {has / 2**30:g} GiB a rank"
    if cluster.rank_memory_gib:
        message = f"needs {need / 2**30:.3g} GiB of experts; it has {has / 2**30:.3g} GiB of {cluster.name!r}"
    return [Violation("memory", f"rank {worst}", message)]


def _short(values: tuple[int, ...]) -> str:
    return str(list(values)) if len(values) <= 6 else f"[{values[0]}, {values[1]}, ..., {values[-1]}]"
