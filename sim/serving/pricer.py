"""The time of one iteration over all ranks of a pool: `placer.core.cost`'s closed form, from compiled counts.

Legend: L layers, T tokens of the trace, K top-k, I tokens of an iteration, P slots, R ranks, N nodes, C link classes,
D directions.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt

from placer.core.cluster import ClusterSpec, LinkClass
from placer.core.cost import attention_ns, expert_ns, gather_copies, leg_times, packing_ns, port_ns, rank_load
from placer.core.errors import MismatchError
from placer.core.model import ModelSpec
from placer.core.modes import DispatchMode
from placer.core.plan import Plan
from placer.core.schedule import Kind
from sim.port import port_times
from sim.serving.counting import Counts, count_iteration, empty_counts
from sim.serving.tables import slot_tables
from sim.stages import stages_of
from sim.traffic import work_of

__all__ = ["Batch", "PlanPricer", "Price", "Pricer"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Batch:
    """The tokens of one iteration: which row of the routing trace each takes, on which rank it lives, (I,) each."""

    row_I: IntArray
    source_I: IntArray
    kind: Kind


@dataclass(frozen=True, slots=True)
class Price:
    """What one iteration takes.

    load_LR, load_LE        (token, expert) pairs by rank and by expert
    compute_R               ns that each rank computes
    link_DCR, uplink_DN     ns that each port is busy, sending and receiving
    sent_bytes_C            bytes sent inside nodes and between them
    """

    duration_ns: int
    load_LR: IntArray
    load_LE: IntArray
    compute_R: IntArray
    link_DCR: IntArray
    uplink_DN: IntArray
    sent_bytes_C: IntArray


class Pricer(Protocol):
    """Whatever can say how long an iteration takes."""

    def price(self, batch: Batch) -> Price:
        """The price of one iteration with at least one token."""
        ...


class PlanPricer:
    """Prices iterations of a plan on a cluster; equal to `work_of` and `port_times` to the nanosecond, in every mode.

    Where the plan has a schedule for the iteration's kind (2dh, rounds or a pipeline degree above 1) the duration comes
    from `work_of` and `port_times` themselves, about a hundred times slower; bytes and busy ports are then those
    of the plain exchange. Raises MismatchError where plan, model, cluster and trace disagree.
    """

    def __init__(
        self,
        plan: Plan,
        model: ModelSpec,
        cluster: ClusterSpec,
        expert_LTK: npt.NDArray[np.integer],
        mode: DispatchMode | None = None,
    ) -> None:
        if len(expert_LTK) != len(plan.slot_expert_LP) or model.num_experts != plan.num_experts:
            raise MismatchError(
                f"the plan has {len(plan.slot_expert_LP)} layers of {plan.num_experts} experts, the trace "
                f"{len(expert_LTK)} of {model.num_experts}; use the trace that the plan was solved for"
            )
        if (plan.num_ranks, plan.ranks_per_node) != (cluster.num_ranks, cluster.ranks_per_node):
            raise MismatchError(
                f"the plan is for {plan.num_ranks} ranks, {plan.ranks_per_node} a node; cluster {cluster.name!r} has "
                f"{cluster.num_ranks}, {cluster.ranks_per_node} a node; use the plan's cluster"
            )
        self.plan, self.model, self.cluster, self.expert_LTK = plan, model, cluster, expert_LTK
        self.mode: DispatchMode = plan.mode if mode is None else mode
        self._tables = slot_tables(plan, self.mode)
        self._links: tuple[LinkClass, LinkClass] = (cluster.intra, cluster.inter)
        self._uplink = cluster.uplink if cluster.nodes > 1 else None
        self._scheduled = {
            kind: plan.schedule(kind) for kind in ("prefill", "decode") if getattr(plan, kind) is not None
        }

    def price(self, batch: Batch) -> Price:
        """The price of one iteration. Cost O(L (I K + R^2))."""
        counts = empty_counts(self._tables)
        count_iteration(self._tables, self.expert_LTK, batch.row_I, batch.source_I, counts)
        token_bytes = self.model.token_bytes
        attention_LR = attention_ns(self.cluster, self.model, counts.home_LR)
        experts_LR = expert_ns(self.cluster, self.model, counts.tokens_LP)
        legs = [_leg(self._links, self._uplink, counts, leg, token_bytes) for leg in range(len(counts.copies_XDCLR))]
        if self.mode == "allgather":
            legs = [self._spread(counts.home_LR[:1], len(counts.home_LR))]
        # the way back: the same legs in reverse order with sends and receives changed over, but for coherent
        coherent = self.mode == "coherent"
        there, back = (legs[:1], legs[1:]) if coherent else (legs, [leg.mirrored() for leg in legs[::-1]])
        packing_LR = packing_ns(self.cluster, self.mode, counts.home_LR)
        duration_L = attention_LR.max(axis=1) + experts_LR.max(axis=1) + 2 * packing_LR.max(axis=1)
        for leg in (*there, *back):
            duration_L += leg.slowest_L
        ways = [*there, *back]
        duration_ns = int(duration_L.sum())
        if coherent:
            gather = self._spread(counts.last_R[None], 1)
            duration_ns += int(gather.slowest_L[0])
            ways.append(gather)
        if batch.kind in self._scheduled:
            duration_ns = self._scheduled_ns(batch)
        placed_LP = self.plan.slot_expert_LP >= 0
        load_LE = np.zeros((len(placed_LP), self.plan.num_experts), dtype=np.int64)
        layer, slot = np.nonzero(placed_LP)
        np.add.at(load_LE, (layer, self.plan.slot_expert_LP[layer, slot]), counts.tokens_LP[layer, slot])
        return Price(
            duration_ns=duration_ns,
            load_LR=rank_load(counts.tokens_LP, self.cluster.num_ranks),
            load_LE=load_LE,
            compute_R=(attention_LR + experts_LR + 2 * packing_LR).sum(axis=0),
            link_DCR=np.sum([leg.busy_DCLR.sum(axis=2) for leg in ways], axis=0),
            uplink_DN=np.sum([leg.uplink_DLN.sum(axis=1) for leg in ways], axis=0),
            sent_bytes_C=np.sum([leg.sent_C for leg in ways], axis=0) * token_bytes,
        )

    def _spread(self, home_1R: IntArray, layers: int) -> "_Leg":
        """Every rank's tokens to every other rank, alike in so many layers."""
        copies_1RR = gather_copies(home_1R)
        node_R = self.cluster.node_R
        away_RR = node_R[:, None] != node_R[None, :]
        times = leg_times(self.cluster, copies_1RR, self.model.token_bytes)
        busy_DCLR = np.zeros((2, 2, layers, len(node_R)), dtype=np.int64)
        for link, pick_RR in enumerate((~away_RR, away_RR)):
            picked_RR = copies_1RR[0] * pick_RR
            for direction, axis in enumerate((1, 0)):
                busy_DCLR[direction, link] = port_ns(
                    self._links[link],
                    (picked_RR > 0).sum(axis=axis),
                    picked_RR.sum(axis=axis),
                    self.model.token_bytes,
                )
        uplink_D1N = np.stack([times.uplink_out_WN, times.uplink_in_WN])
        sent = copies_1RR[0]
        return _Leg(
            busy_DCLR=busy_DCLR,
            uplink_DLN=np.repeat(uplink_D1N, layers, axis=1),
            slowest_L=np.repeat(times.slowest_W, layers),
            sent_C=layers * np.array([sent[~away_RR].sum(), sent[away_RR].sum()]),
        )

    def _scheduled_ns(self, batch: Batch) -> int:
        work = work_of(
            self.plan,
            self.model,
            self.cluster,
            self.mode,
            self.expert_LTK[:, batch.row_I],
            batch.source_I,
            np.zeros_like(batch.row_I),
            1,
            schedule=self._scheduled[batch.kind],
        )
        return int(port_times(work, stages_of(work)).total_W[0])


