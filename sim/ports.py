"""All-to-all legs without a barrier: a rank leaves a leg as soon as every port that its copies pass through is done.

Legend: X legs of one iteration in order, R ranks, N nodes, C link classes of a rank (0 inside the node, 1 its NIC),
Q uplink ports (n sends for node n, N + n receives for it). Times are integer nanoseconds.

Ports are servers: every rank sends and receives on its link inside the node and on its NIC, every node sends and
receives on its uplink. A sender's copies reach a port when that sender arrives at the leg, so a port is done at

    max over its senders j of (arrival of j + time of all copies handed in by j or later)

which is a work-conserving first-come server, and the closed form (placer.core.cost.leg_times, same expression, same
rounding) when all arrive together. Copies may reach a rank that is still busy with the stage before (one-sided puts,
as DeepEP and NCCL's buffers allow). A port finishes one leg before the next: collectives are in order on a stream, and
legs that run beside each other on two streams share no port (one keeps inside nodes, the other crosses the network).

Who waits for what: a rank leaves when its own sending is done, when the sending of all its senders is done (the order
of receivers inside one send is not modelled), when its receiving ports are done, and when the uplinks are done that
any of its copies passed.
"""

from itertools import product
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.cluster import ClusterSpec
from sim.traffic import Leg

__all__ = ["Ports", "arrive", "open_ports", "quiet_arrivals"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

COMING, CLOSING, SENT, OUT = range(4)
"""Of a rank in a leg: arrivals (its own and its senders') that it still waits for, -1 once it left; uplinks that
it waits for; latest end of sending of the ranks it hears from, itself included; how long its own sending takes."""

LEFT, MESSAGES, WHOLE, DONE = range(4)
"""Of a receiving port in a leg: copies and messages not handed in yet; time of all its copies; when it is done as far
as known."""

BEFORE = 1
"""Of an uplink port in a leg: COMING, senders it waits for, -1 once done; BEFORE, whether the leg before keeps it;
WHOLE and DONE."""

ALPHA, ALONE, SHARED = range(3)
"""Of a link class in a leg: ns per message; ns per copy where one message passes the port, and where several do."""


class Ports(NamedTuple):
    """The state of every port in every leg of one iteration; `arrive` updates it in place. Last axes are named above.

    copies_XRR      what each rank sends to each
    node_R          node of each rank
    price_XC3       ALPHA, ALONE and SHARED of: link inside the node, NIC, uplink
    rank_XR4        COMING, CLOSING, SENT and OUT of each rank
    receive_XCR4    LEFT, MESSAGES, WHOLE and DONE of each receiving port
    free_CR         when the receiving port was done with the legs before
    between_XNN     copies not handed in yet from node to node
    uplink_XQ4      COMING, BEFORE, WHOLE and DONE of each uplink port
    needs_XQR       whether copies of a rank pass an uplink port
    """

    # few arrays, because numba unpacks each of them in each call
    copies_XRR: npt.NDArray[np.int32]
    node_R: IntArray
    price_XC3: FloatArray
    rank_XR4: IntArray
    receive_XCR4: IntArray
    free_CR: IntArray
    between_XNN: IntArray
    uplink_XQ4: IntArray
    needs_XQR: npt.NDArray[np.bool_]


def open_ports(cluster: ClusterSpec, legs: list[Leg], window: int) -> Ports:
    """All ports idle before the first leg of iteration `window`. Cost O(X R^2)."""
    ranks, nodes, count = cluster.num_ranks, cluster.nodes, len(legs)
    links = [cluster.intra, cluster.inter]
    uplinks = 0
    if cluster.uplink is not None and nodes > 1:
        links.append(cluster.uplink)
        uplinks = 2 * nodes
    price_XC3 = np.zeros((count, len(links), 3))
    for at, link in product(range(count), range(len(links))):
        slope = legs[at].copy_bytes / links[link].gbytes_per_s
        price_XC3[at, link] = links[link].alpha_ns, slope, slope * links[link].tail
    ports = Ports(
        copies_XRR=np.zeros((count, ranks, ranks), dtype=np.int32),
        node_R=cluster.node_R,
        price_XC3=price_XC3,
        rank_XR4=np.zeros((count, ranks, 4), dtype=np.int64),
        receive_XCR4=np.zeros((count, 2, ranks, 4), dtype=np.int64),
        free_CR=np.zeros((2, ranks), dtype=np.int64),
        between_XNN=np.zeros((count, nodes, nodes), dtype=np.int64),
        uplink_XQ4=np.zeros((count, uplinks, 4), dtype=np.int64),
        needs_XQR=np.zeros((count, uplinks, ranks), dtype=np.bool_),
    )
    for at, exchange in enumerate(legs):
        ports.copies_XRR[at] = exchange.copies_WRR[window]
        ports.rank_XR4[at, :, OUT] = exchange.times.out_WR[window]
    _count(ports)
    return ports


@njit(cache=True)
def arrive(ports: Ports, leg: int, arrivals_A2: IntArray, leaves: IntArray) -> tuple[int, int]:
    """Ranks are ready for the leg: their copies are handed to the ports. How many ranks may leave because of it, and
    how many more arrivals at this leg may be held back before the next call (see `quiet_arrivals`).

    `arrivals_A2` are (rank, time), in order of time. The first so many rows of `leaves` (2 R, 3) become (leg, rank,
    when it leaves): a rank waits in one leg of each of its two streams at a time, and an uplink that closes lets ranks
    go that are legs ahead.
    """
    for arrival in range(len(arrivals_A2)):
        rank, now = arrivals_A2[arrival, 0], arrivals_A2[arrival, 1]
        _hand_in(ports, leg, rank, now)
        if ports.uplink_XQ4.shape[1] > 0:
            _hand_in_at_uplinks(ports, leg, rank, now)
    count = 0
    if ports.uplink_XQ4.shape[1] == 0:
        count = _release(ports, leg, leaves, count)
        return count, quiet_arrivals(ports, leg)
    for later in range(leg, len(ports.uplink_XQ4)):
        closed = _close_uplinks(ports, later)
        count = _release(ports, later, leaves, count)
        if not closed:
            break
    return count, quiet_arrivals(ports, leg)


@njit(cache=True)
def quiet_arrivals(ports: Ports, leg: int) -> int:
    """How many more arrivals at a leg can neither let a rank go nor close an uplink.

    Each waits for some number of arrivals, of which one arrival is at most one.
    """
    ranks, uplinks = len(ports.node_R), ports.uplink_XQ4.shape[1]
    least = ranks + 1
    for rank in range(ranks):
        if ports.rank_XR4[leg, rank, COMING] > 0:
            least = min(least, ports.rank_XR4[leg, rank, COMING])
    for uplink in range(uplinks):
        if ports.uplink_XQ4[leg, uplink, COMING] > 0:
            least = min(least, ports.uplink_XQ4[leg, uplink, COMING])
    return int(least) - 1


@njit(cache=True)
def _hand_in(ports: Ports, leg: int, rank: int, now: int) -> None:
    node_R, ranks_R4 = ports.node_R, ports.rank_XR4[leg]
    sent = now + ranks_R4[rank, OUT]
    ranks_R4[rank, SENT] = max(ranks_R4[rank, SENT], sent)
    ranks_R4[rank, COMING] -= 1
    for receiver in range(len(node_R)):
        copies = ports.copies_XRR[leg, rank, receiver]
        if copies > 0:
            link = 0 if node_R[rank] == node_R[receiver] else 1
            port = ports.receive_XCR4[leg, link, receiver]
            port[DONE] = max(port[DONE], now + _duration(ports, leg, link, port[MESSAGES], port[LEFT]))
            port[MESSAGES] -= 1
            port[LEFT] -= copies
            ranks_R4[receiver, SENT] = max(ranks_R4[receiver, SENT], sent)
            ranks_R4[receiver, COMING] -= 1


@njit(cache=True)
def _duration(ports: Ports, leg: int, link: int, messages: int, copies: int) -> int:
    price = ports.price_XC3[leg, link]
    return int(np.rint(messages * price[ALPHA] + copies * price[SHARED if messages > 1 else ALONE]))


@njit(cache=True)
def _release(ports: Ports, leg: int, leaves: IntArray, count: int) -> int:
    ranks_R4 = ports.rank_XR4[leg]
    for rank in range(len(ports.node_R)):
        if ranks_R4[rank, COMING] != 0 or ranks_R4[rank, CLOSING] != 0:
            continue
        ranks_R4[rank, COMING] = -1
        end = ranks_R4[rank, SENT]
        for link in range(2):
            port = ports.receive_XCR4[leg, link, rank]
            if port[WHOLE] > 0:
                done = max(port[DONE], ports.free_CR[link, rank] + port[WHOLE])
                ports.free_CR[link, rank] = done
                end = max(end, done)
        for uplink in range(ports.needs_XQR.shape[1]):
            if ports.needs_XQR[leg, uplink, rank]:
                end = max(end, ports.uplink_XQ4[leg, uplink, DONE])
        leaves[count, 0] = leg
        leaves[count, 1] = rank
        leaves[count, 2] = end
        count += 1
    return count


@njit(cache=True)
def _hand_in_at_uplinks(ports: Ports, leg: int, rank: int, now: int) -> None:
    nodes = ports.between_XNN.shape[1]
    home = ports.node_R[rank]
    across_N = np.zeros(nodes, dtype=np.int64)
    for receiver in range(len(ports.node_R)):
        if ports.node_R[receiver] != home:
            across_N[ports.node_R[receiver]] += ports.copies_XRR[leg, rank, receiver]
    if across_N.sum() == 0:
        return
    out = ports.uplink_XQ4[leg, home]
    out[DONE] = max(out[DONE], now + _uplink_duration(ports, leg, home))
    out[COMING] -= 1
    for node in range(nodes):
        if across_N[node] > 0:
            into = ports.uplink_XQ4[leg, nodes + node]
            into[DONE] = max(into[DONE], now + _uplink_duration(ports, leg, nodes + node))
            into[COMING] -= 1
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
    for uplink in range(ports.uplink_XQ4.shape[1]):
        port = ports.uplink_XQ4[leg, uplink]
        if port[COMING] != 0 or port[BEFORE] != 0:
            continue
        closed = True
        port[COMING] = -1
        free = ports.uplink_XQ4[leg - 1, uplink, DONE] if leg > 0 else 0
        port[DONE] = max(port[DONE], free + port[WHOLE])
        for rank in range(len(ports.node_R)):
            if ports.needs_XQR[leg, uplink, rank]:
                ports.rank_XR4[leg, rank, CLOSING] -= 1
        if leg + 1 < len(ports.uplink_XQ4):
            ports.uplink_XQ4[leg + 1, uplink, BEFORE] = 0
    return closed


@njit(cache=True)
def _count(ports: Ports) -> None:
    """Fills what depends on copies_XRR alone."""
    legs, ranks, _ = ports.rank_XR4.shape
    nodes = ports.between_XNN.shape[1]
    uplinks = ports.uplink_XQ4.shape[1]
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
                ports.receive_XCR4[leg, link, receiver, LEFT] += copies
                ports.receive_XCR4[leg, link, receiver, MESSAGES] += 1
                ports.rank_XR4[leg, receiver, COMING] += 1
                if link == 1 and uplinks > 0:
                    crosses_N[node] = True
                    ports.between_XNN[leg, home, node] += copies
                    ports.needs_XQR[leg, home, sender] = True
                    ports.needs_XQR[leg, home, receiver] = True
                    ports.needs_XQR[leg, nodes + node, receiver] = True
            for node in range(nodes):
                if crosses_N[node]:
                    ports.uplink_XQ4[leg, nodes + node, COMING] += 1
            if crosses_N.any():
                ports.uplink_XQ4[leg, home, COMING] += 1
        for rank in range(ranks):
            ports.rank_XR4[leg, rank, COMING] += 1
            for link in range(2):
                port = ports.receive_XCR4[leg, link, rank]
                port[WHOLE] = _duration(ports, leg, link, port[MESSAGES], port[LEFT])
            for uplink in range(uplinks):
                ports.rank_XR4[leg, rank, CLOSING] += ports.needs_XQR[leg, uplink, rank]
        for uplink in range(uplinks):
            ports.uplink_XQ4[leg, uplink, WHOLE] = _uplink_duration(ports, leg, uplink)
            ports.uplink_XQ4[leg, uplink, BEFORE] = leg > 0
