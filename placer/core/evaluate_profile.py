"""Judgement of a plan on a Profile alone: for users who share counts, not traces.

Legend: L sites, H expert sets, E experts, P slots, R ranks, W windows.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from placer.core.errors import MismatchError
from placer.core.evaluate import par
from placer.core.modes import ReplicaChoice
from placer.core.plan import Plan
from placer.core.profile import ExpertSets, Profile
from placer.core.replicas import LayerSlots, layer_slots, serve_sets, served_share

__all__ = ["ProfileEvaluation", "ServedSets", "distinct", "evaluate_profile", "serve_layer"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileEvaluation:
    """As placer.core.evaluate.Evaluation, from counts. None where the profile does not hold what is needed.

    With replicas these are estimates: loads are shared as the plan says, a replicated expert is taken to add no rank to
    a set that touches one of its ranks anyway. Without replicas every number is exact, ranks and nodes touched up to
    the sets' coverage.
    """

    ranks_touched: float | None
    nodes_touched: float | None
    par: float
    par_max: float
    par_window_mean: float
    par_window_p99: float
    kept: float | None


def evaluate_profile(plan: Plan, profile: Profile, speed_R: npt.NDArray[np.float64] | None = None) -> ProfileEvaluation:
    """Ranks and nodes touched, PAR (with `speed_R` of load / speed) and kept share of `plan` on the profile's requests.

    Raises MismatchError where plan and profile are of different shapes.
    """
    experts, ranks, layers = plan.num_experts, plan.num_ranks, len(plan.slot_expert_LP)
    if (layers, experts) != (profile.model.num_sites, profile.model.num_experts):
        raise MismatchError(
            f"the plan has {layers} MoE layers of {experts} experts, the profile "
            f"{profile.model.num_sites} of {profile.model.num_experts}; use the profile's own plan or solve again"
        )
    share_LRE = np.zeros((layers, ranks, experts))
    touched = nodes = tokens = 0.0
    for layer, row in enumerate(plan.slot_expert_LP):
        given = None if plan.replica_share_LP is None else plan.replica_share_LP[layer]
        slots = layer_slots(row, experts, ranks, plan.ranks_per_node, given)
        share_P = slots.share_P
        if profile.sets:
            served = serve_layer(slots, plan.replica_choice, profile.sets[layer].split_heavy())
            share_P = served.share_P
            # a layer whose sets are a sample counts as all of its tokens
            whole = profile.sets[layer].coverage or 1.0
            touched += served.ranks / whole
            nodes += served.nodes / whole
            tokens += served.tokens / whole
        used = row >= 0
        np.add.at(share_LRE[layer], (slots.rank_P[used], row[used]), share_P[used])
    load_WLR = np.einsum("wle,lre->wlr", profile.load_WLE.astype(np.float64), share_LRE, optimize=True)
    pooled = par(load_WLR.sum(axis=0), speed_R)
    windows = par(load_WLR, speed_R)
    kept = None
    if profile.transition_LEE is not None:
        pairs = int(profile.transition_LEE.sum())
        local = np.einsum("lre,lef,lrf->", share_LRE[:-1], profile.transition_LEE, share_LRE[1:], optimize=True)
        kept = float(local / pairs) if pairs else 1.0
    return ProfileEvaluation(
        ranks_touched=touched / max(1, tokens) if profile.sets else None,
        nodes_touched=nodes / max(1, tokens) if profile.sets else None,
        par=float(pooled.mean()),
        par_max=float(pooled.max()),
        par_window_mean=float(windows.mean()),
        par_window_p99=float(np.quantile(windows, 0.99)),
        kept=kept,
    )


class ServedSets(NamedTuple):
    """Totals over the sets of one layer: ranks and nodes touched, tokens served; share_P as `served_share` has it."""

    ranks: int
    nodes: int
    tokens: int
    share_P: npt.NDArray[np.float64]


def serve_layer(slots: LayerSlots, choice: ReplicaChoice, sets: ExpertSets) -> ServedSets:
    """What a layer does to its expert sets, replicas chosen as `choice` does without knowing source ranks.

    Whatever draws needs light sets: give `split_heavy()` ones where experts have replicas.
    """
    slot_HK = serve_sets(slots, choice, sets.expert_HK)
    rank_HK = np.where(slot_HK >= 0, slots.rank_P[slot_HK], -1)
    node_HK = np.where(slot_HK >= 0, slots.node_R[rank_HK], -1)
    return ServedSets(
        ranks=int(distinct(rank_HK) @ sets.weight_H),
        nodes=int(distinct(node_HK) @ sets.weight_H),
        tokens=int(sets.weight_H[(slot_HK >= 0).any(axis=1)].sum()),
        share_P=served_share(slots, slot_HK, sets.weight_H),
    )


def distinct(group_HK: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Distinct groups of each set, -1 meaning none, (H,)."""
    ordered = np.sort(group_HK, axis=1)
    fresh = np.diff(ordered, axis=1, prepend=-1) != 0
    return np.asarray((fresh & (ordered >= 0)).sum(axis=1))
