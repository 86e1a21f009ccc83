"""What a routing trace is like, in the figures that decide whether placement can gain anything.

Legend: L routing sites, E experts, W windows, T tokens, K top-k.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from placer.core.profile import Profile
from traces.counts import LoadCounts
from traces.summarize import Progress, summarize
from traces.trace import RoutingTrace

__all__ = ["affinity_ratio", "contiguous_imbalance", "load_statistics", "skew", "trace_statistics", "window_drift"]


def trace_statistics(
    trace: RoutingTrace,
    ranks: Sequence[int] = (4, 8),
    *,
    window_tokens: int = 2048,
    profile: Profile | None = None,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Figures of a trace as plain JSON types; give `profile` where it is already there.

    skew            max / mean expert load: min, median and max over the sites
    affinity_ratio  see `affinity_ratio`; None for a single site
    imbalance       {ranks: mean over sites of max / mean rank load with contiguous blocks of experts}
    drift           mean total variation between the loads of consecutive windows, and drift_noise: what windows of
                    the same size drawn from one distribution would show (sampling alone)
    mean_k          experts per token and site      empty_rows  share of (token, site) rows without any
    """
    if profile is None:
        # one set per layer: they are not needed here
        profile = summarize(trace, window_tokens=window_tokens, folds=1, max_sets_per_layer=1, progress=progress)
    picks = int(profile.load_WLE.sum())
    rows = trace.num_tokens * trace.model.num_sites
    drift, noise = window_drift(profile.load_WLE)
    return {
        "tokens": trace.num_tokens,
        "requests": trace.num_requests,
        "layers": trace.model.num_sites,
        "experts": trace.model.num_experts,
        **_load_figures(profile.load_LE, [site.num_experts for site in trace.model.sites], ranks),
        "affinity_ratio": affinity_ratio(profile),
        "drift": drift,
        "drift_noise": noise,
        "mean_k": picks / rows,
        "empty_rows": _empty_rows(trace) / rows,
    }


def load_statistics(counts: LoadCounts, ranks: Sequence[int] = (4, 8)) -> dict[str, Any]:
    """The figures that counts alone allow: skew, imbalance, drift between the windows."""
    drift, _ = window_drift(counts.load_WLE)
    return {
        "selections": int(counts.load_WLE.sum()),
        "windows": len(counts.load_WLE),
        "layers": counts.model.num_sites,
        "experts": counts.model.num_experts,
        **_load_figures(counts.load_LE, [site.num_experts for site in counts.model.sites], ranks),
        "drift": drift,
    }


def skew(load_LE: npt.NDArray[np.int64], num_experts: Sequence[int]) -> npt.NDArray[np.float64]:
    """max / mean load over each site's own experts, (L,); 1.0 where a site was never used."""
    totals = load_LE.sum(axis=1)
    means = totals / np.asarray(num_experts)
    return np.divide(load_LE.max(axis=1), means, out=np.ones(len(load_LE)), where=totals > 0)


def contiguous_imbalance(load_LE: npt.NDArray[np.int64], num_experts: Sequence[int], ranks: int) -> float:
    """Mean over used sites of max / mean rank load when rank r holds the r-th block of expert ids, as engines start."""
    if ranks < 1:
        raise UsageError(f"ranks is {ranks}; give 1 or more")
    ratios = []
    for load_E, experts in zip(load_LE, num_experts, strict=True):
        if load_E.sum():
            rank_of_E = np.arange(experts) * ranks // experts
            load_R = np.bincount(rank_of_E, weights=load_E[:experts], minlength=ranks)
            ratios.append(load_R.max() / load_R.mean())
    return float(np.mean(ratios)) if ratios else 1.0


def affinity_ratio(profile: Profile) -> float | None:
    """How much better the expert before tells the next one than popularity does; 1.0 where it tells nothing.

    For each pair of consecutive sites, the mean over the first site's experts (by their pairs) of the largest
    conditional share of a next expert, over the largest unconditional share; then the mean over pairs of sites.
    """
    if profile.transition_LEE is None or not len(profile.transition_LEE):
        return None
    ratios = []
    for pairs_EE in profile.transition_LEE:
        total = pairs_EE.sum()
        if total:
            # sum over i of P(i) max_j P(j | i) = sum of row maxima / total
            ratios.append((pairs_EE.max(axis=1).sum() / total) / (pairs_EE.sum(axis=0).max() / total))
    return float(np.mean(ratios)) if ratios else None


def window_drift(load_WLE: npt.NDArray[np.int64]) -> tuple[float | None, float | None]:
    """Mean total variation of consecutive windows' loads over sites, and that of sampling noise (normal approximation).

    Noise: two samples of n1 and n2 picks from shares p differ in share e with variance p (1 - p) (1/n1 + 1/n2), and a
    normal variable's mean absolute value is sqrt(2 / pi) times its deviation; picks of one token count as independent.
    """
    if len(load_WLE) < 2:
        return None, None
    picks_WL = load_WLE.sum(axis=2)
    both_WL = (picks_WL[1:] > 0) & (picks_WL[:-1] > 0)
    if not both_WL.any():
        return None, None
    share_WLE = load_WLE / np.maximum(picks_WL, 1)[:, :, None]
    variation_WL = 0.5 * np.abs(np.diff(share_WLE, axis=0)).sum(axis=2)
    load_LE = load_WLE.sum(axis=0)
    share_LE = load_LE / np.maximum(load_LE.sum(axis=1, keepdims=True), 1)
    spread_L = np.sqrt(share_LE * (1 - share_LE)).sum(axis=1)
    inverse_WL = 1 / np.maximum(picks_WL[1:], 1) + 1 / np.maximum(picks_WL[:-1], 1)
    noise_WL = 0.5 * np.sqrt(2 / np.pi) * spread_L * np.sqrt(inverse_WL)
    return float(variation_WL[both_WL].mean()), float(noise_WL[both_WL].mean())


def _load_figures(load_LE: npt.NDArray[np.int64], num_experts: Sequence[int], ranks: Sequence[int]) -> dict[str, Any]:
    skew_L = skew(load_LE, num_experts)
    return {
        "skew": {"min": float(skew_L.min()), "median": float(np.median(skew_L)), "max": float(skew_L.max())},
        "imbalance": {str(count): contiguous_imbalance(load_LE, num_experts, count) for count in ranks},
    }


def _empty_rows(trace: RoutingTrace, chunk_tokens: int = 1 << 16) -> int:
    empty = 0
    for row, site in enumerate(trace.model.sites):
        for start in range(0, trace.num_tokens, chunk_tokens):
            part_TK = trace.expert_LTK[row, start : start + chunk_tokens]
            empty += int((part_TK >= site.num_experts).all(axis=1).sum())
    return empty
