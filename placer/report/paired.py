"""Ratios of measured runs: iterations that ran in the same round are compared with each other, launch by launch.

Legend: I iterations.
"""

from dataclasses import dataclass

import numpy as np

from placer.core.errors import UsageError
from placer.core.timeline import Timeline

__all__ = ["PairedRatio", "paired_ratio"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PairedRatio:
    """Baseline's iteration time / the other's; above 1 the other is faster.

    median          over launches, of the median of a launch's rounds
    low, high       smallest and largest median of a launch
    launches        how many launches, `rounds` how many pairs in all
    wins            rounds in which the other was faster
    """

    median: float
    low: float
    high: float
    launches: int
    rounds: int
    wins: int

    def __str__(self) -> str:
        where = f"{self.launches} launches" if self.launches > 1 else "1 launch"
        return (
            f"{self.median:.3f}x as fast (launch medians {self.low:.3f} to {self.high:.3f}, {where}; "
            f"faster in {self.wins} of {self.rounds} rounds)"
        )


def paired_ratio(baseline: Timeline, other: Timeline) -> PairedRatio:
    """How much faster `other` was than `baseline`, both measured in the same launches (`replay_plans`).

    Iteration i of both ran in one round, in random order, so that drift of the machine cancels. Raises UsageError
    where the two were not measured together.
    """
    counts = [one.about.get("launch_iterations", [one.num_iterations]) for one in (baseline, other)]
    if counts[0] != counts[1] or not sum(counts[0]):
        raise UsageError(
            f"paired ratio: launches of {counts[0]} and of {counts[1]} iterations; measure both plans in one run"
        )
    for name in ("source", "tokens_per_iteration", "trace_sha256", "num_ranks"):
        values = [one.about.get(name) for one in (baseline, other)]
        if values[0] != values[1]:
            raise UsageError(f"paired ratio: {name} differs ({values[0]!r}, {values[1]!r}); measure both in one run")
    ratio_I = baseline.iteration_ns() / np.maximum(1, other.iteration_ns())
    by_launch = [float(np.median(part)) for part in np.split(ratio_I, np.cumsum(counts[0])[:-1])]
    return PairedRatio(
        median=float(np.median(by_launch)),
        low=min(by_launch),
        high=max(by_launch),
        launches=len(by_launch),
        rounds=len(ratio_I),
        wins=int((ratio_I > 1).sum()),
    )
