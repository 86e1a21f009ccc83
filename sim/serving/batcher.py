"""One rank's scheduler: continuous batching with chunked prefill under a token budget and a number of KV blocks.

Running requests come first, oldest first, then waiting ones. A request that needs a block where none is free evicts the
youngest running one, whose blocks are dropped and whose tokens are computed again later (preemption by recompute, as
vLLM's scheduler does); while that happens nobody new is let in.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

from sim.serving.limits import Limits
from sim.serving.requests import Request

__all__ = ["Piece", "RankQueue"]


class Piece(NamedTuple):
    """Tokens first .. first + tokens - 1 of a request, computed in this iteration."""

    request: Request
    first: int
    tokens: int


class RankQueue:
    """Requests of one rank: `waiting` (in order), `running` (oldest first), and its KV blocks.

    `reserved` counts requests on their way here from a prefill pool, whose blocks are taken already.
    `on_change(waiting, running)` is told how many more (or fewer) requests wait and run.
    """

    __slots__ = ("free_blocks", "limits", "on_change", "rank", "reserved", "running", "waiting")

    def __init__(self, rank: int, limits: Limits, on_change: Callable[[int, int], None] | None = None) -> None:
        self.rank = rank
        self.limits = limits
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self.reserved = 0
        self.free_blocks = limits.blocks_per_rank
        self.on_change = on_change or (lambda waiting, running: None)

    @property
    def requests(self) -> int:
        """How many requests this rank has to serve."""
        return len(self.waiting) + len(self.running) + self.reserved

    def fits(self, request: Request) -> bool:
        """Whether an empty rank could serve the request to its end."""
        return self.limits.blocks(request.input_length + request.output_length - 1) <= self.limits.blocks_per_rank

    def add(self, request: Request) -> None:
        """The request waits here."""
        request.rank = self.rank
        self.waiting.append(request)
        self.on_change(1, 0)

    def admit(self, request: Request) -> None:
        """The request runs here, with the blocks that were reserved for it."""
        self.running.append(request)
        self.reserved -= 1
        self.on_change(0, 1)

    def reserve(self, request: Request) -> bool:
        """Takes the blocks of a request whose keys and values are to come; False where there is no room for it now."""
        need = self.limits.blocks(request.length)
        full = len(self.running) + self.reserved >= self.limits.requests_per_rank
        if self.waiting or full or need > self.free_blocks:
            return False
        self.free_blocks -= need
        self.reserved += 1
        return True

    def release(self, blocks: int) -> None:
        """Gives blocks back."""
        self.free_blocks += blocks
        assert self.free_blocks <= self.limits.blocks_per_rank, "blocks given back twice"

    def leave(self, request: Request, *, keep_blocks: bool = False) -> None:
        """The request no longer runs here."""
        self.running.remove(request)
        self.on_change(0, -1)
        if not keep_blocks:
            self.release(request.blocks)
            request.blocks = 0

    def schedule(self, now: int) -> list[Piece]:
        """The pieces of this rank's next iteration; none where it has nothing to do. Takes the blocks they need."""
        budget = self.limits.tokens_per_rank
        pieces: list[Piece] = []
        evicted = False
        index = 0
        while budget and index < len(self.running):
            request = self.running[index]
            count = min(request.input_length + request.generated - request.computed, budget)
            if not self._grow(request, count):
                evicted = True
                self._evict()
                continue
            pieces.append(Piece(request, request.computed, count))
            budget -= count
            index += 1
        while budget and self.waiting and not evicted and self._has_room():
            request = self.waiting[0]
            count = min(request.length - request.computed, budget)
            if not self._grow(request, count):
                break
            self.waiting.popleft()
            self.running.append(request)
            self.on_change(-1, 1)
            if request.started_ns < 0:
                request.started_ns = now
            pieces.append(Piece(request, request.computed, count))
            budget -= count
        return pieces

    def _has_room(self) -> bool:
        return len(self.running) + self.reserved < self.limits.requests_per_rank

    def _grow(self, request: Request, count: int) -> bool:
        need = self.limits.blocks(request.computed + count) - request.blocks
        if need > self.free_blocks:
            return False
        if need > 0:
            request.blocks += need
            self.free_blocks -= need
        return True

    def _evict(self) -> None:
        youngest = self.running.pop()
        self.free_blocks += youngest.blocks
        youngest.blocks = 0
        youngest.recomputed += youngest.computed
        youngest.computed = 0
        youngest.preemptions += 1
        self.waiting.appendleft(youngest)
        self.on_change(1, -1)
