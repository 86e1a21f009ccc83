"""Collectives as legs: what the usual all-to-alls, gathers and reductions move, to be timed on a cluster.

Legend: R ranks. Bytes are what one rank hands to one other in a leg.
Every function returns the legs in order; `collective_ns` runs them, all ranks starting together.
"""

import math

import numpy as np
import numpy.typing as npt

from placer.core.cluster import ClusterSpec
from placer.core.cost import leg_times
from placer.core.errors import UsageError
from placer.core.schedule import expand_leg
from placer.core.timeline import PHASES
from sim.flow.ranks import flow_times
from sim.stages import NETWORK, Stage
from sim.traffic import Leg, Work

__all__ = [
    "all_gather_direct",
    "all_gather_ring",
    "all_reduce_ring",
    "collective_ns",
    "exchange",
    "linear_all_to_all",
    "reduce_scatter_direct",
    "reduce_scatter_ring",
    "two_dh_all_to_all",
    "two_hop_all_to_all",
]

IntArray = npt.NDArray[np.int64]


def exchange(cluster: ClusterSpec, bytes_RR: IntArray) -> Leg:
    """One leg in which rank a sends bytes_RR[a, b] bytes to rank b."""
    unit = max(1, math.gcd(*bytes_RR.reshape(-1).tolist()))
    copies_WRR = (bytes_RR // unit)[None]
    if copies_WRR.max() > np.iinfo(np.int32).max:
        raise UsageError(f"an exchange of {bytes_RR.max()} bytes in units of {unit}; give sizes with a larger unit")
    return Leg(copies_WRR.astype(np.int32), leg_times(cluster, copies_WRR, unit), unit)


def linear_all_to_all(cluster: ClusterSpec, chunk_bytes: int) -> tuple[Leg, ...]:
    """Every rank sends a chunk to every other, all at once."""
    return (exchange(cluster, _everybody(cluster, chunk_bytes)),)


def two_dh_all_to_all(cluster: ClusterSpec, chunk_bytes: int) -> tuple[Leg, ...]:
    """The same inside the nodes first, then one message between ranks of equal local index (Tutel, section 3.3)."""
    legs = expand_leg(_everybody(cluster, chunk_bytes)[None], "2dh", cluster.ranks_per_node)
    return tuple(exchange(cluster, leg[0]) for leg in legs)


def two_hop_all_to_all(cluster: ClusterSpec, node_bytes: int, rank_bytes: int) -> tuple[Leg, ...]:
    """De-duplicated: every rank sends `node_bytes` to each other node, whose rank of equal local index hands on.

    Every rank then sends `rank_bytes` to each other rank of its node.
    """
    local_R = np.arange(cluster.num_ranks) % cluster.ranks_per_node
    other = ~np.eye(cluster.num_ranks, dtype=bool)
    across = (local_R[:, None] == local_R[None, :]) & other
    inside = (cluster.node_R[:, None] == cluster.node_R[None, :]) & other
    return exchange(cluster, across * node_bytes), exchange(cluster, inside * rank_bytes)


def all_gather_direct(cluster: ClusterSpec, shard_bytes: int) -> tuple[Leg, ...]:
    """Every rank sends its shard to every other, all at once."""
    return linear_all_to_all(cluster, shard_bytes)


def all_gather_ring(cluster: ClusterSpec, shard_bytes: int) -> tuple[Leg, ...]:
    """R - 1 steps, in each of which every rank hands the next one the shard that it got last."""
    ring = np.roll(np.eye(cluster.num_ranks, dtype=np.int64), 1, axis=1) * shard_bytes
    return (exchange(cluster, ring),) * (cluster.num_ranks - 1)


def reduce_scatter_direct(cluster: ClusterSpec, shard_bytes: int) -> tuple[Leg, ...]:
    """Every rank sends every other its part of the shard that the other sums up, all at once."""
    return linear_all_to_all(cluster, shard_bytes)


def reduce_scatter_ring(cluster: ClusterSpec, shard_bytes: int) -> tuple[Leg, ...]:
    """R - 1 steps, in each of which every rank hands on one partial sum of the size of a shard. Sums cost nothing."""
    return all_gather_ring(cluster, shard_bytes)


def all_reduce_ring(cluster: ClusterSpec, shard_bytes: int) -> tuple[Leg, ...]:
    """A reduce-scatter and an all-gather, of R shards in all."""
    return reduce_scatter_ring(cluster, shard_bytes) + all_gather_ring(cluster, shard_bytes)


def collective_ns(cluster: ClusterSpec, legs: tuple[Leg, ...]) -> int:
    """When the last rank is done, at fidelity `flow`."""
    none_WR = np.zeros((1, cluster.num_ranks), dtype=np.int64)
    stage = Stage(-1, PHASES.index("gather"), none_WR, legs=legs, stream=NETWORK)
    work = Work(cluster, 1, np.zeros(1, dtype=np.int64), (), None)
    return int(flow_times(work, [stage]).total_W[0])


def _everybody(cluster: ClusterSpec, size: int) -> IntArray:
    return (1 - np.eye(cluster.num_ranks, dtype=np.int64)) * size
