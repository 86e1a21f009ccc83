"""Judgement of a plan on a Profile alone: for users who share counts, not traces.

Legend: L sites, H expert sets, E experts, P slots, R ranks, W windows.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.errors import MismatchError
from placer.core.evaluate import par
from placer.core.plan import Plan
from placer.core.profile import ExpertSets, Profile

__all__ = ["ProfileEvaluation", "evaluate_profile"]


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


def evaluate_profile(plan: Plan, profile: Profile) -> ProfileEvaluation:
    """Ranks and nodes touched, PAR and kept share of `plan` on the profile's own requests.

    Raises MismatchError where plan and profile are of different shapes.
    """
    experts, ranks = plan.num_experts, plan.num_ranks
    if (len(plan.slot_expert_LP), experts) != (profile.model.num_sites, profile.model.num_experts):
        raise MismatchError(
            f"the plan has {len(plan.slot_expert_LP)} MoE layers of {experts} experts, the profile "
            f"{profile.model.num_sites} of {profile.model.num_experts}; use the profile's own plan or solve again"
        )
    held_LRE = np.zeros((len(plan.slot_expert_LP), ranks, experts))
    layer, slot = np.nonzero(plan.slot_expert_LP >= 0)
    share = None if plan.replica_share_LP is None else plan.replica_share_LP[layer, slot]
    # EPLB may put an expert on a rank twice: its shares add up
    held = (layer, slot // plan.slots_per_rank, plan.slot_expert_LP[layer, slot])
    np.add.at(held_LRE, held, 1.0 if share is None else share)
    held_LRE /= np.maximum(1e-300, held_LRE.sum(axis=1, keepdims=True))
    load_WLR = np.einsum("wle,lre->wlr", profile.load_WLE.astype(np.float64), held_LRE, optimize=True)
    pooled = par(load_WLR.sum(axis=0))
    windows = par(load_WLR)
    nodes_LNE = held_LRE.reshape(len(held_LRE), -1, plan.ranks_per_node, experts).sum(axis=2)
    kept = None
    if profile.transition_LEE is not None:
        pairs = int(profile.transition_LEE.sum())
        local = np.einsum("lre,lef,lrf->", held_LRE[:-1], profile.transition_LEE, held_LRE[1:], optimize=True)
        kept = float(local / pairs) if pairs else 1.0
    return ProfileEvaluation(
        ranks_touched=_mean_touched(held_LRE > 0, profile.sets),
        nodes_touched=_mean_touched(nodes_LNE > 0, profile.sets),
        par=float(pooled.mean()),
        par_max=float(pooled.max()),
        par_window_mean=float(windows.mean()),
        par_window_p99=float(np.quantile(windows, 0.99)),
        kept=kept,
    )


def _mean_touched(held_LGE: npt.NDArray[np.bool_], sets: tuple[ExpertSets, ...]) -> float | None:
    """Mean over all tokens of all layers; a layer whose sets are a sample counts as all of its tokens."""
    touched = tokens = 0.0
    for held_GE, layer in zip(held_LGE, sets, strict=True):
        share = layer.coverage or 1.0
        touched += _touched(held_GE, layer.expert_HK, layer.weight_H) / share
        tokens += int((layer.weight_H * (layer.expert_HK >= 0).any(axis=1)).sum()) / share
    return touched / max(1, tokens) if sets else None


def _touched(held_GE: npt.NDArray[np.bool_], expert_HK: npt.NDArray[np.int16], weight_H: npt.NDArray[np.int64]) -> int:
    """Weighted number of groups that cover each set; sets without experts do not count."""
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
    return int((visited.sum(axis=1) * weight_H).sum())
