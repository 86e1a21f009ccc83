"""Which links a message crosses and how long it needs each of them: the trees that flows run through.

Legend: R ranks, F messages, P places of a path (unused ones hold the number of links), Q links.
Tier by tier a rank has a port (its own, its node's, its pod's); a port is two links, one each way (full duplex).
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from placer.core.cluster import ClusterSpec, LinkClass

__all__ = ["Messages", "Tier", "Topology", "cluster_topology"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Tier:
    """Ports of one class. `port_R`: the port of each rank; a message passes the tier where `area_R` of its ends differ.

    With `inside`, where they are equal: the links of a node's ranks to each other.
    """

    link: LinkClass
    port_R: IntArray
    area_R: IntArray
    inside: bool = False


class Messages(NamedTuple):
    """The messages of one exchange, sorted by sender.

    sender_F, receiver_F   ranks
    path_FP       links crossed, padded with the number of links
    pair_FP       the pair of ports (ranks, nodes, ...) that each of them serves here: its message in the closed form
    alone_ns_F    time of the message where nobody else is on its path: that of its slowest link, whole nanoseconds
    cost_2FP      share of each link's time that it needs at that speed: alone on the link, and beside other pairs
    """

    sender_F: IntArray
    receiver_F: IntArray
    path_FP: IntArray
    pair_FP: IntArray
    alone_ns_F: FloatArray
    cost_2FP: FloatArray


@dataclass(frozen=True, slots=True)
class Topology:
    """Tiers from the ranks' ports upwards; links are numbered tier by tier, sending ports before receiving ports."""

    tiers: tuple[Tier, ...]

    @property
    def ports_t(self) -> list[int]:
        """Ports of each tier."""
        return [int(tier.port_R.max()) + 1 for tier in self.tiers]

    @property
    def num_links(self) -> int:
        """Q, two for each port."""
        return 2 * sum(self.ports_t)

    @property
    def num_pairs(self) -> int:
        """Pairs of ports of one tier, over all tiers."""
        return sum(ports * ports for ports in self.ports_t)

    @property
    def places(self) -> int:
        """P, the longest path: messages that pass an `inside` tier pass no other."""
        return 2 * max(1, sum(not tier.inside for tier in self.tiers))

    def room_Q(self) -> IntArray:
        """How many ordered pairs of ranks cross each link, (Q,)."""
        room = []
        for tier, ports in zip(self.tiers, self.ports_t, strict=True):
            population = np.bincount(tier.area_R)[tier.area_R]
            reached_R = population if tier.inside else len(tier.area_R) - population
            crossing = np.bincount(tier.port_R, weights=reached_R, minlength=ports).astype(np.int64)
            room += [crossing, crossing]
        return np.concatenate(room)

    def neighbours_Q(self) -> tuple[IntArray, IntArray]:
        """Where all paths have two links: the first link that those of each lead to, and how many; else none."""
        near, span = [np.zeros(0, dtype=np.int64)], [np.zeros(0, dtype=np.int64)]
        first_link = 0
        for tier, ports in zip(self.tiers, self.ports_t, strict=True):
            if tier.inside:
                # ports of one area, and those numbered between them
                lowest, highest = np.full(ports, ports), np.full(ports, -1)
                for area in range(int(tier.area_R.max()) + 1):
                    members = tier.port_R[tier.area_R == area]
                    lowest[members] = np.minimum(lowest[members], members.min())
                    highest[members] = np.maximum(highest[members], members.max())
            else:
                lowest, highest = np.zeros(ports, dtype=np.int64), np.full(ports, ports - 1)
            near += [first_link + ports + lowest, first_link + lowest]
            span += [highest - lowest + 1] * 2
            first_link += 2 * ports
        return np.concatenate(near), np.concatenate(span) * (self.places == 2)

    def messages(self, copies_RR: npt.NDArray[np.integer], copy_bytes: int) -> Messages:
        """Messages of an exchange of copies_RR[a, b] copies of `copy_bytes` from a to b. Cost O(F P).

        A message needs a link for alpha + bytes / beta (* tail beside other pairs); its time alone is rounded to whole
        nanoseconds, as the closed form rounds that of one message.
        Above the ranks' ports, all messages of a pair of ports are one message there: they share its alpha by bytes.
        """
        sender, receiver = np.nonzero(copies_RR)
        copies = copies_RR[sender, receiver].astype(np.int64)
        shape = (len(sender), self.places)
        path = np.full(shape, self.num_links, dtype=np.int64)
        pair = np.zeros(shape, dtype=np.int64)
        time_2FP = np.zeros((2, *shape))
        used_F = np.zeros(len(sender), dtype=np.int64)
        first_link, first_pair = 0, 0
        for tier, ports in zip(self.tiers, self.ports_t, strict=True):
            crosses = np.flatnonzero((tier.area_R[sender] == tier.area_R[receiver]) == tier.inside)
            a, b, place = tier.port_R[sender[crosses]], tier.port_R[receiver[crosses]], used_F[crosses]
            share = copies[crosses] / np.bincount(a * ports + b, weights=copies[crosses])[a * ports + b]
            slope = copy_bytes / tier.link.gbytes_per_s
            for way, link in enumerate((first_link + a, first_link + ports + b)):
                path[crosses, place + way] = link
                pair[crosses, place + way] = first_pair + a * ports + b
                for beside, per_copy in enumerate((slope, slope * tier.link.tail)):
                    time_2FP[beside, crosses, place + way] = share * tier.link.alpha_ns + copies[crosses] * per_copy
            used_F[crosses] += 2
            first_link, first_pair = first_link + 2 * ports, first_pair + ports * ports
        slowest_F = time_2FP[0].max(axis=1, initial=0.0)
        return Messages(sender, receiver, path, pair, np.rint(slowest_F), time_2FP / slowest_F[None, :, None])


def cluster_topology(cluster: ClusterSpec, above: tuple[Tier, ...] = ()) -> Topology:
    """Ports of ranks inside their node, their NICs, the nodes' uplinks where there are any, then tiers `above`."""
    rank_R, node_R = np.arange(cluster.num_ranks), cluster.node_R
    tiers = [Tier(cluster.intra, rank_R, node_R, inside=True)]
    if cluster.nodes > 1:
        tiers.append(Tier(cluster.inter, rank_R, node_R))
        if cluster.uplink is not None:
            tiers.append(Tier(cluster.uplink, node_R, node_R))
    return Topology((*tiers, *above))
