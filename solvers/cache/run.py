"""CacheRun: how often the experts that steps needed were in the cache, layer by layer.

Legend: L routing sites.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["CacheRun"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CacheRun:
    """Counts of one cache over one run. Weights are only ever read: nothing is written back.

    slots            experts that one layer's cache holds (ExpertFlow: on average; its layers share them)
    accesses_L       experts that the steps needed         hits_L   those that were in the cache when their layer began
    prefetched_L     experts loaded before their layer began because a predictor named them, needed or not
    most_held        the most experts held at once by a layer's cache (ExpertFlow: by all layers together)
    """

    slots: int
    accesses_L: IntArray
    hits_L: IntArray
    prefetched_L: IntArray
    most_held: int

    @property
    def misses_L(self) -> IntArray:
        """Experts loaded on demand, (L,): their layer waits for them."""
        return self.accesses_L - self.hits_L

    @property
    def loads(self) -> int:
        """Experts loaded in all, on demand and ahead."""
        return int(self.misses_L.sum() + self.prefetched_L.sum())

    @property
    def hit_rate(self) -> float:
        """Hits over accesses, all layers together; 1.0 where nothing was needed."""
        accesses = int(self.accesses_L.sum())
        return int(self.hits_L.sum()) / accesses if accesses else 1.0

    @property
    def loads_per_access(self) -> float:
        """Experts loaded for every expert needed; above 1 where prefetching loads more in vain than the cache saves."""
        return self.loads / max(1, int(self.accesses_L.sum()))
