"""How rows get from rank to rank: all at once, inside nodes first, or in rounds.

Legend: R ranks, N nodes, I ranks of one node (local index), G rounds, C rows, H columns of a row.

Rows leave sorted by destination rank and arrive sorted by source rank; the rows of one pair keep their order. That
holds for every algorithm, so results do not depend on it. Rows that a rank sends to itself go through the same buffers.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from placer.core.schedule import Algorithm, Rounds

__all__ = ["Carriage", "Fabric", "Flow", "Hop", "exchange", "exchange_counts", "exchange_in", "hops"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Fabric:
    """Where this rank is, and the process groups of its node (`inside`) and of its local index in all nodes (`across`).

    The groups exist where a two-level exchange needs them; a group of one rank is None.
    """

    rank: int
    num_ranks: int
    ranks_per_node: int
    inside: Any = None
    across: Any = None

    @classmethod
    def plain(cls) -> "Fabric":
        """All ranks as one node without groups of its own: enough for every mode and algorithm of one level."""
        ranks = dist.get_world_size()
        return cls(dist.get_rank(), ranks, ranks)

    @classmethod
    def create(cls, ranks_per_node: int, device: torch.device) -> "Fabric":
        """With groups, their connections made. Collective: all ranks create the same fabrics in the same order."""
        rank, ranks = dist.get_rank(), dist.get_world_size()
        groups: list[Any] = [None, None]
        node, local = divmod(rank, ranks_per_node)
        inside = [list(range(start, start + ranks_per_node)) for start in range(0, ranks, ranks_per_node)]
        across = [list(range(start, ranks, ranks_per_node)) for start in range(ranks_per_node)]
        for level, (parts, mine) in enumerate(((inside, node), (across, local))):
            for index, members in enumerate(parts):
                # everybody takes part in the making of every group
                group = dist.new_group(members) if len(members) > 1 else None
                groups[level] = group if index == mine else groups[level]
        fabric = cls(rank, ranks, ranks_per_node, *groups)
        for group, size in ((groups[0], ranks_per_node), (groups[1], ranks // ranks_per_node)):
            if group is not None:
                exchange(torch.zeros(size, 4, device=device), [1] * size, [1] * size, group)
        return fabric

    @property
    def nodes(self) -> int:
        """N, nodes."""
        return self.num_ranks // self.ranks_per_node

    @property
    def node(self) -> int:
        """This rank's node."""
        return self.rank // self.ranks_per_node

    @property
    def local(self) -> int:
        """This rank's place in its node."""
        return self.rank % self.ranks_per_node


@dataclass(frozen=True, slots=True)
class Carriage:
    """The algorithm of one layer's all-to-alls; rounds on the way out (`there`) and on the way back."""

    algorithm: Algorithm = "linear"
    there: Rounds | None = None
    back: Rounds | None = None


@dataclass(frozen=True, slots=True)
class Flow:
    """Rows this rank sends to and receives from each rank, (R,). 2dh only: `forward_IN` are the rows that rank i of
    this node has for this rank's local index in each node, which this rank passes on."""

    send_R: IntArray
    receive_R: IntArray
    forward_IN: IntArray | None = None


@dataclass(frozen=True, slots=True)
class Hop:
    """One leg of an exchange: `run` takes the rows to send and gives those that arrived and an all-zero row.

    A leg that follows another takes what that one gave.
    `sent` and `received` leave out rows that stay on the rank; `inside` hops never leave the node.
    """

    run: Callable[[Tensor], Tensor]
    sent: int
    received: int
    inside: bool = False


def exchange(rows_CH: Tensor, send_R: Sequence[int], receive_R: Sequence[int], group: Any = None) -> Tensor:
    """The rows that arrive when each rank sends `send_R[r]` of its rows to rank r, plus one all-zero row at the end.

    Receives are posted before sends: gloo's own all-to-all lets a "ready to receive" wait behind data of the same
    connection, and pairs then run one direction after the other. NCCL's all-to-all is this very group of messages.
    """
    arrived_CH, raw_CB = _room(rows_CH, sum(receive_R))
    # as bytes: every back end moves uint8, not every one moves bfloat16
    sent_CB = rows_CH.contiguous().view(torch.uint8)
    rank, ranks = dist.get_rank(group), len(send_R)
    arriving = torch.split(raw_CB, list(receive_R))
    leaving = torch.split(sent_CB, list(send_R))
    # nearest next rank first, so that nobody is everybody's first receiver
    others = [(rank + step) % ranks for step in range(1, ranks)]
    operations = [
        dist.P2POp(dist.irecv, arriving[peer], group=group, group_peer=peer) for peer in others if receive_R[peer]
    ]
    operations += [
        dist.P2POp(dist.isend, leaving[peer], group=group, group_peer=peer) for peer in others if send_R[peer]
    ]
    works = dist.batch_isend_irecv(operations) if operations else []
    arriving[rank].copy_(leaving[rank])
    for work in works:
        work.wait()
    return arrived_CH


def exchange_counts(told_RW: Tensor) -> tuple[IntArray, IntArray]:
    """What this rank told each rank and heard from each, (R, ...): one small exchange and one wait for the device."""
    heard_RW = torch.empty_like(told_RW)
    dist.all_to_all_single(heard_RW, told_RW)
    both = torch.stack([told_RW, heard_RW]).cpu().numpy()
    return both[0], both[1]


