"""Leg, expert and attention times: hand-computed on tiny cases, and port by port in plain Python.

Legend: W windows, R ranks, N nodes, P slots.
"""

import dataclasses
from fractions import Fraction

import numpy as np
import pytest
from core_cases import cases, make_cluster, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.cluster import ClusterSpec, Compute, LinkClass
from placer.core.cost import attention_ns, closed_form_ns, expert_ns, gather_copies, leg_times, rank_load
from placer.core.evaluate import iterate_layers, window_index

TWO_BY_TWO = make_cluster(
    2,
    2,
    intra=LinkClass(gbytes_per_s=1.0, alpha_us=1.0),
    inter=LinkClass(gbytes_per_s=0.5, alpha_us=2.0),
    uplink=LinkClass(gbytes_per_s=0.25, alpha_us=3.0),
)
COPIES_WRR = np.array([[[0, 3, 5, 0], [0, 0, 0, 0], [0, 2, 0, 0], [0, 0, 7, 0]]])
"""Rank 0 sends 3 copies to 1 and 5 to 2; rank 2 sends 2 to 1; rank 3 sends 7 to 2. A copy is 100 bytes."""


def test_leg_times_by_hand() -> None:
    times = leg_times(TWO_BY_TWO, COPIES_WRR, 100)
    # intra: 1000 ns a message and 100 ns a copy; inter: 2000 and 200; uplink: 3000 and 400
    assert times.out_WR.tolist() == [[max(1000 + 300, 2000 + 1000), 0, 2000 + 400, 1000 + 700]]
    assert times.in_WR.tolist() == [[0, max(1000 + 300, 2000 + 400), max(1000 + 700, 2000 + 1000), 0]]
    assert times.uplink_out_WN.tolist() == [[3000 + 2000, 3000 + 800]]
    assert times.uplink_in_WN.tolist() == [[3000 + 800, 3000 + 2000]]
    assert times.slowest_W.tolist() == [5000]


def test_a_leg_without_copies_takes_no_time() -> None:
    assert leg_times(TWO_BY_TWO, np.zeros_like(COPIES_WRR), 100).slowest_W.tolist() == [0]


def test_expert_times_by_hand() -> None:
    """Read 960 bytes at 2 GB/s: 480 ns; 240 flops a token at 1 flop/ns; 300 ns to launch."""
    cluster = make_cluster(1, 2, compute=Compute(tflops=0.001, weight_read_gbytes_per_s=2.0, launch_us=0.3))
    model = make_model(1, 4, hidden_size=10, moe_intermediate_size=4, weight_bytes=8.0)
    assert (model.expert_params, model.expert_bytes) == (120, 960)
    tokens_WP = np.array([[1, 3, 0, 0], [0, 0, 2, 100]])
    # one token: bound by the read (480 > 240); three: by the flops (720 > 480); no token: not even launched
    assert expert_ns(cluster, model, tokens_WP).tolist() == [[480 + 720 + 300, 0], [0, 480 + 24000 + 300]]


def test_a_rank_of_half_the_speed_reads_and_computes_twice_as_long() -> None:
    compute = Compute(tflops=0.001, weight_read_gbytes_per_s=2.0, launch_us=0.3)
    cluster = dataclasses.replace(make_cluster(1, 2, compute=compute), rank_speed=(0.5, 1.0))
    model = make_model(1, 4, hidden_size=10, moe_intermediate_size=4, weight_bytes=8.0, attention_params=600)
    # as above: 480 ns for one token's expert, 720 for three tokens'; launching takes no longer
    assert expert_ns(cluster, model, np.array([[1, 3, 1, 3]])).tolist() == [[2 * 1200 + 300, 1200 + 300]]
    # attention: read 4,800 bytes at 2 GB/s, or 1,200 flops a token
    assert attention_ns(cluster, model, np.array([[1, 4]])).tolist() == [[2 * 2400 + 300, 4800 + 300]]


def test_attention_times_by_hand() -> None:
    """500 + 3 * 10 * 2 = 560 parameters: read 560 ns, 1,120 flops a token."""
    cluster = make_cluster(1, 2)
    model = make_model(1, 4, attention_params=500, shared_intermediate_size=2)
    assert attention_ns(cluster, model, np.array([[0, 3]])).tolist() == [[0, 3 * 1120 + 300]]
    assert attention_ns(cluster, make_model(1, 4), np.array([[5, 3]])).tolist() == [[0, 0]]