@dataclass(frozen=True, slots=True)
class _Leg:
    """One leg in all layers: port times, the busiest, copies that a rank sends and receives, copies sent by class."""

    busy_DCLR: IntArray
    uplink_DLN: IntArray
    slowest_L: IntArray
    sent_C: IntArray

    def mirrored(self) -> "_Leg":
        return _Leg(self.busy_DCLR[::-1], self.uplink_DLN[::-1], self.slowest_L, self.sent_C)


def _leg(links: tuple[LinkClass, LinkClass], uplink: LinkClass | None, counts: Counts, leg: int, size: int) -> _Leg:
    copies_DCLR, messages_DCLR = counts.copies_XDCLR[leg], counts.messages_XDCLR[leg]
    busy_DCLR = np.stack(
        [port_ns(link, messages_DCLR[:, at], copies_DCLR[:, at], size) for at, link in enumerate(links)], axis=1
    )
    uplink_DLN = np.zeros_like(counts.between_XDLN[leg])
    if uplink is not None:
        uplink_DLN = port_ns(uplink, counts.calls_XDLN[leg], counts.between_XDLN[leg], size)
    return _Leg(
        busy_DCLR=busy_DCLR,
        uplink_DLN=uplink_DLN,
        slowest_L=np.maximum(busy_DCLR.max(axis=(0, 1, 3)), uplink_DLN.max(axis=(0, 2))),
        sent_C=copies_DCLR[0].sum(axis=(1, 2)),
    )
