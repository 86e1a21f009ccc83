"""Request placement: on which rank a request's attention runs. A policy is any callable of this form.

Legend: Q requests of the routing trace (streams), R ranks.
"""

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from sim.serving.batcher import RankQueue
from sim.serving.requests import Request

__all__ = ["Policy", "by_affinity", "least_loaded", "round_robin"]

Policy = Callable[[Request, Sequence[RankQueue]], int]
"""policy(request, queues) is the index of a queue. It may look at what is there now, not at lengths still to come."""


def round_robin() -> Policy:
    """Ranks in turn."""
    following = 0

    def choose(request: Request, queues: Sequence[RankQueue]) -> int:
        nonlocal following
        rank = following % len(queues)
        following = rank + 1
        return rank

    return choose


def least_loaded() -> Policy:
    """The rank with the fewest requests; of equal ones that with most free KV blocks, then the lowest."""

    def choose(request: Request, queues: Sequence[RankQueue]) -> int:
        return min(range(len(queues)), key=lambda rank: (queues[rank].requests, -queues[rank].free_blocks, rank))

    return choose


def by_affinity(value_QR: npt.NDArray[np.number], slack: int = 2) -> Policy:
    """The rank on which the request's stream has the highest value, of ranks with at most `slack` requests more than
    the least loaded has.

    `value_QR` is for example `placer.core.homes.request_touch` summed over layers: the copies that each home saves.
    """
    if slack < 0:
        raise UsageError(f"slack is {slack}; give 0 or more requests")

    def choose(request: Request, queues: Sequence[RankQueue]) -> int:
        load = [queue.requests for queue in queues]
        limit = min(load) + slack
        value_R = value_QR[request.stream]
        return min(
            (rank for rank in range(len(queues)) if load[rank] <= limit),
            key=lambda rank: (-float(value_R[rank]), load[rank], rank),
        )

    return choose