def hops(fabric: Fabric, algorithm: Algorithm, flow: Flow, rounds: Rounds | None) -> list[Hop]:
    """The legs that carry `flow`, in order."""
    if algorithm == "2dh":
        return _two_level(fabric, flow)
    send_R, receive_R = flow.send_R.tolist(), flow.receive_R.tolist()
    sent, received = sum(send_R) - send_R[fabric.rank], sum(receive_R) - receive_R[fabric.rank]
    if algorithm == "linear":
        return [Hop(lambda rows_CH: exchange(rows_CH, send_R, receive_R), sent, received)]
    assert rounds is not None
    return [Hop(_in_rounds(fabric, flow, rounds), sent, received)]


def exchange_in(group: Any, rows_CH: Tensor, send: IntArray, receive: IntArray) -> Tensor:
    """`exchange` inside a group, of which a rank may be the only member."""
    if len(send) == 1:
        return torch.cat([rows_CH, rows_CH.new_zeros(1, rows_CH.shape[1])])
    return exchange(rows_CH, send.tolist(), receive.tolist(), group)


def _two_level(fabric: Fabric, flow: Flow) -> list[Hop]:
    """Tutel's 2DH: rank (n, i) hands what is meant for local index j to (n, j), which sends it to (m, j)."""
    assert flow.forward_IN is not None
    forward_IN, node, local = flow.forward_IN, fabric.node, fabric.local
    send_NI = flow.send_R.reshape(fabric.nodes, fabric.ranks_per_node)
    receive_NI = flow.receive_R.reshape(fabric.nodes, fabric.ranks_per_node)

    def inside(rows_CH: Tensor) -> Tensor:
        by_local_CH = _swap_blocks(rows_CH, send_NI)
        return exchange_in(fabric.inside, by_local_CH, send_NI.sum(axis=0), forward_IN.sum(axis=1))

    def across(arrived_CH: Tensor) -> Tensor:
        by_node_CH = _swap_blocks(arrived_CH[:-1], forward_IN)
        return exchange_in(fabric.across, by_node_CH, forward_IN.sum(axis=0), receive_NI.sum(axis=1))

    return [
        Hop(
            inside,
            int(send_NI.sum() - send_NI[:, local].sum()),
            int(forward_IN.sum() - forward_IN[local].sum()),
            inside=fabric.nodes > 1,
        ),
        Hop(
            across,
            int(forward_IN.sum() - forward_IN[:, node].sum()),
            int(receive_NI.sum() - receive_NI[node].sum()),
        ),
    ]


def _swap_blocks(rows_CH: Tensor, count_AB: IntArray) -> Tensor:
    """Rows that lie in blocks (a, b), a first, so that they lie b first."""
    if 1 in count_AB.shape:
        return rows_CH
    blocks = torch.split(rows_CH, count_AB.reshape(-1).tolist())
    a, b = count_AB.shape
    return torch.cat([blocks[i * b + j] for j in range(b) for i in range(a)])


def _in_rounds(fabric: Fabric, flow: Flow, rounds: Rounds) -> Callable[[Tensor], Tensor]:
    """Point to point, one round after the other; each pair's rows are cut by `Rounds.bounds`."""
    rank, ranks = fabric.rank, fabric.num_ranks
    copies_RR = np.zeros((ranks, ranks), dtype=np.int64)
    copies_RR[rank], copies_RR[:, rank] = flow.send_R, flow.receive_R
    done_GRR = np.concatenate([np.zeros((1, ranks, ranks), dtype=np.int64), rounds.bounds(copies_RR)])
    first_send_R = np.cumsum(flow.send_R) - flow.send_R
    first_receive_R = np.cumsum(flow.receive_R) - flow.receive_R

    def piece(rows: Tensor, first_R: IntArray, peer: int, bounds: IntArray) -> Tensor:
        return rows[first_R[peer] + bounds[0] : first_R[peer] + bounds[1]]

    def run(rows_CH: Tensor) -> Tensor:
        arrived_CH, raw_CB = _room(rows_CH, int(flow.receive_R.sum()))
        sent_CB = rows_CH.contiguous().view(torch.uint8)
        whole = np.array([0, flow.send_R[rank]])
        piece(raw_CB, first_receive_R, rank, whole).copy_(piece(sent_CB, first_send_R, rank, whole))
        for round_, to_R in enumerate(rounds.to_GR):
            operations = []
            bounds = done_GRR[round_ : round_ + 2]
            if (peer := int(to_R[rank])) >= 0:
                part = piece(sent_CB, first_send_R, peer, bounds[:, rank, peer])
                operations += [dist.P2POp(dist.isend, part, peer)] if len(part) else []
            for peer in np.flatnonzero(to_R == rank).tolist():
                part = piece(raw_CB, first_receive_R, peer, bounds[:, peer, rank])
                operations += [dist.P2POp(dist.irecv, part, peer)] if len(part) else []
            for work in dist.batch_isend_irecv(operations) if operations else ():
                work.wait()
        return arrived_CH

    return run


def _room(rows_CH: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Rows to receive into and an all-zero one after them; and the former as bytes."""
    arrived_CH = rows_CH.new_empty(count + 1, rows_CH.shape[1])
    arrived_CH[-1] = 0
    return arrived_CH, arrived_CH[:-1].view(torch.uint8)
