"""Closed forms of even collectives: equal to leg_times on their copies matrices; Tutel's crossover; volumes."""

import numpy as np
import pytest
from choosing_cases import cluster_of, clusters
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core import collectives
from placer.core.cluster import ClusterSpec
from placer.core.collectives import exflow_copies, lsh_moe_ratio
from placer.core.cost import leg_times
from placer.core.schedule import expand_leg


def legs_ns(cluster: ClusterSpec, legs: list[np.ndarray], size: int) -> int:
    return sum(int(leg_times(cluster, leg[None], size).slowest_W[0]) for leg in legs)


@settings(max_examples=80, deadline=None)
@given(cluster=clusters(), size=st.integers(1, 10**7))
def test_all_to_alls_equal_their_legs(cluster: ClusterSpec, size: int) -> None:
    ranks, each = cluster.num_ranks, cluster.ranks_per_node
    everybody = (~np.eye(ranks, dtype=bool)).astype(np.int64)
    assert collectives.linear_all_to_all_ns(cluster, size) == legs_ns(cluster, [everybody], size)
    legs = [leg[0] for leg in expand_leg(everybody[None], "2dh", each)]
    assert collectives.two_dimensional_all_to_all_ns(cluster, size) == legs_ns(cluster, legs, size)


@settings(max_examples=80, deadline=None)
@given(cluster=clusters(), across=st.integers(1, 10**6), inside=st.integers(1, 10**6))
def test_two_hops_equal_their_legs(cluster: ClusterSpec, across: int, inside: int) -> None:
    rank = np.arange(cluster.num_ranks)
    same_node = cluster.node_R[:, None] == cluster.node_R
    same_local = rank[:, None] % cluster.ranks_per_node == rank % cluster.ranks_per_node
    first, second = (same_local & ~same_node).astype(np.int64), (same_node & ~same_local).astype(np.int64)
    expected = legs_ns(cluster, [first], across) + legs_ns(cluster, [second], inside)
    assert collectives.two_hop_ns(cluster, across, inside) == expected


@settings(max_examples=80, deadline=None)
@given(cluster=clusters(), size=st.integers(1, 10**6))
def test_rings_equal_their_legs(cluster: ClusterSpec, size: int) -> None:
    ranks = cluster.num_ranks
    step = np.roll(np.eye(ranks, dtype=np.int64), 1, axis=1) * (ranks > 1)
    ring = legs_ns(cluster, [step] * (ranks - 1), size)
    assert collectives.all_gather_ns(cluster, size) == ring
    assert collectives.reduce_scatter_ns(cluster, size) == ring
    assert collectives.all_reduce_ns(cluster, size * ranks) == 2 * ring


def test_linear_by_hand() -> None:
    """2 nodes of 2: 1 message inside at 100 bytes/ns, 2 away at 10 bytes/ns, 8 us each."""
    cluster = cluster_of(2, 2, intra=(100.0, 3.0), inter=(10.0, 8.0))
    assert collectives.linear_all_to_all_ns(cluster, 1_000_000) == 2 * (8_000 + 100_000)
    assert collectives.two_dimensional_all_to_all_ns(cluster, 1_000_000) == (3_000 + 20_000) + (8_000 + 200_000)


def crossover(cluster: ClusterSpec) -> int:
    """The smallest message for which linear is as fast as 2DH (above it stays so: 2DH's slope is the larger)."""
    low, high = 0, 1 << 40
    while low < high:
        middle = (low + high) // 2
        faster = collectives.two_dimensional_all_to_all_ns(cluster, middle) < collectives.linear_all_to_all_ns(
            cluster, middle
        )
        low, high = (middle + 1, high) if faster else (low, middle)
    return low


def test_the_2dh_crossover_is_tutels() -> None:
    """Tutel section 3.3: 2DH wins for small S / n; a small S already at few GPUs, a large one only at scale."""
    sizes = {nodes: cluster_of(nodes, 8, intra=(370.0, 3.0), inter=(45.0, 8.0)) for nodes in (2, 4, 16, 64, 256)}
    points = {nodes: crossover(cluster) for nodes, cluster in sizes.items()}
    assert all(points[nodes] > 0 for nodes in sizes)
    for nodes, cluster in sizes.items():
        for message in (points[nodes] // 4, points[nodes] * 4):
            wins = collectives.two_dimensional_all_to_all_ns(cluster, message) < collectives.linear_all_to_all_ns(
                cluster, message
            )
            assert wins == (message < points[nodes])
    # in bytes a GPU (S = chunk * n) the point moves up with scale: 1 MiB pays on 16 GPUs, 256 MiB needs hundreds
    total = [points[nodes] * sizes[nodes].num_ranks for nodes in sizes]
    assert total == sorted(total)

    def first_win(total_bytes: int) -> int:
        return min(nodes for nodes in sizes if total_bytes < points[nodes] * sizes[nodes].num_ranks)

    assert first_win(1 << 20) == 2
    assert first_win(32 << 20) < first_win(256 << 20)


def test_a_dearer_message_moves_the_crossover_up_and_a_slower_node_link_down() -> None:
    base = crossover(cluster_of(8, 8, intra=(370.0, 3.0), inter=(45.0, 8.0)))
    assert crossover(cluster_of(8, 8, intra=(370.0, 3.0), inter=(45.0, 16.0))) > base
    assert crossover(cluster_of(8, 8, intra=(185.0, 3.0), inter=(45.0, 8.0))) < base


def test_one_rank_and_one_node_cost_nothing_over_the_network() -> None:
    alone, node = cluster_of(1, 1), cluster_of(1, 4, intra=(1.0, 0.0))
    assert collectives.linear_all_to_all_ns(alone, 1000) == collectives.all_gather_ns(alone, 1000) == 0
    assert collectives.linear_all_to_all_ns(node, 1000) == 3000
    assert collectives.two_hop_ns(node, 1000, 1000) == 3000


def test_exflow_volumes() -> None:
    """Section 4, with p = (G - 1) / G for random placement; coherent saves almost half where L is large."""
    assert exflow_copies(4, 10, 3, 0.75, coherent=False) == 2 * 4 * 10 * 3 * 0.75
    assert exflow_copies(4, 10, 3, 0.5, coherent=True) == 4 * 10 * (3 * 0.5 + 4)
    deep = [exflow_copies(8, 1, 10_000, 0.8, coherent=coherent) for coherent in (True, False)]
    assert deep[0] / deep[1] == pytest.approx(0.5, rel=1e-3)


def test_lsh_moe_ratio_is_the_quotient_of_its_two_times_and_has_the_limit() -> None:
    flops, elements, k, w, h, layers, n = 312e3, 3.125, 2, 16, 1024, 12, 4096
    exchange = 4 * layers * (n * k / w) * h * (w - 1) / elements
    compute = 24 * (1 + 2 * k) * n * layers * h**2 / flops
    assert lsh_moe_ratio(flops, elements, k, w, h) == pytest.approx(exchange / compute, rel=1e-12)
    assert lsh_moe_ratio(flops, elements, k, 1, h) == 0
    limit = flops / (6 * elements) * k / (1 + 2 * k) / h
    assert lsh_moe_ratio(flops, elements, k, 10**9, h) == pytest.approx(limit, rel=1e-8)