def test_gather_sends_every_rank_to_every_other() -> None:
    assert gather_copies(np.array([[2, 0, 1]])).tolist() == [[[0, 2, 2], [0, 0, 0], [1, 1, 0]]]


def test_rank_load_adds_blocks_of_slots() -> None:
    assert rank_load(np.array([[1, 2, 3, 4, 5, 6]]), 3).tolist() == [[3, 7, 11]]


def port_times(cluster: ClusterSpec, copies_RR: np.ndarray, token_bytes: int) -> int:
    """The busiest port of one leg, exactly, port by port and message by message."""
    per_node = cluster.ranks_per_node
    busiest = Fraction(0)

    def busy(link: LinkClass, counts: list[int]) -> Fraction:
        messages = [count for count in counts if count]
        rate = Fraction(link.gbytes_per_s)
        return len(messages) * Fraction(link.alpha_ns) + sum(messages) * Fraction(token_bytes) / rate

    for matrix in (copies_RR, copies_RR.T):
        for rank in range(cluster.num_ranks):
            near = [int(n) for other, n in enumerate(matrix[rank]) if other // per_node == rank // per_node]
            far = [int(n) for other, n in enumerate(matrix[rank]) if other // per_node != rank // per_node]
            busiest = max(busiest, busy(cluster.intra, near), busy(cluster.inter, far))
        for node in range(cluster.nodes if cluster.uplink is not None else 0):
            mine = matrix[node * per_node : (node + 1) * per_node]
            blocks = [mine[:, n * per_node : (n + 1) * per_node].sum() for n in range(cluster.nodes) if n != node]
            busiest = max(busiest, busy(cluster.uplink, [int(n) for n in blocks]))
    return round(busiest)


@settings(max_examples=100, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    uplink=st.booleans(),
    token_bytes=st.integers(1, 20_000),
    seed=st.integers(0, 2**32 - 1),
)
def test_leg_times_are_the_busiest_port(shape: tuple[int, int], uplink: bool, token_bytes: int, seed: int) -> None:
    link = LinkClass(gbytes_per_s=0.125, alpha_us=4.0) if uplink else None
    cluster = make_cluster(*shape, uplink=link)
    rng = np.random.default_rng(seed)
    copies_WRR = rng.integers(0, 50, (2, cluster.num_ranks, cluster.num_ranks)) * rng.integers(0, 2, (2, 1, 1))
    for window in range(2):
        np.fill_diagonal(copies_WRR[window], 0)
    slowest_W = leg_times(cluster, copies_WRR, token_bytes).slowest_W
    assert slowest_W.tolist() == [port_times(cluster, copies_RR, token_bytes) for copies_RR in copies_WRR]


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_closed_form_is_the_sum_of_its_phases(case) -> None:
    window_T, windows = window_index(case.expert_LTK.shape[1], case.batch_tokens)
    traffics = iterate_layers(case.plan, case.plan.mode, case.expert_LTK, case.source_T, window_T, windows)
    for traffic in traffics:
        found = closed_form_ns(case.cluster, case.model, traffic)
        size = case.model.token_bytes
        for window in range(windows):
            for phase, legs in (("dispatch", traffic.legs_WRR), ("combine", traffic.returns_WRR)):
                wanted = sum(port_times(case.cluster, leg[window], size) for leg in legs)
                assert found[phase][window] == wanted
        np.testing.assert_array_equal(
            found["experts"], expert_ns(case.cluster, case.model, traffic.tokens_WP).max(axis=1)
        )
        np.testing.assert_array_equal(
            found["attention"], attention_ns(case.cluster, case.model, traffic.home_WR).max(axis=1)
        )


@pytest.mark.parametrize("factor", [2, 10])
def test_times_scale_with_bandwidth(factor: int) -> None:
    """Without a fixed cost, a network of `factor` times the bandwidth takes that much less."""
    slow = make_cluster(2, 2, intra=LinkClass(gbytes_per_s=1.0), inter=LinkClass(gbytes_per_s=1.0))
    link = LinkClass(gbytes_per_s=1.0 * factor)
    fast = make_cluster(2, 2, intra=link, inter=link)
    slow_ns, fast_ns = (leg_times(cluster, COPIES_WRR, 1000 * factor).slowest_W for cluster in (slow, fast))
    np.testing.assert_array_equal(slow_ns, factor * fast_ns)
