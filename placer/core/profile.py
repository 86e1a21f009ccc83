"""Profile: what a solver may know of a routing trace. Small, without prompts or token ids.

Legend: L routing sites, E logical experts, K top-k, W windows, F request folds, S source ranks, H expert sets.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from placer.core.model import ModelSpec

__all__ = ["ExpertSets", "Profile"]


@dataclass(frozen=True, slots=True)
class ExpertSets:
    """Distinct sets of experts that tokens chose together in one layer: the hyperedges of co-activation.

    `expert_HK` int16, ids ascending in each row, -1 where a set has fewer than K; rows in lexicographic order.
    `weight_H` int64 tokens per set. `coverage` is the share of the layer's tokens that the rows stand for (1.0 = all).
    """

    expert_HK: npt.NDArray[np.int16]
    weight_H: npt.NDArray[np.int64]
    coverage: float = 1.0

    def __post_init__(self) -> None:
        if self.expert_HK.ndim != 2 or self.weight_H.shape != (self.expert_HK.shape[0],):
            raise UsageError(
                f"expert sets: expert_HK {self.expert_HK.shape} and weight_H {self.weight_H.shape} do not match"
            )

    def split_heavy(self, parts: int = 4000) -> "ExpertSets":
        """The same sets with none heavier than about 1 / parts of the layer, as copies.

        The tokens of a set choose replicas one by one, not all alike: whatever draws once per row needs light rows.
        """
        copies_H = np.maximum(1, -(-self.weight_H * parts // max(1, int(self.weight_H.sum()))))
        weight_H, rest_H = np.divmod(self.weight_H, copies_H)
        copy = np.arange(copies_H.sum()) - np.repeat(np.cumsum(copies_H) - copies_H, copies_H)
        split_H = np.repeat(weight_H, copies_H) + (copy < np.repeat(rest_H, copies_H))
        return ExpertSets(np.repeat(self.expert_HK, copies_H, axis=0), split_H, self.coverage)


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """Counts over one set of requests.

    load_WLE        int64  tokens that chose expert e of site l in window w (windows are runs of `window_tokens` tokens)
    load_FLE        int64  the same per fold; a request lies wholly in one of F folds (for drift between requests)
    coactivation_LEE int64 tokens that chose both experts; symmetric, diagonal 0
    transition_LEE  int64  (L-1, E, E) pairs (expert i at site l, expert j at site l+1) of one token
    load_SLE        int64  tokens of source rank s that chose e, or None where the trace has no source ranks
    sets            one ExpertSets per site, or () where only counts are known
    """

    model: ModelSpec
    trace_sha256: str
    num_tokens: int
    num_requests: int
    window_tokens: int
    load_WLE: npt.NDArray[np.int64]
    load_FLE: npt.NDArray[np.int64]
    coactivation_LEE: npt.NDArray[np.int64] | None = None
    transition_LEE: npt.NDArray[np.int64] | None = None
    load_SLE: npt.NDArray[np.int64] | None = None
    sets: tuple[ExpertSets, ...] = ()

    def __post_init__(self) -> None:
        layers, experts = self.model.num_sites, self.model.num_experts
        if self.load_WLE.shape[1:] != (layers, experts):
            raise UsageError(f"profile.load_WLE is {self.load_WLE.shape}; the model needs (W, {layers}, {experts})")
        if self.load_FLE.shape[1:] != (layers, experts):
            raise UsageError(f"profile.load_FLE is {self.load_FLE.shape}; the model needs (F, {layers}, {experts})")
        counts = ("load_WLE", "load_FLE", "coactivation_LEE", "transition_LEE", "load_SLE")
        for name in counts:
            array = getattr(self, name)
            if array is not None and array.dtype.kind not in "iu":
                raise UsageError(f"profile.{name} is {array.dtype}; give whole counts of tokens")
            if array is not None and (array < 0).any():
                raise UsageError(f"profile.{name} has negative counts")
        pairs = (layers, experts, experts)
        if self.coactivation_LEE is not None and self.coactivation_LEE.shape != pairs:
            raise UsageError(f"profile.coactivation_LEE is {self.coactivation_LEE.shape}; the model needs {pairs}")
        pairs = (layers - 1, experts, experts)
        if self.transition_LEE is not None and self.transition_LEE.shape != pairs:
            raise UsageError(f"profile.transition_LEE is {self.transition_LEE.shape}; the model needs {pairs}")
        if self.load_SLE is not None and self.load_SLE.shape[1:] != (layers, experts):
            raise UsageError(f"profile.load_SLE is {self.load_SLE.shape}; the model needs (S, {layers}, {experts})")
        if self.sets and len(self.sets) != layers:
            raise UsageError(f"profile.sets has {len(self.sets)} layers; the model has {layers}")

    @property
    def load_LE(self) -> npt.NDArray[np.int64]:
        """Tokens per site and expert over all windows, (L, E)."""
        return self.load_WLE.sum(axis=0)
