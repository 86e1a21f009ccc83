"""Closed forms of collectives whose messages are all of one size, and the papers' formulas of volume.

Messages of n bytes take alpha + n / beta on every port they use (placer.core.cost.port_ns); a leg lasts as long as its
busiest port and legs follow each other. Every form equals the sum of `leg_times` over the copies matrices of its legs.
`message_bytes` is what one rank has for one other rank (S / n in Tutel's words). Times are integer nanoseconds.
"""

import numpy as np

from placer.core.cluster import ClusterSpec, LinkClass
from placer.core.cost import port_ns

__all__ = [
    "all_gather_ns",
    "all_reduce_ns",
    "exflow_copies",
    "linear_all_to_all_ns",
    "lsh_moe_ratio",
    "reduce_scatter_ns",
    "two_dimensional_all_to_all_ns",
    "two_hop_ns",
]


def linear_all_to_all_ns(cluster: ClusterSpec, message_bytes: int) -> int:
    """Every rank sends `message_bytes` to every other rank at once."""
    local, away = cluster.ranks_per_node - 1, cluster.num_ranks - cluster.ranks_per_node
    return max(
        _port(cluster.intra, local, local, message_bytes),
        _port(cluster.inter, away, away, message_bytes),
        _uplink(cluster, cluster.ranks_per_node**2, message_bytes),
    )


def two_dimensional_all_to_all_ns(cluster: ClusterSpec, message_bytes: int) -> int:
    """The same bytes by 2DH: inside the node first, then one larger message from node to node for each local index.

    Fewer messages leave a rank (R/N - 1 + N - 1 instead of R - 1) for bytes that cross the node's links once more.
    Reference: Tutel (arXiv 2206.03382), section 3.3.
    """
    local, nodes = cluster.ranks_per_node - 1, cluster.nodes
    inside = _port(cluster.intra, local, local * nodes, message_bytes)
    across = max(
        _port(cluster.inter, nodes - 1, (nodes - 1) * cluster.ranks_per_node, message_bytes),
        _uplink(cluster, cluster.ranks_per_node**2, message_bytes),
    )
    return inside + across


def two_hop_ns(cluster: ClusterSpec, across_bytes: int, inside_bytes: int) -> int:
    """Dispatch of mode per_node: each rank sends `across_bytes` to one rank of every other node, which then hands
    `inside_bytes` to each other rank of its own node."""
    others, local = cluster.nodes - 1, cluster.ranks_per_node - 1
    across = max(
        _port(cluster.inter, others, others, across_bytes), _uplink(cluster, cluster.ranks_per_node, across_bytes)
    )
    return across + _port(cluster.intra, local, local, inside_bytes)


def all_gather_ns(cluster: ClusterSpec, block_bytes: int) -> int:
    """Every rank's block reaches all ranks along a ring: R - 1 steps, one message from each rank to the next."""
    step = max(
        _port(cluster.intra, 1, 1, block_bytes) if cluster.ranks_per_node > 1 else 0,
        _port(cluster.inter, 1, 1, block_bytes) if cluster.nodes > 1 else 0,
        0 if cluster.uplink is None or cluster.nodes == 1 else _port(cluster.uplink, 1, 1, block_bytes),
    )
    return (cluster.num_ranks - 1) * step


def reduce_scatter_ns(cluster: ClusterSpec, block_bytes: int) -> int:
    """Every rank ends with the sum of one block over all ranks: the ring of `all_gather_ns` the other way round."""
    return all_gather_ns(cluster, block_bytes)


def all_reduce_ns(cluster: ClusterSpec, total_bytes: int) -> int:
    """Every rank ends with the sum of `total_bytes` over all ranks: reduce-scatter, then all-gather of R-th parts."""
    block = -(-total_bytes // cluster.num_ranks)
    return reduce_scatter_ns(cluster, block) + all_gather_ns(cluster, block)


def exflow_copies(ranks: int, tokens_per_rank: int, layers: int, leaving: float, *, coherent: bool) -> float:
    """Copies that an iteration sends when a share `leaving` of the tokens changes rank in every layer (top-1).

    Standard: there and back, 2 G N L p. Coherent: there only, and each new token made known everywhere, G N (L p + G).
    ExFlow counts a rank's own copy of the gather; what moves is G N (L p + G - 1).
    Reference: ExFlow (arXiv 2401.08383), section 4.
    """
    tokens = ranks * tokens_per_rank
    return tokens * (layers * leaving + ranks) if coherent else 2 * tokens * layers * leaving


def lsh_moe_ratio(flops_per_ns: float, elements_per_ns: float, top_k: int, ranks: int, hidden_size: int) -> float:
    """Time of a layer's four all-to-alls over time of its computation in training.

    T_a2a / T_comp = flops / (6 B) * k / (1 + 2 k) * (w - 1) / (w h), B being elements a nanosecond between servers.
    Reference: LSH-MoE (arXiv 2411.08446), section 3: 4 l (n k / w) h (w - 1) / B over 24 (1 + 2 k) n l h^2 / flops.
    """
    return flops_per_ns / (6 * elements_per_ns) * top_k / (1 + 2 * top_k) * (ranks - 1) / (ranks * hidden_size)


def _port(link: LinkClass, messages: int, units: int, unit_bytes: int) -> int:
    return int(port_ns(link, np.array(messages), np.array(units), unit_bytes))


def _uplink(cluster: ClusterSpec, pairs: int, message_bytes: int) -> int:
    """Time of a node's uplink when `pairs` messages go to every other node; a pair of nodes is one message there."""
    others = cluster.nodes - 1
    return 0 if cluster.uplink is None else _port(cluster.uplink, others, others * pairs, message_bytes)
