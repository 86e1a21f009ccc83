"""Tutel's adaptive choice: parallelism r, pipeline degree and all-to-all for every capacity, kept in a dictionary.

One layout of the weights serves all r, so a choice can change from one iteration to the next: every rank holds a
W-th of all expert parameters. r = 0 is data parallel (all weights gathered, no token moves). r >= 1: groups of
(W / E) / r ranks gather the part of an expert that they share, and tokens travel r times. r = W / E gathers nothing.
Reference: Tutel (arXiv 2206.03382), sections 3.1 to 3.3. Times are nanoseconds.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from placer.core.cluster import ClusterSpec, LinkClass
from placer.core.collectives import linear_all_to_all_ns, two_dimensional_all_to_all_ns
from placer.core.errors import UsageError
from placer.core.overlap import ChunkTimes, fsmoe_time
from placer.core.schedule import Algorithm

__all__ = ["DEGREES", "WINDOW", "FlexLayer", "Triple", "best_triple", "most_trials", "tutel_dictionary", "valid_r"]

DEGREES = (1, 2, 4, 8)
ALGORITHMS: tuple[Algorithm, ...] = ("linear", "2dh")
WINDOW = 128
"""Capacities c with the same floor(c / WINDOW) share an entry."""

Triple = tuple[int, int, Algorithm]
"""r, pipeline degree, all-to-all."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FlexLayer:
    """One layer of `num_experts` <= ranks on a cluster. `capacity`, below, is copies for each expert from one rank."""

    cluster: ClusterSpec
    num_experts: int
    copy_bytes: int
    expert_bytes: int
    expert_params: int

    def __post_init__(self) -> None:
        if self.cluster.num_ranks % self.num_experts:
            raise UsageError(
                f"flex.num_experts is {self.num_experts}; it must divide the cluster's {self.cluster.num_ranks} ranks"
            )

    @property
    def shards(self) -> int:
        """W / E, ranks that share an expert."""
        return self.cluster.num_ranks // self.num_experts

    def time_ns(self, capacity: int, triple: Triple) -> float:
        """Forward time: weights gathered, then all-to-all, experts and all-to-all in overlapping chunks."""
        r, degree, algorithm = triple
        compute = self.cluster.compute
        # every rank computes as many copies whatever r is: r times as many tokens by an r-th of the expert each
        flops = 2 * self.expert_params * capacity * self.num_experts
        experts = compute.launch_us * 1e3 + flops / degree / compute.flops_per_ns
        shard = self.expert_bytes / self.shards
        ranks = self.cluster.num_ranks
        if r == 0:
            # without messages there is nothing to overlap
            whole = compute.launch_us * 1e3 + flops / compute.flops_per_ns
            return (ranks - 1) * self._step_ns(ranks, shard) + whole
        group = math.ceil(self.shards / r)
        gathered = (group - 1) * self._step_ns(group, shard)
        message = math.ceil(r * capacity * self.num_experts * self.copy_bytes / ranks / degree)
        form = linear_all_to_all_ns if algorithm == "linear" else two_dimensional_all_to_all_ns
        chunk = ChunkTimes(a2a_ns=form(self.cluster, message), gather_ns=0.0, scatter_ns=0.0, experts_ns=experts)
        return gathered + fsmoe_time(degree, chunk)

    def _step_ns(self, group: int, size: float) -> float:
        """One step of a ring over `group` neighbouring ranks."""
        links: list[LinkClass] = [self.cluster.intra] if self.cluster.ranks_per_node > 1 else []
        if group > self.cluster.ranks_per_node:
            links += [self.cluster.inter, *([] if self.cluster.uplink is None else [self.cluster.uplink])]
        return max((link.alpha_ns + size / link.gbytes_per_s for link in links), default=0.0)


def valid_r(shards: int) -> tuple[int, ...]:
    """What r may be beside 0, ascending: the divisors of W / E, as in Tutel's code."""
    return tuple(r for r in range(1, shards + 1) if shards % r == 0)


def most_trials(shards: int) -> int:
    """The paper's number of trials for one key: (log_1.5 ceil(W / E) + 2) * 4 degrees * 2 all-to-alls, rounded down."""
    return int((math.log(shards, 1.5) + 2) * len(DEGREES) * len(ALGORITHMS))


def best_triple(shards: int, time: Callable[[Triple], float]) -> tuple[Triple, float, int]:
    """The fastest triple, its time, and how many were timed.

    For each degree and all-to-all: r = 0, and a search over the valid r that keeps two thirds or less a step and times
    one new r a step (Fibonacci's, a ternary search whose second point is the next step's first).
    Guarantee: optimal where the time falls, then rises over the valid r (a fall to the end is one too). It does
    wherever gathering over any group uses one link class: then weights cost B / r and tokens A r, a convex sum. It need
    not where small r gather across nodes and larger ones inside: the drop between may hide a second valley.
    """
    best, least, trials = (0, DEGREES[0], ALGORITHMS[0]), math.inf, 0
    for degree in DEGREES:
        for algorithm in ALGORITHMS:
            known = _Known(time, degree, algorithm)
            known.at(0)
            _search(valid_r(shards), known)
            trials += len(known.times)
            r, value = min(known.times.items(), key=lambda item: item[1])
            if value < least:
                best, least = (r, degree, algorithm), value
    return best, least, trials


@dataclass(slots=True)
class _Known:
    """Times by r for one degree and all-to-all, each asked for once."""

    time: Callable[[Triple], float]
    degree: int
    algorithm: Algorithm
    times: dict[int, float] = field(default_factory=dict)

    def at(self, r: int) -> float:
        if r not in self.times:
            self.times[r] = self.time((r, self.degree, self.algorithm))
        return self.times[r]


def _search(candidates: tuple[int, ...], known: _Known) -> None:
    """Times candidates until the least of a sequence that falls, then rises is among them."""

    def at(place: int) -> float:
        # beyond the end lies infinity, so that the length is a Fibonacci number less one
        return known.at(candidates[place]) if place < len(candidates) else math.inf

    start, small, large = 0, 1, 2
    while large - 1 < len(candidates):
        small, large = large, small + large
    while large > 2:
        left, right = start + large - small - 1, start + small - 1
        if at(left) > at(right):
            start = left + 1
        small, large = large - small, small
    at(start)


def tutel_dictionary(layer: FlexLayer, most_capacity: int) -> dict[int, Triple]:
    """floor(capacity / 128) -> (r, degree, all-to-all) up to `most_capacity`, timed at each key's middle."""
    triple_of_key = {}
    for key in range(most_capacity // WINDOW + 1):
        middle = key * WINDOW + WINDOW // 2
        triple_of_key[key], _, _ = best_triple(layer.shards, partial(layer.time_ns, middle))
    return triple_of_key
