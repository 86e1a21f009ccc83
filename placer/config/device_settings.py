"""What the device planner may choose from, as the YAML will name it."""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from placer.core.device.cache import CACHE_POLICIES, CachePolicy
from placer.core.device.items import ORDER_RULES, OrderRule
from placer.core.errors import UsageError

__all__ = ["DevicePlanSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlanSettings:
    """What the planner may choose from.

    orders, caches      rules and policies to try (belady knows the future, so no plan may rest on it)
    most_quality_cost   how much error clipping may add, mean over (token, expert) uses; None: no clipping
    solver              who solves the knapsack of the last step: greedy with exchanges, or CP-SAT within time_limit_s
    """

    orders: tuple[OrderRule, ...] = ("hebf", "resident_first")
    caches: tuple[CachePolicy, ...] = ("none", "lru")
    most_quality_cost: float | None = None
    solver: Literal["greedy", "cpsat"] = "greedy"
    time_limit_s: float = 10.0

    def __post_init__(self) -> None:
        for name, known in (("orders", ORDER_RULES), ("caches", CACHE_POLICIES)):
            values = getattr(self, name)
            if not values or any(value not in known for value in values):
                raise UsageError(f"plan.{name} is {values!r}; give one or more of {', '.join(known)}")
        if "none" not in self.caches or "belady" in self.caches:
            raise UsageError(f"plan.caches is {self.caches!r}; it has to have none, and belady must know the future")
        most = self.most_quality_cost
        if most is not None and not 0 <= most < np.inf:
            raise UsageError(f"plan.most_quality_cost is {most!r}; give an error, 0 or more, or leave it out")
        if self.solver not in ("greedy", "cpsat"):
            raise UsageError(f"plan.solver is {self.solver!r}; use greedy or cpsat")
        if not 0 < self.time_limit_s < np.inf:
            raise UsageError(f"plan.time_limit_s is {self.time_limit_s!r}; give a positive number of seconds")
