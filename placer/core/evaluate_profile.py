"""Judgement of a plan on a Profile alone: for users who share counts, not traces.

Legend: L sites, H expert sets, E experts, P slots, R ranks, W windows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.evaluate import par
from placer.core.plan import Plan
from placer.core.profile import Profile

__all__ = ["ProfileEvaluation", "evaluate_profile"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileEvaluation:
    """As placer.core.evaluate.Evaluation, from counts. None where the profile does not hold what is needed.

    With replicas these are estimates: loads are shared as the plan says, a replicated expert is taken to add no rank to
    a set that touches one of its ranks anyway. Without replicas every number is exact.
    """

    ranks_touched: float | None
    nodes_touched: float | None
    par: float
    par_max: float
    par_window_mean: float
    par_window_p99: float
    kept: float | None


def evaluate_profile(plan: Plan, profile: Profile) -> ProfileEvaluation:
    """Ranks and nodes touched, PAR and kept share of `plan` on the profile's own requests."""
    experts, ranks = plan.num_experts, plan.num_ranks
    held_LRE = np.zeros((len(plan.slot_expert_LP), ranks, experts))
    layer, slot = np.nonzero(plan.slot_expert_LP >= 0)
    share = None if plan.replica_share_LP is None else plan.replica_share_LP[layer, slot]
    held_LRE[layer, slot // plan.slots_per_rank, plan.slot_expert_LP[layer, slot]] = 1.0 if share is None else share
    held_LRE /= np.maximum(1e-300, held_LRE.sum(axis=1, keepdims=True))
    load_WLR = np.einsum("wle,lre->wlr", profile.load_WLE.astype(np.float64), held_LRE, optimize=True)
    pooled = par(load_WLR.sum(axis=0))
    windows = par(load_WLR)
    touched = [_touched(held_LRE[i] > 0, sets.expert_HK, sets.weight_H) for i, sets in enumerate(profile.sets)]
    nodes_LNE = held_LRE.reshape(len(held_LRE), -1, plan.ranks_per_node, experts).sum(axis=2)
    nodes = [_touched(nodes_LNE[i] > 0, sets.expert_HK, sets.weight_H) for i, sets in enumerate(profile.sets)]
    kept = None
    if profile.transition_LEE is not None and len(profile.transition_LEE):
        local = np.einsum("lre,lef,lrf->", held_LRE[:-1], profile.transition_LEE, held_LRE[1:], optimize=True)
        kept = float(local / max(1, profile.transition_LEE.sum()))
    return ProfileEvaluation(
        ranks_touched=float(np.mean(touched)) if touched else None,
        nodes_touched=float(np.mean(nodes)) if nodes else None,
        par=float(pooled.mean()),
        par_max=float(pooled.max()),
        par_window_mean=float(windows.mean()),
        par_window_p99=float(np.quantile(windows, 0.99)),
        kept=kept,
    )


def _touched(
    held_GE: npt.NDArray[np.bool_], expert_HK: npt.NDArray[np.int16], weight_H: npt.NDArray[np.int64]
) -> float:
    """Weighted mean number of groups that cover each set; sets without experts do not count."""
    groups = held_GE.shape[0]
    single_E = np.where(held_GE.sum(axis=0) == 1, held_GE.argmax(axis=0), -1)
    chosen = expert_HK >= 0
    expert = np.where(chosen, expert_HK, 0)
    group_HK = np.where(chosen, single_E[expert], -1)
    visited = np.zeros((len(expert_HK), groups), dtype=bool)
    row, column = np.nonzero(group_HK >= 0)
    visited[row, group_HK[row, column]] = True
    for k in range(expert_HK.shape[1]):
        several = np.flatnonzero(chosen[:, k] & (group_HK[:, k] < 0))
        candidates = held_GE[:, expert[several, k]].T
        fresh = several[~(visited[several] & candidates).any(axis=1)]
        visited[fresh, held_GE[:, expert[fresh, k]].argmax(axis=0)] = True
    weight = weight_H * chosen.any(axis=1)
    return float((visited.sum(axis=1) * weight).sum() / max(1, weight.sum()))
