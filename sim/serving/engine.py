"""The serving loop: requests arrive, pools iterate, plans are rebalanced, until all is done or the horizon is reached.

Legend: Q requests.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import simpy

from placer.core.errors import UsageError
from sim.serving.handoff import Handoff, HandoffSpec
from sim.serving.limits import NS_PER_S
from sim.serving.meters import Meter
from sim.serving.pool import Pool, PoolSpec
from sim.serving.requests import Request, Workload
from sim.serving.streams import Streams

__all__ = ["Served", "serve"]

OVERLOAD = 1.05
"""Arrivals of the second half of the time, over those finished in it, from which on the load counts as too much."""


@dataclass(frozen=True, slots=True, eq=False)
class Served:
    """Everything that happened. Times are nanoseconds since the start.

    requests     those that arrived, in order             refused   no rank could ever hold these
    in_system    requests that had arrived and were not finished, over time
    end_ns       when the last request finished, or the horizon
    stopped_by   "done" or "horizon"; `message` says why where it is not "done"
    """

    requests: tuple[Request, ...]
    refused: tuple[Request, ...]
    pools: tuple[Pool, ...]
    handoff: Handoff | None
    in_system: Meter
    end_ns: int
    stopped_by: str
    overloaded: bool
    message: str

    @property
    def finished(self) -> tuple[Request, ...]:
        """Requests with all their tokens, in order of arrival."""
        return tuple(request for request in self.requests if request.finish_ns >= 0)


def serve(
    workload: Workload,
    streams: Streams,
    pools: tuple[PoolSpec, ...],
    *,
    handoff: HandoffSpec | None = None,
    stream_Q: npt.NDArray[np.integer] | None = None,
) -> Served:
    """Serves the workload on one mixed pool, or on (prefill, decode), linked by `handoff`.

    `stream_Q` says whose rows of the routing trace each request takes (None: in turn). Deterministic.
    The horizon is the first pool's. Cost: that of the pricers, and O(1) Python steps for each piece of each iteration.
    Raises UsageError where the pools do not fit together.
    """
    if len(pools) not in (1, 2) or (len(pools) == 2) != (handoff is not None):
        raise UsageError(
            f"{len(pools)} pools {'with' if handoff else 'without'} handoff; give one, or two and a handoff"
        )
    loop = _Loop(workload, streams, pools, handoff, stream_Q)
    return loop.run(pools[0].limits.horizon_ns)


class _Loop:
    def __init__(
        self,
        workload: Workload,
        streams: Streams,
        pools: tuple[PoolSpec, ...],
        handoff: HandoffSpec | None,
        stream_Q: npt.NDArray[np.integer] | None,
    ) -> None:
        if stream_Q is None:
            stream_Q = np.arange(len(workload)) % streams.num_requests
        if stream_Q.shape != (len(workload),):
            raise UsageError(f"stream_Q is {stream_Q.shape}; give a stream for each of {len(workload)} requests")
        if len(workload) and not 0 <= int(stream_Q.min()) <= int(stream_Q.max()) < streams.num_requests:
            raise UsageError(f"stream_Q goes up to {int(stream_Q.max())}; there are {streams.num_requests} streams")
        self.env = simpy.Environment()
        self.workload, self.stream_Q = workload, stream_Q
        self.requests: list[Request] = []
        self.refused: list[Request] = []
        self.in_system = Meter()
        self.finished_ns: list[int] = []
        self.all_arrived = False
        self.complete = self.env.event()
        roles = ("mixed",) if len(pools) == 1 else ("prefill", "decode")
        self.pools = tuple(
            Pool(self.env, role, spec, streams, self._done, self._settled)  # type: ignore[arg-type]
            for role, spec in zip(roles, pools, strict=True)
        )
        self.handoff = None if handoff is None else Handoff(self.env, handoff, *self.pools)

    def run(self, horizon_ns: int) -> Served:
        self.env.process(self._arrive())
        self.env.run(until=self.env.any_of([self.complete, self.env.timeout(horizon_ns)]))
        done = self.complete.triggered
        overloaded, message = (False, "") if done else self._why(horizon_ns)
        return Served(
            requests=tuple(self.requests),
            refused=tuple(self.refused),
            pools=self.pools,
            handoff=self.handoff,
            in_system=self.in_system,
            end_ns=self.env.now,
            stopped_by="done" if done else "horizon",
            overloaded=overloaded,
            message=message,
        )

    def _arrive(self) -> Iterator[simpy.Event]:
        columns = (self.workload.arrival_ns_Q, self.workload.input_Q, self.workload.output_Q, self.stream_Q)
        rows = zip(*(column.tolist() for column in columns), strict=True)
        for number, (time, inputs, outputs, stream) in enumerate(rows):
            if time > self.env.now:
                yield self.env.timeout(time - self.env.now)
            prefix = self.workload.prefix_Q[number] if self.workload.prefix_Q else ()
            request = Request(number, time, inputs, outputs, stream=stream, prefix=prefix)
            self.requests.append(request)
            if not all(pool.queues[0].fits(request) for pool in self.pools):
                self.refused.append(request)
                continue
            self.in_system.add(self.env.now, 1)
            self.pools[0].place(request)
        self.all_arrived = True
        self._settled()

    def _done(self, pool: Pool, request: Request) -> None:
        if request.finish_ns < 0:
            assert self.handoff is not None
            self.handoff.take(request)
            return
        self.in_system.add(self.env.now, -1)
        self.finished_ns.append(self.env.now)

    def _settled(self) -> None:
        """After every iteration: what it made room for, and whether that was all."""
        if self.handoff is not None:
            self.handoff.admit()
        if self.all_arrived and not self.in_system.value and not self.complete.triggered:
            self.complete.succeed()

    def _why(self, horizon_ns: int) -> tuple[bool, str]:
        half = horizon_ns // 2
        came = sum(half <= request.arrival_ns for request in self.requests) - len(
            [request for request in self.refused if request.arrival_ns >= half]
        )
        went = sum(half <= time for time in self.finished_ns)
        left = self.in_system.value
        seconds = (horizon_ns - half) / NS_PER_S
        waiting = sum(pool.waiting.value for pool in self.pools)
        overloaded = waiting > 0 and came > OVERLOAD * went
        text = f"stopped at the horizon of {horizon_ns / NS_PER_S:g} s with {left} requests unfinished"
        if overloaded:
            text += (
                f": {came / seconds:.3g} requests/s came and {went / seconds:.3g} were finished in its second "
                "half, more than this deployment serves; it would never end: lower the rate or add ranks"
            )
        else:
            text += "; give a longer horizon to see them end"
        return overloaded, text
