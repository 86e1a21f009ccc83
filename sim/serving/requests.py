"""Requests: what arrives (Workload) and one request's way through the engine.

Legend: Q requests in order of arrival.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError

__all__ = ["Request", "Workload"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Workload:
    """Requests in order of arrival, (Q,) each: nanoseconds since the start, prompt tokens, tokens to generate.

    `prefix_Q` has the ids of each prompt's leading blocks (a Mooncake trace's `hash_ids`), or is empty.
    """

    arrival_ns_Q: IntArray
    input_Q: IntArray
    output_Q: IntArray
    prefix_Q: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        shape = self.arrival_ns_Q.shape
        if len(shape) != 1 or self.input_Q.shape != shape or self.output_Q.shape != shape:
            raise UsageError(
                f"workload has {shape} arrivals, {self.input_Q.shape} inputs, {self.output_Q.shape} outputs"
            )
        if self.prefix_Q and len(self.prefix_Q) != shape[0]:
            raise UsageError(f"workload has {len(self.prefix_Q)} prefixes for {shape[0]} requests")
        if shape[0] and (self.arrival_ns_Q[0] < 0 or (np.diff(self.arrival_ns_Q) < 0).any()):
            raise UsageError("workload.arrival_ns_Q falls; give arrivals in order, from 0 on")
        for name in ("input_Q", "output_Q"):
            if shape[0] and getattr(self, name).min() < 1:
                raise UsageError(f"workload.{name} has {getattr(self, name).min()}; every request has 1 token or more")

    def __len__(self) -> int:
        return len(self.arrival_ns_Q)


@dataclass(slots=True, eq=False)
class Request:
    """One request. `stream` says whose rows of the routing trace its tokens take.

    computed        tokens whose keys and values are in the cache of its rank
    generated       tokens made so far; one comes with the last prompt token
    blocks          KV blocks held on its rank
    first_ns, finish_ns, started_ns   when its first token and its last came, when it was first scheduled; -1 not yet
    """

    number: int
    arrival_ns: int
    input_length: int
    output_length: int
    stream: int = 0
    prefix: tuple[int, ...] = ()
    rank: int = -1
    computed: int = 0
    generated: int = 0
    blocks: int = 0
    started_ns: int = -1
    first_ns: int = -1
    finish_ns: int = -1
    preemptions: int = 0
    recomputed: int = field(default=0)

    @property
    def length(self) -> int:
        """Tokens whose keys and values the next token needs."""
        return self.input_length + self.generated

    @property
    def finished(self) -> bool:
        """Whether all its tokens are made."""
        return self.generated == self.output_length
