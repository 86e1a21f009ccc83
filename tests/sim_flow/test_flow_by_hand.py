"""Fidelity flow on exchanges that can be done in the head, and rounds beside linear exchanges."""

import numpy as np
import pytest
from flow_cases import cluster_of, random_bytes, stage_of, times, work_on
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.cluster import LinkClass
from placer.core.model import ModelSpec
from placer.core.plan import Plan
from placer.core.schedule import Rounds, expand_leg
from sim import simulate
from sim.flow import flow_times
from sim.flow.collectives import exchange
from sim.flow.topology import Tier, cluster_topology


def matrix(ranks: int, **sizes: int) -> np.ndarray:
    """`r0to2=5`: rank 0 sends 5 bytes to rank 2."""
    bytes_RR = np.zeros((ranks, ranks), dtype=np.int64)
    for name, size in sizes.items():
        sender, receiver = name[1:].split("to")
        bytes_RR[int(sender), int(receiver)] = size
    return bytes_RR


def ends(*args: object, **rest: object) -> list[int]:
    return times("flow", *args, **rest).end_WGR[0, 0].tolist()


def test_an_uneven_exchange_over_an_uplink() -> None:
    """Two nodes of two ranks; NICs move 1 byte a ns, the uplink 1.25; A = 0->2 1000, B = 1->3 3000, C = 1->2 500 bytes.

    0 to 1200: three flows share the uplink at 1.25 / 3 = 0.4167 each (rank 1's NIC has 0.8333, rank 2's too: not full).
    C is done at 500 / 0.4167 = 1200. A has 500 left, B 2500.
    1200 to 2000: two share it at 0.625 each. A is done after 500 / 0.625 = 800. B has 2000 left.
    2000 to 4000: B is alone, its NIC lets it have 1.
    The closed form is max(NIC out of rank 1: 3500, NIC into rank 2: 1500, uplink: 4500 / 1.25 = 3600) = 3600.
    """
    cluster = cluster_of(2, 2, uplink=LinkClass(gbytes_per_s=1.25))
    sizes = matrix(4, r0to2=1000, r1to3=3000, r1to2=500)
    assert ends(cluster, [sizes]) == [2000, 4000, 2000, 4000]
    assert times("port", cluster, [sizes]).total_W.tolist() == [3600]


def test_the_first_nanosecond_by_which_all_bytes_have_passed() -> None:
    """Three senders into one port, 100 bytes each, a third of a byte a ns; then one of them with 1 byte less."""
    assert ends(cluster_of(1, 4), [matrix(4, r0to3=100, r1to3=100, r2to3=100)]) == [300, 300, 300, 300]
    # rank 2 is done at 297; two bytes are left, half a byte a ns each
    assert ends(cluster_of(1, 4), [matrix(4, r0to3=100, r1to3=100, r2to3=99)]) == [299, 299, 297, 299]
    # 1 / 0.3 = 3.33
    assert ends(cluster_of(1, 3, intra=LinkClass(gbytes_per_s=0.3)), [matrix(3, r0to2=1, r1to2=1)]) == [6, 6, 6]


def test_receivers_need_not_be_ready_but_leave_no_earlier() -> None:
    sizes = matrix(2, r0to1=1000)
    assert ends(cluster_of(1, 2), [sizes], [0, 400]) == [1000, 1000]
    assert ends(cluster_of(1, 2), [sizes], [0, 7000]) == [1000, 7000]


def test_a_late_message_takes_its_share_from_then_on() -> None:
    """Rank 1 joins at 400: 600 bytes are left to rank 0's message, the two share until 1600, then 400 are left."""
    assert ends(cluster_of(1, 3), [matrix(3, r0to2=1000, r1to2=1000)], [0, 400, 0]) == [1600, 2000, 2000]


def test_a_message_may_start_on_the_nanosecond_on_which_others_end() -> None:
    """Ranks 0 and 1 are done at 1000, when rank 3 starts: nothing is shared."""
    sizes = matrix(5, r0to2=1000, r1to4=1000, r3to2=500, r3to4=500)
    assert ends(cluster_of(1, 5), [sizes], [0, 0, 0, 1000, 0]) == [1000, 1000, 2000, 2000, 2000]


def test_both_directions_are_free_of_each_other() -> None:
    assert ends(cluster_of(1, 2), [matrix(2, r0to1=1000, r1to0=1000)]) == [1000, 1000]


def test_alpha_is_paid_by_every_message_at_both_ends() -> None:
    """Rank 0's port is busy 2 * (200 + 300), rank 3's 3 * (200 + 300)."""
    cluster = cluster_of(1, 4, intra=LinkClass(gbytes_per_s=1.0, alpha_us=0.2))
    sizes = matrix(4, r0to3=300, r0to2=300, r1to3=300, r2to3=300)
    # 0 -> 3, 1 -> 3, 2 -> 3 go at a third; 0 -> 2 has the two thirds left of rank 0's port
    assert ends(cluster, [sizes]) == [1500, 1500, 1500, 1500]


def test_a_port_with_a_tail_is_slower_only_while_it_is_shared() -> None:
    """Two senders, tail 1.5: 1000 and 2000 bytes; until 3000 each gets a third of a byte a ns, then 1000 are left."""
    cluster = cluster_of(1, 3, intra=LinkClass(gbytes_per_s=1.0, tail=1.5))
    assert ends(cluster, [matrix(3, r0to2=1000, r1to2=2000)]) == [3000, 4000, 4000]


