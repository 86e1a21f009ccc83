"""One pool of EP ranks: iterations one after the other, each a barrier over all of its ranks.

Legend: I tokens of an iteration, J pieces, R ranks.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import simpy

from placer.core.errors import MismatchError, UsageError
from placer.core.evaluate import par
from sim.serving.batcher import Piece, RankQueue
from sim.serving.limits import Limits
from sim.serving.meters import Meter, PoolLog
from sim.serving.placement import Policy
from sim.serving.pricer import Batch, PlanPricer, Pricer
from sim.serving.rebalance import Migration, Rebalancing, Solver, WindowLog, migration
from sim.serving.requests import Request
from sim.serving.streams import Streams

__all__ = ["Pool", "PoolSpec", "Role"]

Role = Literal["mixed", "prefill", "decode"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PoolSpec:
    """What a pool is made of. `solver` is asked at the end of every window where there is one.

    Rebalancing needs a PlanPricer; any other pricer must say nothing but durations.
    """

    pricer: Pricer
    ranks: int
    policy: Policy
    limits: Limits
    rebalancing: Rebalancing | None = None
    solver: Solver | None = None

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise UsageError(f"ranks is {self.ranks}; give 1 or more")
        if self.solver is not None and (self.rebalancing is None or not isinstance(self.pricer, PlanPricer)):
            raise UsageError("a solver needs rebalancing settings and a PlanPricer, whose plan it may change")


class Pool:
    """Queues, log and iterations of one pool. `done(request, now)` is told of requests with nothing left to do here."""

    def __init__(
        self,
        env: simpy.Environment,
        role: Role,
        spec: PoolSpec,
        streams: Streams,
        done: Callable[["Pool", Request], None],
        settled: Callable[[], None],
    ) -> None:
        self.env, self.role, self.spec, self._streams = env, role, spec, streams
        self._done, self._settled = done, settled
        self.waiting, self.running = Meter(), Meter()
        self.queues = [RankQueue(rank, spec.limits, self._changed) for rank in range(spec.ranks)]
        self.pricer = spec.pricer
        self.log = PoolLog()
        self.migrations: list[tuple[int, Migration]] = []
        self.window_par: list[float] = []
        self.paused_ns = 0
        self.peak_blocks = 0
        self._window = WindowLog()
        self._coming: tuple[int, PlanPricer] | None = None
        self._wake: simpy.Event | None = None
        env.process(self._serve())

    @property
    def requests(self) -> int:
        """Requests that wait or run here."""
        return self.waiting.value + self.running.value

    def place(self, request: Request) -> None:
        """The request joins the queue that the policy names."""
        self.queues[self.choose(request)].add(request)
        self.wake()

    def choose(self, request: Request) -> int:
        """The rank that the policy names. Raises UsageError where there is none of that number."""
        rank = self.spec.policy(request, self.queues)
        if not 0 <= rank < len(self.queues):
            raise UsageError(f"the placement policy chose rank {rank}; there are 0 to {len(self.queues) - 1}")
        return rank

    def wake(self) -> None:
        """There may be something to do."""
        if self._wake is not None and not self._wake.triggered:
            self._wake.succeed()

    def _changed(self, waiting: int, running: int) -> None:
        self.waiting.add(self.env.now, waiting)
        self.running.add(self.env.now, running)

    def _serve(self) -> Iterator[simpy.Event]:
        while True:
            if self._coming is not None and self.env.now >= self._coming[0]:
                self.pricer, self._coming = self._coming[1], None
            pieces = [piece for queue in self.queues for piece in queue.schedule(self.env.now)]
            if not pieces:
                self._wake = self.env.event()
                yield self._wake
                self._wake = None
                continue
            held = max(queue.limits.blocks_per_rank - queue.free_blocks for queue in self.queues)
            self.peak_blocks = max(self.peak_blocks, held)
            batch = self._batch(pieces)
            price = self.pricer.price(batch)
            start = self.env.now
            yield self.env.timeout(price.duration_ns)
            self.log.add(start, batch, price, getattr(self.pricer, "cluster", None))
            self._complete(pieces)
            self._settled()
            if self.spec.rebalancing is not None:
                self._window.add(start, batch, pieces, price, self.spec.rebalancing)
                if self._window.iterations == self.spec.rebalancing.window_iterations:
                    pause = self._close_window(self.spec.rebalancing)
                    if pause:
                        self.paused_ns += pause
                        yield self.env.timeout(pause)

    def _batch(self, pieces: list[Piece]) -> Batch:
        piece_J5 = np.array(
            [(p.request.stream, p.request.rank, p.first, p.request.input_length, p.tokens) for p in pieces],
            dtype=np.int64,
        )
        row_I, source_I = self._streams.rows(piece_J5, int(piece_J5[:, 4].sum()))
        prefill = bool((piece_J5[:, 2] < piece_J5[:, 3]).any())
        return Batch(row_I, source_I, "prefill" if prefill else "decode")

    def _complete(self, pieces: list[Piece]) -> None:
        """Keys and values are there; a request whose last token was computed makes one more."""
        now = self.env.now
        for request, first, tokens in pieces:
            request.computed = first + tokens
            if request.computed < request.input_length + request.generated:
                continue
            request.generated += 1
            if request.first_ns < 0:
                request.first_ns = now
            if request.finished:
                request.finish_ns = now
            if request.finished or self.role == "prefill":
                self.queues[request.rank].leave(request, keep_blocks=not request.finished)
                self._done(self, request)

    def _close_window(self, rebalancing: Rebalancing) -> int:
        """Records the window, asks the solver; how long the pool must now stand still."""
        seen, self._window = self._window, WindowLog()
        cluster = getattr(self.pricer, "cluster", None)
        self.window_par.append(float(par(seen.load_LR, None if cluster is None else cluster.speed_R).mean()))
        if self.spec.solver is None or self._coming is not None:
            return 0
        assert isinstance(self.pricer, PlanPricer)
        plan, pricer = self.pricer.plan, self.pricer
        last = len(self.log.start_ns) - 1
        window = seen.close(self.role, last, self.env.now, plan, pricer.expert_LTK)
        new = self.spec.solver(window)
        if new is None:
            return 0
        if new.mode != plan.mode:
            raise MismatchError(f"the new plan is for mode {new.mode}, the pool runs {plan.mode}; keep the mode")
        cost = migration(plan, new, pricer.model, pricer.cluster)
        self.migrations.append((self.env.now, cost))
        following = PlanPricer(new, pricer.model, pricer.cluster, pricer.expert_LTK, pricer.mode)
        self._coming = (self.env.now + cost.duration_ns, following)
        return cost.duration_ns if rebalancing.manner == "pause" else 0
