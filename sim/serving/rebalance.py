"""Online rebalancing: what the control plane sees of a window, and what moving to its new plan costs.

Legend: L layers, E experts, R ranks, J pieces, H tokens sampled, C link classes (0 inside nodes, 1 between).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from placer.core.cluster import ClusterSpec
from placer.core.cost import leg_times
from placer.core.errors import UsageError
from placer.core.migration import moves
from placer.core.model import ModelSpec
from placer.core.plan import Plan
from sim.serving.batcher import Piece
from sim.serving.limits import checked_whole
from sim.serving.pricer import Batch, Price

__all__ = ["Migration", "Rebalancing", "Solver", "Window", "WindowLog", "migration"]

IntArray = npt.NDArray[np.int64]
Manner = Literal["pause", "overlap"]


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """Iterations first .. last of a pool, all finished by `end_ns`: all that a solver may know.

    load_LE            (token, expert) pairs of the window      plan   what they ran under
    expert_LHK         routing of a sample of its tokens; source_H their ranks, request_H their requests
    """

    pool: str
    first: int
    last: int
    start_ns: int
    end_ns: int
    tokens: int
    plan: Plan
    load_LE: IntArray
    expert_LHK: npt.NDArray[np.integer]
    source_H: IntArray
    request_H: IntArray


Solver = Callable[[Window], Plan | None]
"""Gives a new plan for the pool, or None to keep the one that runs."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebalancing:
    """When the solver is asked and how its plan is reached.

    window_iterations   iterations in a window
    sample_tokens       tokens of a window whose routing the solver sees, spread evenly over its iterations
    manner              pause: the pool stands still while weights travel. overlap: they travel beside the iterations,
                        which are not slowed (the optimistic end), and the plan serves from the first iteration that
                        starts afterwards. Nobody is asked again before then.
    """

    window_iterations: int = 200
    sample_tokens: int = 8192
    manner: Manner = "pause"

    def __post_init__(self) -> None:
        checked_whole("rebalance.window_iterations", self.window_iterations)
        checked_whole("rebalance.sample_tokens", self.sample_tokens)
        if self.manner not in get_args(Manner):
            raise UsageError(f"rebalance.manner is {self.manner!r}; use one of {', '.join(get_args(Manner))}")


class WindowLog:
    """A window as it fills: sums, and an even sample of each iteration's tokens."""

    def __init__(self) -> None:
        self.iterations = self.tokens = self.start_ns = 0
        self.load_LE: IntArray = np.zeros(1, dtype=np.int64)
        self.load_LR: IntArray = np.zeros(1, dtype=np.int64)
        self._row: list[IntArray] = []
        self._source: list[IntArray] = []
        self._request: list[IntArray] = []

    def add(self, start_ns: int, batch: Batch, pieces: Sequence[Piece], price: Price, rebalancing: Rebalancing) -> None:
        """One finished iteration."""
        if not self.iterations:
            self.start_ns = start_ns
        self.iterations += 1
        self.tokens += len(batch.row_I)
        self.load_LE, self.load_LR = self.load_LE + price.load_LE, self.load_LR + price.load_LR
        tokens = len(batch.row_I)
        share = min(tokens, -(-rebalancing.sample_tokens // rebalancing.window_iterations))
        pick_H = np.arange(share) * tokens // share
        ends_J = np.cumsum([piece.tokens for piece in pieces])
        number_J = np.array([piece.request.number for piece in pieces])
        self._row.append(batch.row_I[pick_H])
        self._source.append(batch.source_I[pick_H])
        self._request.append(number_J[np.searchsorted(ends_J, pick_H, side="right")])

    def close(self, pool: str, last: int, end_ns: int, plan: Plan, expert_LTK: npt.NDArray[np.integer]) -> Window:
        """What the solver may see; `last` is the last iteration's number."""
        return Window(
            pool=pool,
            first=last - self.iterations + 1,
            last=last,
            start_ns=self.start_ns,
            end_ns=end_ns,
            tokens=self.tokens,
            plan=plan,
            load_LE=self.load_LE,
            expert_LHK=expert_LTK[:, np.concatenate(self._row)],
            source_H=np.concatenate(self._source),
            request_H=np.concatenate(self._request),
        )


@dataclass(frozen=True, slots=True)
class Migration:
    """Experts sent from rank to rank, all at once: how long the busiest port takes, and the bytes by link class."""

    duration_ns: int
    experts: int
    bytes_C: tuple[int, int]
    received_bytes_R: tuple[int, ...]


def migration(current: Plan, new: Plan, model: ModelSpec, cluster: ClusterSpec) -> Migration:
    """What it takes to get from one plan to the other, priced as one all-to-all leg of expert weights."""
    moved = moves(current.slot_expert_LP, new.slot_expert_LP, cluster.num_ranks, cluster.ranks_per_node)
    copies_RR = np.zeros((cluster.num_ranks, cluster.num_ranks), dtype=np.int64)
    np.add.at(copies_RR, (moved.source_M, moved.destination_M), 1)
    node_R = cluster.node_R
    across = int(copies_RR[node_R[:, None] != node_R[None, :]].sum()) * model.expert_bytes
    return Migration(
        duration_ns=int(leg_times(cluster, copies_RR[None], model.expert_bytes).slowest_W[0]),
        experts=len(moved),
        bytes_C=(moved.moved_bytes(model.expert_bytes) - across, across),
        received_bytes_R=tuple((copies_RR.sum(axis=0) * model.expert_bytes).tolist()),
    )
