"""LoadCounts: how often each expert was chosen, from sources that kept no tokens.

Legend: W windows (dumps, passes), L layers, E experts, F folds.
"""

import hashlib
import json
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from placer.core.model import ModelSpec, Site
from placer.core.profile import Profile

__all__ = ["LoadCounts", "load_counts_profile", "model_of_counts"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LoadCounts:
    """Selections per window, site and expert, int64 (W, L, E). Marginals only: no co-activation, no transitions."""

    model: ModelSpec
    load_WLE: npt.NDArray[np.int64]
    notes: tuple[str, ...] = ()
    provenance: str = ""

    def __post_init__(self) -> None:
        layers, experts = self.model.num_sites, self.model.num_experts
        if self.load_WLE.dtype != np.int64 or self.load_WLE.ndim != 3 or self.load_WLE.shape[1:] != (layers, experts):
            raise UsageError(
                f"counts.load_WLE is {self.load_WLE.dtype} {self.load_WLE.shape}; the model needs int64 "
                f"(windows, {layers}, {experts})"
            )
        if self.load_WLE.size and int(self.load_WLE.min()) < 0:
            raise UsageError(f"counts.load_WLE has {int(self.load_WLE.min())}; counts are 0 or more")

    @property
    def load_LE(self) -> npt.NDArray[np.int64]:
        """Selections per site and expert over all windows, (L, E)."""
        return np.asarray(self.load_WLE.sum(axis=0))

    @property
    def sha256(self) -> str:
        """Hash of the model and the counts."""
        head = json.dumps([self.model.to_dict(), self.load_WLE.shape], sort_keys=True)
        return hashlib.sha256(head.encode() + np.ascontiguousarray(self.load_WLE).tobytes()).hexdigest()


def load_counts_profile(counts: LoadCounts) -> Profile:
    """The profile of `counts`: its windows as they are, one fold, no sets, pairs or transitions.

    The number of tokens is the busiest layer's selections over top-k; requests are unknown, so num_requests is 0.
    """
    per_layer = counts.load_LE.sum(axis=1)
    tokens = int(-(-per_layer.max(initial=0) // counts.model.top_k))
    windows = len(counts.load_WLE)
    return Profile(
        model=counts.model,
        trace_sha256=counts.sha256,
        num_tokens=tokens,
        num_requests=0,
        window_tokens=max(1, -(-tokens // max(1, windows))),
        load_WLE=counts.load_WLE,
        load_FLE=counts.load_LE[None],
    )


def model_of_counts(layer_ids: tuple[int, ...], num_hidden_layers: int, experts: int) -> tuple[ModelSpec, str]:
    """A model for counts that came without one, and the note that says what was guessed."""
    model = ModelSpec(
        name="unknown",
        num_hidden_layers=num_hidden_layers,
        sites=tuple(Site(layer=layer, num_experts=experts) for layer in layer_ids),
        top_k=1,
        hidden_size=4096,
        moe_intermediate_size=2048,
    )
    note = (
        f"model: {experts} experts in {len(layer_ids)} layers; top-k is unknown (1 assumed), hidden size 4096 and "
        "expert size 2048 are assumed; give --model to be sure"
    )
    return model, note
