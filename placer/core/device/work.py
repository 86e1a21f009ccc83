"""DeviceWork: how many tokens each iteration sends to every expert at every level of the ladder.

Legend: B iterations, L routing sites, E experts, K levels (k-th entry: level k + 1).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.errors import MismatchError, UsageError

__all__ = ["DeviceWork", "clip_levels", "tokens_on_planes"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceWork:
    """What a device has to do, iteration by iteration; all sites of an iteration share its tokens.

    tokens_B         tokens of each iteration
    count_BLEK       tokens that use an expert at exactly this level; an expert with zeros only is not touched
    predicted_BLEK   what a predictor expects of site l when site l - 1 has been routed (site 0: before the iteration),
                     or None where nothing is predicted
    """

    tokens_B: IntArray
    count_BLEK: IntArray
    predicted_BLEK: IntArray | None = None

    def __post_init__(self) -> None:
        if self.count_BLEK.ndim != 4 or len(self.tokens_B) != len(self.count_BLEK):
            raise UsageError(
                f"work.count_BLEK is {self.count_BLEK.shape} for {len(self.tokens_B)} iterations; give (iterations, "
                "sites, experts, levels)"
            )
        predicted = self.predicted_BLEK
        if predicted is not None and predicted.shape != self.count_BLEK.shape:
            raise UsageError(f"work.predicted_BLEK is {predicted.shape}; give {self.count_BLEK.shape}")
        for name, array in (
            ("tokens_B", self.tokens_B),
            ("count_BLEK", self.count_BLEK),
            ("predicted_BLEK", predicted),
        ):
            if array is not None and array.size and int(array.min()) < 0:
                raise UsageError(f"work.{name} has {int(array.min())}; counts are 0 or more")

    @property
    def num_iterations(self) -> int:
        """B."""
        return len(self.tokens_B)

    def clipped(self, ceiling_LE: IntArray) -> "DeviceWork":
        """The same work with no demand above each expert's ceiling (a level from 1); raises MismatchError."""
        if ceiling_LE.shape != self.count_BLEK.shape[1:3]:
            raise MismatchError(
                f"the plan has ceilings for {ceiling_LE.shape} (sites, experts), the work {self.count_BLEK.shape[1:3]}"
            )
        predicted = None if self.predicted_BLEK is None else clip_levels(self.predicted_BLEK, ceiling_LE)
        return DeviceWork(
            tokens_B=self.tokens_B, count_BLEK=clip_levels(self.count_BLEK, ceiling_LE), predicted_BLEK=predicted
        )


def clip_levels(count_XLEK: IntArray, ceiling_LE: IntArray) -> IntArray:
    """Counts with everything above level `ceiling_LE` moved down to it; totals stay."""
    levels = np.arange(1, count_XLEK.shape[-1] + 1)
    above_LEK = levels > ceiling_LE[..., None]
    clipped = np.where(above_LEK, 0, count_XLEK)
    clipped += np.where(levels == ceiling_LE[..., None], np.where(above_LEK, count_XLEK, 0).sum(-1)[..., None], 0)
    return clipped


def tokens_on_planes(count_XK: IntArray, *, nested: bool) -> IntArray:
    """Tokens that use each plane, D2MoE's B. Nested: those at this level or above; copies: those at this level."""
    return np.flip(np.cumsum(np.flip(count_XK, -1), axis=-1), -1) if nested else count_XK
