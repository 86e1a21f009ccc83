"""From a prefill pool to a decode pool: keys and values travel from rank to rank, at a cost in time and bytes.

A request keeps its blocks on the prefill rank until all has arrived, and blocks on the decode rank are taken before it
starts; where none are free it waits, in order of coming to that rank. Every rank sends one request at a time and
receives one at a time over a link of its own (the head of a sender's line holds it up); iterations are not slowed.
"""

from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import simpy

from placer.core.cluster import LinkClass
from placer.core.cost import port_ns
from sim.serving.limits import checked_whole
from sim.serving.pool import Pool
from sim.serving.requests import Request

__all__ = ["Handoff", "HandoffSpec"]


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffSpec:
    """The link between pools, one a rank and direction, and the bytes of one token's keys and values in all layers."""

    link: LinkClass
    kv_bytes_per_token: int

    def __post_init__(self) -> None:
        checked_whole("handoff.kv_bytes_per_token", self.kv_bytes_per_token)


class Handoff:
    """Requests on their way. `requests` counts those that wait for blocks or travel."""

    def __init__(self, env: simpy.Environment, spec: HandoffSpec, prefill: Pool, decode: Pool) -> None:
        self.env, self.spec, self.prefill, self.decode = env, spec, prefill, decode
        self.requests = self.transfers = self.sent_bytes = self.busy_ns = 0
        self._lines: list[deque[Request]] = [deque() for _ in decode.queues]
        self._sends = [simpy.Resource(env) for _ in prefill.queues]
        self._receives = [simpy.Resource(env) for _ in decode.queues]

    def take(self, request: Request) -> None:
        """The request has left the prefill pool's iterations; its keys and values are still on its rank there."""
        self.requests += 1
        self._lines[self.decode.choose(request)].append(request)
        self.admit()

    def admit(self) -> None:
        """Starts every transfer whose decode rank has blocks for it."""
        for line, queue in zip(self._lines, self.decode.queues, strict=True):
            while line and queue.reserve(line[0]):
                self.env.process(self._move(line.popleft(), queue.rank))

    def _move(self, request: Request, to: int) -> Iterator[simpy.Event]:
        source = self.prefill.queues[request.rank]
        size = request.computed * self.spec.kv_bytes_per_token
        duration = int(port_ns(self.spec.link, np.int64(1), np.int64(1), size))  # type: ignore[arg-type]
        with self._sends[request.rank].request() as send:
            yield send
            with self._receives[to].request() as receive:
                yield receive
                yield self.env.timeout(duration)
        self.transfers += 1
        self.sent_bytes += size
        self.busy_ns += duration
        self.requests -= 1
        source.release(request.blocks)
        target = self.decode.queues[to]
        request.blocks = target.limits.blocks(request.length)
        request.rank = to
        target.admit(request)
        self.prefill.wake()
        self.decode.wake()
