"""Settings of `placer device`: which tokens run together, what they demand, and what the planner may choose from."""

import math
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from placer.core.device.cache import CACHE_POLICIES, CachePolicy
from placer.core.device.items import ORDER_RULES, OrderRule
from placer.core.errors import UsageError

__all__ = ["DevicePlanSettings", "DeviceSettings"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlanSettings:
    """What the planner may choose from.

    orders, caches      rules and policies to try (belady knows the future, so no plan may rest on it)
    most_quality_cost   how much error clipping may add, mean over (token, expert) uses; None: no clipping
    solver              who solves the knapsack of the last step: greedy with exchanges, or CP-SAT within time_limit_s
    """

    orders: tuple[OrderRule, ...] = ("johnson", "resident_first", "by_id")
    caches: tuple[CachePolicy, ...] = ("none", "lru", "d2moe")
    most_quality_cost: float | None = None
    solver: Literal["greedy", "cpsat"] = "greedy"
    time_limit_s: float = 10.0

    def __post_init__(self) -> None:
        for name, known in (("orders", ORDER_RULES), ("caches", CACHE_POLICIES)):
            values = getattr(self, name)
            if not values or any(value not in known for value in values):
                raise UsageError(f"device.plan.{name} is {values!r}; give one or more of {', '.join(known)}")
        if "none" not in self.caches or "belady" in self.caches:
            raise UsageError(
                f"device.plan.caches is {self.caches!r}; it has to have none, and belady must know the future"
            )
        most = self.most_quality_cost
        if most is not None and not 0 <= most < np.inf:
            raise UsageError(f"device.plan.most_quality_cost is {most!r}; give an error, 0 or more, or leave it out")
        if self.solver not in ("greedy", "cpsat"):
            raise UsageError(f"device.plan.solver is {self.solver!r}; use greedy or cpsat")
        if not 0 < self.time_limit_s < np.inf:
            raise UsageError(f"device.plan.time_limit_s is {self.time_limit_s!r}; give a positive number of seconds")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """Work of one device.

    batching     decode: so many requests at a time, one token of each; prefill: so many tokens of the trace in order
    batch        that many requests or tokens
    iterations   the first so many batches     warmup   of a measured run: so many before, not counted
    bits         what every token demands (null: what the trace says, else by bit_shares, else the ladder's highest)
    bit_shares   demand drawn at random, a share for every level, for traces without bits
    predictor    what is read ahead, learnt from --learn: none, popularity, transition or token_id
    positions    length of the windows that text is cut into to quantise, and to train bit routers
    bit_steps, bit_alpha   steps of training bit routers, and the weight of a bit in their loss
    """

    batching: Literal["decode", "prefill"] = "decode"
    batch: int = 16
    iterations: int = 100
    warmup: int = 2
    bits: int | None = None
    bit_shares: tuple[float, ...] = ()
    predictor: Literal["none", "popularity", "transition", "token_id"] = "none"
    positions: int = 256
    bit_steps: int = 200
    bit_alpha: float = 0.01
    seed: int = 0
    plan: DevicePlanSettings = field(default_factory=DevicePlanSettings)

    def __post_init__(self) -> None:
        for name, least in (
            ("batch", 1),
            ("iterations", 1),
            ("warmup", 0),
            ("positions", 2),
            ("bit_steps", 1),
            ("seed", 0),
        ):
            if getattr(self, name) < least:
                raise UsageError(f"device.{name} is {getattr(self, name)}; give {least} or more")
        if not 0 <= self.bit_alpha < math.inf:
            raise UsageError(f"device.bit_alpha is {self.bit_alpha}; give nats for a bit, 0 or more")
        if self.bit_shares and (min(self.bit_shares) < 0 or abs(sum(self.bit_shares) - 1) > 1e-6):
            raise UsageError(f"device.bit_shares is {list(self.bit_shares)}; give shares that add up to 1")
