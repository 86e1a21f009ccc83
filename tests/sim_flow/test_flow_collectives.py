"""Collectives through the flow engine against their alpha-beta closed forms, and Tutel's crossover."""

import numpy as np
import pytest
from flow_cases import cluster_of

from placer.core.cluster import ClusterSpec, LinkClass
from placer.core.errors import UsageError
from sim.flow.collectives import (
    all_gather_direct,
    all_gather_ring,
    all_reduce_ring,
    collective_ns,
    exchange,
    linear_all_to_all,
    reduce_scatter_direct,
    reduce_scatter_ring,
    two_dh_all_to_all,
    two_hop_all_to_all,
)

INTRA = LinkClass(gbytes_per_s=100.0, alpha_us=1.0)
INTER = LinkClass(gbytes_per_s=10.0, alpha_us=5.0)
SHAPES = [(1, 4), (2, 1), (2, 4), (4, 2), (3, 3)]


def ports(messages: int, size: int, link: LinkClass) -> float:
    """A port's time for so many messages of so many bytes each."""
    return messages * (link.alpha_ns + size / link.gbytes_per_s) if messages else 0.0


def cluster(nodes: int, per_node: int) -> ClusterSpec:
    return cluster_of(nodes, per_node, intra=INTRA, inter=INTER)


@pytest.mark.parametrize(("nodes", "per_node"), SHAPES)
@pytest.mark.parametrize("size", [1000, 123_000, 20_000_000])
def test_even_collectives_take_their_closed_forms(nodes: int, per_node: int, size: int) -> None:
    """Sizes are whole nanoseconds, so to the nanosecond."""
    of, ranks = cluster(nodes, per_node), nodes * per_node
    direct = max(ports(per_node - 1, size, INTRA), ports(ranks - per_node, size, INTER))
    for legs in (linear_all_to_all(of, size), all_gather_direct(of, size), reduce_scatter_direct(of, size)):
        assert collective_ns(of, legs) == direct
    inside = ports(per_node - 1, nodes * size, INTRA)
    across = ports(nodes - 1, per_node * size, INTER)
    assert collective_ns(of, two_dh_all_to_all(of, size)) == inside + across
    hops = ports(nodes - 1, size, INTER) + ports(per_node - 1, 3 * size, INTRA)
    assert collective_ns(of, two_hop_all_to_all(of, size, 3 * size)) == hops


@pytest.mark.parametrize(("nodes", "per_node"), SHAPES)
def test_rings_take_their_closed_forms(nodes: int, per_node: int) -> None:
    """The slowest link of the ring sets the pace: whoever is ahead waits for what it has to hand on."""
    of, ranks, size = cluster(nodes, per_node), nodes * per_node, 1_000_000
    step = ports(1, size, INTRA if nodes == 1 else INTER)
    assert collective_ns(of, all_gather_ring(of, size)) == (ranks - 1) * step
    assert collective_ns(of, reduce_scatter_ring(of, size)) == (ranks - 1) * step
    assert collective_ns(of, all_reduce_ring(of, size)) == 2 * (ranks - 1) * step


def test_uplinks_bound_an_even_exchange() -> None:
    of = cluster_of(4, 2, intra=INTRA, inter=INTER, uplink=LinkClass(gbytes_per_s=12.5, alpha_us=3.0))
    size = 1_000_000
    uplink = 3 * (3000 + 4 * size / 12.5)
    assert collective_ns(of, linear_all_to_all(of, size)) == uplink > ports(6, size, INTER)


def test_2dh_wins_for_small_chunks_and_many_nodes_and_linear_for_large_and_few() -> None:
    """Tutel, section 3.3. Equal where (ranks - m) and (nodes - 1) messages' alphas weigh as much as the second trip."""
    wins = {}
    for nodes in (2, 4, 8):
        of = cluster(nodes, 4)
        for size in (100, 10_000, 100_000, 1_000_000, 10_000_000):
            linear, dh = (collective_ns(of, f(of, size)) for f in (linear_all_to_all, two_dh_all_to_all))
            wins[nodes, size] = dh < linear
            saved = (nodes - 1) * 3 * INTER.alpha_ns
            paid = ports(3, nodes * size, INTRA)
            assert linear - dh == saved - paid
    assert all(wins[nodes, 100] for nodes in (2, 4, 8))
    assert not any(wins[nodes, 10_000_000] for nodes in (2, 4, 8))
    for nodes in (2, 4, 8):
        row = [wins[nodes, size] for size in (100, 10_000, 100_000, 1_000_000, 10_000_000)]
        assert row == sorted(row, reverse=True), "one crossover"
    for size in (100, 10_000, 100_000, 1_000_000, 10_000_000):
        column = [wins[nodes, size] for nodes in (2, 4, 8)]
        assert column == sorted(column), "more nodes never favour linear"
    assert wins[8, 100_000] != wins[2, 1_000_000]


def test_sizes_beyond_the_counter_are_refused() -> None:
    sizes_RR = np.array([[0, 2**31 + 1, 1], [0, 0, 0], [0, 0, 0]])
    with pytest.raises(UsageError, match="larger unit"):
        exchange(cluster(1, 3), sizes_RR)
