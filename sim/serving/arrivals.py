"""When requests come and how long they are: Poisson, bursts, lengths by distribution; all from one seeded generator.

Legend: Q requests.
"""

import math
from dataclasses import dataclass, field
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from sim.serving.limits import NS_PER_S, checked_number, checked_whole
from sim.serving.requests import Workload

__all__ = ["Arrivals", "Lengths", "make_workload"]

IntArray = npt.NDArray[np.int64]
MOST_REQUESTS = 10_000_000

ArrivalKind = Literal["poisson", "bursts"]
LengthKind = Literal["fixed", "uniform", "lognormal"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Token counts. fixed: `mean`. uniform: from 1 to 2 mean - 1. lognormal: with that mean and `sigma` of the log.

    Cut to `most`; 1 at least.
    """

    kind: LengthKind = "lognormal"
    mean: float = 512.0
    sigma: float = 0.8
    most: int = 131_072

    def __post_init__(self) -> None:
        if self.kind not in get_args(LengthKind):
            raise UsageError(f"lengths.kind is {self.kind!r}; use one of {', '.join(get_args(LengthKind))}")
        checked_number("lengths.mean", self.mean)
        checked_number("lengths.sigma", self.sigma, zero=True)
        checked_whole("lengths.most", self.most)
        if self.mean < 1:
            raise UsageError(f"lengths.mean is {self.mean}; a request has 1 token or more")
        if self.sigma > 5:
            raise UsageError(f"lengths.sigma is {self.sigma}; the log of a length does not vary by more than 5")

    def draw(self, count: int, rng: np.random.Generator) -> IntArray:
        """So many lengths, (count,)."""
        if self.kind == "fixed":
            drawn = np.full(count, self.mean)
        elif self.kind == "uniform":
            drawn = rng.uniform(0.5, 2 * self.mean - 0.5, count)
        else:
            drawn = rng.lognormal(math.log(self.mean) - self.sigma**2 / 2, self.sigma, count)
        return np.clip(np.rint(drawn), 1, self.most).astype(np.int64)


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrivals:
    """How requests come. `requests` None: until the horizon.

    poisson: `rate_per_s`. bursts: a two-state Markov-modulated Poisson process: `burst_factor` times the calm rate for
    `burst_s` seconds on average, then calm for `calm_s`; `rate_per_s` is the mean over both.
    """

    kind: ArrivalKind = "poisson"
    rate_per_s: float = 10.0
    requests: int | None = 1000
    burst_factor: float = 5.0
    burst_s: float = 5.0
    calm_s: float = 20.0
    input: Lengths = field(default_factory=lambda: Lengths(mean=512.0))
    output: Lengths = field(default_factory=lambda: Lengths(mean=128.0))

    def __post_init__(self) -> None:
        if self.kind not in get_args(ArrivalKind):
            raise UsageError(f"arrivals.kind is {self.kind!r}; use one of {', '.join(get_args(ArrivalKind))}")
        for name in ("rate_per_s", "burst_factor", "burst_s", "calm_s"):
            checked_number(f"arrivals.{name}", getattr(self, name))
        if self.requests is not None:
            checked_whole("arrivals.requests", self.requests)
            if self.requests > MOST_REQUESTS:
                raise UsageError(f"arrivals.requests is {self.requests}; give at most {MOST_REQUESTS}")


def make_workload(arrivals: Arrivals, horizon_s: float, rng: np.random.Generator) -> Workload:
    """The requests that come before the horizon. Raises UsageError where they would be too many to hold."""
    if min(arrivals.requests or MOST_REQUESTS + 1, arrivals.rate_per_s * horizon_s) > MOST_REQUESTS:
        raise UsageError(
            f"arrivals.rate_per_s {arrivals.rate_per_s:g} for {horizon_s:g} s makes over {MOST_REQUESTS} requests; "
            "give arrivals.requests or a shorter limits.horizon_s"
        )
    time_rng, input_rng, output_rng = rng.spawn(3)
    wanted = arrivals.requests
    if arrivals.kind == "poisson":
        seconds_Q = _poisson(arrivals.rate_per_s, horizon_s, wanted, time_rng)
    else:
        seconds_Q = _bursts(arrivals, horizon_s, wanted, time_rng)
    count = len(seconds_Q)
    return Workload(
        arrival_ns_Q=np.rint(seconds_Q * NS_PER_S).astype(np.int64),
        input_Q=arrivals.input.draw(count, input_rng),
        output_Q=arrivals.output.draw(count, output_rng),
    )


def _poisson(rate: float, horizon_s: float, wanted: int | None, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Times of arrival up to the horizon, at most `wanted`."""
    parts, last, count = [], 0.0, 0
    while last < horizon_s and (wanted is None or count < wanted):
        chunk = 4096 if wanted is None else min(wanted - count, 1 << 16)
        times = last + np.cumsum(rng.exponential(1 / rate, chunk))
        last, count = float(times[-1]), count + chunk
        parts.append(times)
    times = np.concatenate(parts)
    return times[times < horizon_s]


def _bursts(
    arrivals: Arrivals, horizon_s: float, wanted: int | None, rng: np.random.Generator
) -> npt.NDArray[np.float64]:
    cycle_s = arrivals.burst_s + arrivals.calm_s
    calm_rate = arrivals.rate_per_s * cycle_s / (arrivals.burst_factor * arrivals.burst_s + arrivals.calm_s)
    parts, start, count, bursting = [np.zeros(0)], 0.0, 0, False
    while start < horizon_s and (wanted is None or count < wanted):
        length = float(rng.exponential(arrivals.burst_s if bursting else arrivals.calm_s))
        rate = calm_rate * (arrivals.burst_factor if bursting else 1.0)
        # given their number, the arrivals of a Poisson process are uniform
        times = start + np.sort(rng.uniform(0.0, length, int(rng.poisson(rate * length))))
        parts.append(times)
        start, count, bursting = start + length, count + len(times), not bursting
    times = np.concatenate(parts)
    return times[times < horizon_s][:wanted]
