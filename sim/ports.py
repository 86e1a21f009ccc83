"""All-to-all legs without a barrier: a rank leaves a leg as soon as every port that its copies pass through is done.

Legend: X legs of one iteration in order, R ranks, N nodes, C link classes of a rank (0 inside the node, 1 its NIC),
Q uplink ports (n sends for node n, N + n receives for it). Times are integer nanoseconds.

Ports are servers: every rank sends and receives on its link inside the node and on its NIC, every node sends and
receives on its uplink. A sender's copies reach a port when that sender arrives at the leg, so a port is done at

    max over its senders j of (arrival of j + time of all copies handed in by j or later)

which is a work-conserving first-come server, and the closed form (placer.core.cost.leg_times, same expression, same
rounding) when all arrive together. Copies may reach a rank that is still busy with the stage before (one-sided puts,
as DeepEP and NCCL's buffers allow). A port finishes one leg before the next: collectives are in order on a stream.

Who waits for what: a rank leaves when its own sending is done, when the sending of all its senders is done (the order
of receivers inside one send is not modelled), when its receiving ports are done, and when the uplinks are done that
any of its copies passed.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.cluster import ClusterSpec
from sim.traffic import Leg

__all__ = ["Ports", "arrive", "open_ports"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


class Ports(NamedTuple):
    """The state of every port in every leg of one iteration; `arrive` updates it in place.

    copies_XRR        what each rank sends to each; out_XR how long its sending takes
    node_R            node of each rank
    alpha             ns per message of: link inside the node, NIC, uplink
    slope_XC2         ns per copy of each such class, where one message passes the port and where several share it
    missing_XR        arrivals (its own and its senders') and uplinks that a rank still waits for; -1 once it has left
    sent_XR           latest end of sending of the ranks that this rank hears from, itself included
    left_XCR, messages_XCR   copies and messages not handed in yet, per receiving port
    whole_XCR, done_XCR      time of all its copies; when the port is done as far as known
    free_CR           when the receiving port was done with the legs before
    between_XNN       copies not handed in yet from node to node
    blocked_XQ        senders (and the leg before) an uplink port waits for; -1 once it is done
    whole_XQ, done_XQ        as above, for uplinks
    needs_XQR         whether copies of a rank pass an uplink port
    """

    copies_XRR: npt.NDArray[np.int32]
    out_XR: IntArray
    node_R: IntArray
    alpha: FloatArray
    slope_XC2: FloatArray
    missing_XR: IntArray
    sent_XR: IntArray
    left_XCR: IntArray
    messages_XCR: IntArray
    whole_XCR: IntArray
    done_XCR: IntArray
    free_CR: IntArray
    between_XNN: IntArray
    blocked_XQ: IntArray
    whole_XQ: IntArray
    done_XQ: IntArray
    needs_XQR: npt.NDArray[np.bool_]


def open_ports(cluster: ClusterSpec, legs: list[Leg], window: int) -> Ports:
    """All ports idle before the first leg of iteration `window`. Cost O(X R^2)."""
    ranks, nodes, count = cluster.num_ranks, cluster.nodes, len(legs)
    copy_bytes = [leg.copy_bytes for leg in legs]
    links = [cluster.intra, cluster.inter]
    uplinks = 0
    if cluster.uplink is not None and nodes > 1:
        links.append(cluster.uplink)
        uplinks = 2 * nodes

    def zeros(*shape: int) -> IntArray:
        return np.zeros((count, *shape), dtype=np.int64)

    ports = Ports(
        copies_XRR=np.stack([leg.copies_WRR[window] for leg in legs]),
        out_XR=np.stack([leg.times.out_WR[window] for leg in legs]),
        node_R=cluster.node_R,
        alpha=np.array([link.alpha_ns for link in links]),
        slope_XC2=np.array(
            [[(b / link.gbytes_per_s, b / link.gbytes_per_s * link.tail) for link in links] for b in copy_bytes]
        ),
        missing_XR=zeros(ranks),
        sent_XR=zeros(ranks),
        left_XCR=zeros(2, ranks),
        messages_XCR=zeros(2, ranks),
        whole_XCR=zeros(2, ranks),
        done_XCR=zeros(2, ranks),
        free_CR=np.zeros((2, ranks), dtype=np.int64),
        between_XNN=zeros(nodes, nodes),
        blocked_XQ=zeros(uplinks),
        whole_XQ=zeros(uplinks),
        done_XQ=zeros(uplinks),
        needs_XQR=np.zeros((count, uplinks, ranks), dtype=np.bool_),
    )
    _count(ports)
    return ports


@njit(cache=True)
def arrive(ports: Ports, leg: int, rank: int, now: int, leaves: IntArray) -> int:
    """Rank is ready for the leg at `now`: its copies are handed to the ports. How many ranks may leave because of it.

    The first that many rows of `leaves` (R, 2) become (rank, when it leaves). A rank waits in one leg at a time, so
    the leg need not be named, even where an uplink that closes lets ranks go that are one leg ahead.
    """
    node_R = ports.node_R
    sent = now + ports.out_XR[leg, rank]
    ports.sent_XR[leg, rank] = max(ports.sent_XR[leg, rank], sent)
    ports.missing_XR[leg, rank] -= 1
    for receiver in range(len(node_R)):
        copies = ports.copies_XRR[leg, rank, receiver]
        if copies > 0:
            link = 0 if node_R[rank] == node_R[receiver] else 1
            duration = _duration(
                ports, leg, link, ports.messages_XCR[leg, link, receiver], ports.left_XCR[leg, link, receiver]
            )
            ports.done_XCR[leg, link, receiver] = max(ports.done_XCR[leg, link, receiver], now + duration)
            ports.messages_XCR[leg, link, receiver] -= 1
            ports.left_XCR[leg, link, receiver] -= copies
            ports.sent_XR[leg, receiver] = max(ports.sent_XR[leg, receiver], sent)
            ports.missing_XR[leg, receiver] -= 1
    if ports.blocked_XQ.shape[1] == 0:
        return _release(ports, leg, leaves, 0)
    _arrive_at_uplinks(ports, leg, rank, now)
    count = 0
    for later in range(leg, len(ports.blocked_XQ)):
        closed = _close_uplinks(ports, later)
        count = _release(ports, later, leaves, count)
        if not closed:
            break
    return count


@njit(cache=True)
def _duration(ports: Ports, leg: int, link: int, messages: int, copies: int) -> int:
    slope = ports.slope_XC2[leg, link, 1 if messages > 1 else 0]
    return int(np.rint(messages * ports.alpha[link] + copies * slope))


@njit(cache=True)
def _release(ports: Ports, leg: int, leaves: IntArray, count: int) -> int:
    for rank in range(len(ports.node_R)):
        if ports.missing_XR[leg, rank] != 0:
            continue
        ports.missing_XR[leg, rank] = -1
        end = ports.sent_XR[leg, rank]
        for link in range(2):
            whole = ports.whole_XCR[leg, link, rank]
            if whole > 0:
                done = max(ports.done_XCR[leg, link, rank], ports.free_CR[link, rank] + whole)
                ports.free_CR[link, rank] = done
                end = max(end, done)
        for port in range(ports.needs_XQR.shape[1]):
            if ports.needs_XQR[leg, port, rank]:
                end = max(end, ports.done_XQ[leg, port])
        leaves[count, 0] = rank
        leaves[count, 1] = end
        count += 1
    return count


@njit(cache=True)
def _arrive_at_uplinks(ports: Ports, leg: int, rank: int, now: int) -> None:
    nodes = ports.between_XNN.shape[1]
    home = ports.node_R[rank]
    across_N = np.zeros(nodes, dtype=np.int64)
    for receiver in range(len(ports.node_R)):
        if ports.node_R[receiver] != home:
            across_N[ports.node_R[receiver]] += ports.copies_XRR[leg, rank, receiver]
    if across_N.sum() == 0:
        return
    ports.done_XQ[leg, home] = max(ports.done_XQ[leg, home], now + _uplink_duration(ports, leg, home))
    ports.blocked_XQ[leg, home] -= 1
    for node in range(nodes):
        if across_N[node] > 0:
            port = nodes + node
            ports.done_XQ[leg, port] = max(ports.done_XQ[leg, port], now + _uplink_duration(ports, leg, port))
            ports.blocked_XQ[leg, port] -= 1
            ports.between_XNN[leg, home, node] -= across_N[node]


@njit(cache=True)
def _uplink_duration(ports: Ports, leg: int, port: int) -> int:
    """Time of all copies that are still to come through an uplink; a node pair is one message."""
    nodes = ports.between_XNN.shape[1]
    messages, copies = 0, 0
    for node in range(nodes):
        left = ports.between_XNN[leg, port, node] if port < nodes else ports.between_XNN[leg, node, port - nodes]
        messages += left > 0
        copies += left
    return _duration(ports, leg, 2, messages, copies)


@njit(cache=True)
def _close_uplinks(ports: Ports, leg: int) -> bool:
    """Whether any uplink port became done in this leg; it then opens for the next leg."""
    closed = False
    for port in range(ports.blocked_XQ.shape[1]):
        if ports.blocked_XQ[leg, port] != 0:
            continue
        closed = True
        ports.blocked_XQ[leg, port] = -1
        free = ports.done_XQ[leg - 1, port] if leg > 0 else 0
        ports.done_XQ[leg, port] = max(ports.done_XQ[leg, port], free + ports.whole_XQ[leg, port])
        for rank in range(len(ports.node_R)):
            if ports.needs_XQR[leg, port, rank]:
                ports.missing_XR[leg, rank] -= 1
        if leg + 1 < len(ports.blocked_XQ):
            ports.blocked_XQ[leg + 1, port] -= 1
    return closed


@njit(cache=True)
def _count(ports: Ports) -> None:
    """Fills what depends on copies_XRR alone."""
    legs, ranks = ports.missing_XR.shape
    nodes = ports.between_XNN.shape[1]
    uplinks = ports.blocked_XQ.shape[1]
    crosses_N = np.zeros(nodes, dtype=np.bool_)
    for leg in range(legs):
        for sender in range(ranks):
            home = ports.node_R[sender]
            crosses_N[:] = False
            for receiver in range(ranks):
                copies = ports.copies_XRR[leg, sender, receiver]
                if copies == 0:
                    continue
                node = ports.node_R[receiver]
                link = 0 if node == home else 1
                ports.left_XCR[leg, link, receiver] += copies
                ports.messages_XCR[leg, link, receiver] += 1
                ports.missing_XR[leg, receiver] += 1
                if link == 1 and uplinks > 0:
                    crosses_N[node] = True
                    ports.between_XNN[leg, home, node] += copies
                    ports.needs_XQR[leg, home, sender] = True
                    ports.needs_XQR[leg, home, receiver] = True
                    ports.needs_XQR[leg, nodes + node, receiver] = True
            for node in range(nodes):
                if crosses_N[node]:
                    ports.blocked_XQ[leg, nodes + node] += 1
            if crosses_N.any():
                ports.blocked_XQ[leg, home] += 1
        for rank in range(ranks):
            ports.missing_XR[leg, rank] += 1
            for link in range(2):
                messages, copies = ports.messages_XCR[leg, link, rank], ports.left_XCR[leg, link, rank]
                ports.whole_XCR[leg, link, rank] = _duration(ports, leg, link, messages, copies)
            for port in range(uplinks):
                ports.missing_XR[leg, rank] += ports.needs_XQR[leg, port, rank]
        for port in range(uplinks):
            ports.whole_XQ[leg, port] = _uplink_duration(ports, leg, port)
            if leg > 0:
                ports.blocked_XQ[leg, port] += 1