def test_a_pair_of_nodes_is_one_message_at_the_uplink() -> None:
    """NICs are fast; the uplink takes 500 ns a message. To one node: one, of 2000 bytes. To two nodes: two."""
    links = {"inter": LinkClass(gbytes_per_s=1e3), "uplink": LinkClass(gbytes_per_s=1.0, alpha_us=0.5, tail=2.0)}
    assert ends(cluster_of(3, 2, **links), [matrix(6, r0to2=1000, r1to3=1000)])[:2] == [2500, 2500]
    assert ends(cluster_of(3, 2, **links), [matrix(6, r0to2=1000, r1to4=1000)])[:2] == [5000, 5000]


def test_no_leg_starts_before_its_rank_has_left_the_one_before() -> None:
    """Rank 1 hands on in the second leg; rank 2's own part of the first is nothing."""
    assert ends(cluster_of(1, 3), [matrix(3, r0to1=1000), matrix(3, r1to2=500)]) == [1000, 1500, 1500]


def round_robin(ranks: int) -> Rounds:
    to_GR = (np.arange(ranks) + np.arange(1, ranks)[:, None]) % ranks
    return Rounds(to_GR=to_GR, share_GR=np.ones(to_GR.shape))


def test_rounds_remove_the_slowdown_of_incast() -> None:
    """An even exchange among 5 ranks: shared ports pay the tail, rounds share none."""
    cluster = cluster_of(1, 5, intra=LinkClass(gbytes_per_s=1.0, tail=1.5))
    sizes_RR = (1 - np.eye(5, dtype=np.int64)) * 1000
    legs_GRR = [leg[0] for leg in expand_leg(sizes_RR[None], "rounds", 5, round_robin(5))]
    assert times("flow", cluster, [sizes_RR]).total_W.tolist() == [6000]
    assert times("flow", cluster, legs_GRR).total_W.tolist() == [4000]


def test_rounds_may_beat_fair_sharing_even_without_tail() -> None:
    """Rank 0 sends 2000 bytes each to ranks 1 and 2, ranks 3 and 4 send them 500 each: the busiest port holds 4000.

    Until 1500 three messages share each receiving port, so rank 0's is idle for a third of the time; 1500 are then left
    of each of its two messages: 4500. Rounds, one after the other, keep it busy: 4000.
    """
    cluster = cluster_of(1, 5)
    linear = matrix(5, r0to1=2000, r0to2=2000, r3to1=500, r4to1=500, r3to2=500, r4to2=500)
    rounds = [
        matrix(5, r0to1=500, r3to2=500),
        matrix(5, r0to1=1500, r4to2=500),
        matrix(5, r0to2=500, r3to1=500),
        matrix(5, r0to2=1500, r4to1=500),
    ]
    assert sum(rounds).tolist() == linear.tolist()
    assert times("flow", cluster, [linear]).total_W.tolist() == [4500]
    assert sum(int(times("flow", cluster, [one]).total_W[0]) for one in rounds) == 4000


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ranks=st.integers(2, 6))
def test_a_linear_exchange_lies_between_its_busiest_port_and_twice_that(seed: int, ranks: int) -> None:
    """What rounds of a bipartite decomposition reach is the busiest port; fair sharing may take up to the busiest
    sender's and receiver's time together, since one of the two ports of a message is always full."""
    sizes_RR = random_bytes(np.random.default_rng(seed), 1, ranks)[0]
    out_R, in_R = sizes_RR.sum(axis=1), sizes_RR.sum(axis=0)
    took = times("flow", cluster_of(1, ranks), [sizes_RR]).total_W[0]
    both = (out_R[:, None] + in_R[None, :])[sizes_RR > 0].max(initial=0)
    assert max(out_R.max(), in_R.max()) <= took <= both + sizes_RR.astype(bool).sum()


def test_fidelity_flow_gives_a_timeline() -> None:
    cluster = cluster_of(1, 3)
    plan = Plan(
        model="one",
        num_experts=3,
        num_ranks=3,
        ranks_per_node=3,
        moe_layers=(0,),
        slot_expert_LP=np.arange(3)[None],
        mode="per_rank",
    )
    model = ModelSpec.uniform(
        "one",
        num_experts=3,
        top_k=1,
        num_hidden_layers=1,
        hidden_size=1000,
        moe_intermediate_size=1,
        matrices_per_expert=1,
        weight_bytes=1.0,
        activation_bytes=1.0,
    )
    tokens = np.array([[[2], [2]]], dtype=np.int16)
    timeline = simulate(plan, model, cluster, tokens, np.array([0, 1]), fidelity="flow")
    # two copies share rank 2's port (2000), its experts' weights are read (1000), two results share the port again
    assert timeline.about["fidelity"] == "flow"
    assert timeline.iteration_ns().tolist() == [2000 + 1000 + 2000]


def test_a_tier_above_slows_what_crosses_it() -> None:
    cluster = cluster_of(4, 1)
    pod_R = np.array([0, 0, 1, 1])
    topology = cluster_topology(cluster, (Tier(LinkClass(gbytes_per_s=0.5), pod_R, pod_R),))
    sizes = matrix(4, r0to1=1000, r1to2=1000, r2to3=1000)
    assert ends(cluster, [sizes], topology=topology) == [1000, 2000, 2000, 1000]


@pytest.mark.parametrize("observed", [False, True])
def test_watching_changes_nothing(observed: bool) -> None:
    sizes_RR = random_bytes(np.random.default_rng(5), 1, 6)[0]
    cluster = cluster_of(2, 3, uplink=LinkClass(gbytes_per_s=1.7, alpha_us=0.1, tail=1.2))
    shots: list[object] = []
    stages = [stage_of(cluster, (exchange(cluster, sizes_RR),) * 2, range(6))]
    run = flow_times(work_on(cluster), stages, recorder=shots.append if observed else None)
    assert run.end_WGR.tolist() == flow_times(work_on(cluster), stages).end_WGR.tolist()
    assert bool(shots) == observed
