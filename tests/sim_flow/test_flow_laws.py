"""Laws of fidelity flow on random clusters, exchanges and ready times."""

import numpy as np
from flow_cases import (
    Film,
    cluster_of,
    clusters,
    fair_speeds,
    random_bytes,
    stage_of,
    times,
    work_on,
)
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from placer.core.cluster import ClusterSpec, LinkClass
from placer.core.cost import leg_times
from sim.flow import flow_times
from sim.flow.collectives import exchange
from sim.flow.topology import Tier, cluster_topology
from sim.stages import COMPUTE, INSIDE, NETWORK, Stage

SEEDS = st.integers(0, 2**32 - 1)


def watched(cluster: ClusterSpec, seed: int, legs: int = 2) -> tuple[Film, np.ndarray, np.ndarray]:
    """A random run with its film, its sizes (X, R, R) and the ends of its stage (R,)."""
    rng = np.random.default_rng(seed)
    sizes_XRR = random_bytes(rng, legs, cluster.num_ranks)
    film = Film()
    run = times("flow", cluster, sizes_XRR, rng.integers(0, 3000, cluster.num_ranks), recorder=film)
    return film, sizes_XRR, run.end_WGR[0, 0]


@settings(max_examples=60, deadline=None)
@given(cluster=clusters(), seed=SEEDS)
def test_speeds_are_max_min_fair_at_every_moment(cluster: ClusterSpec, seed: int) -> None:
    film, _, _ = watched(cluster, seed)
    for shot in film.shots:
        np.testing.assert_allclose(shot.speed_F, fair_speeds(shot.path_FP, shot.cost_FP), rtol=1e-9)


@settings(max_examples=60, deadline=None)
@given(cluster=clusters(), seed=SEEDS)
def test_no_link_is_overdrawn_and_every_flow_has_a_full_link_where_it_is_fastest(
    cluster: ClusterSpec, seed: int
) -> None:
    film, _, _ = watched(cluster, seed)
    for shot in film.shots:
        links = int(shot.path_FP.max(initial=0)) + 1
        used_Q, fastest_Q = np.zeros(links), np.zeros(links)
        np.add.at(used_Q, shot.path_FP, shot.cost_FP * shot.speed_F[:, None])
        real = shot.cost_FP > 0
        np.maximum.at(fastest_Q, shot.path_FP[real], np.broadcast_to(shot.speed_F[:, None], real.shape)[real])
        assert (used_Q <= 1 + 1e-9).all()
        assert ((shot.speed_F > 0) & (shot.speed_F <= 1 + 1e-9)).all()
        held = real & (used_Q[shot.path_FP] >= 1 - 1e-9) & (shot.speed_F[:, None] >= fastest_Q[shot.path_FP] - 1e-9)
        assert held.any(axis=1).all()


@settings(max_examples=40, deadline=None)
@given(cluster=clusters(tails=False), seed=SEEDS)
def test_bytes_per_second_stay_below_every_capacity(cluster: ClusterSpec, seed: int) -> None:
    film, sizes_XRR, _ = watched(cluster, seed)
    node_R = cluster.node_R
    for shot in film.shots:
        leg, sender, receiver = shot.who_F3.T
        rate_F = shot.speed_F * sizes_XRR[leg, sender, receiver] / shot.alone_ns_F
        away = node_R[sender] != node_R[receiver]
        ports = [(cluster.intra, ~away, end) for end in (sender, receiver)]
        ports += [(cluster.inter, away, end) for end in (sender, receiver)]
        if cluster.uplink is not None:
            ports += [(cluster.uplink, away, node_R[end]) for end in (sender, receiver)]
        for link, through, port in ports:
            total = np.bincount(port[through], weights=rate_F[through], minlength=1)
            # a message's time is a whole number: one ns in its shortest time here
            assert (total <= link.gbytes_per_s * (1 + 1 / shot.alone_ns_F.min(initial=1.0))).all()


@settings(max_examples=60, deadline=None)
@given(cluster=clusters(), seed=SEEDS)
def test_bytes_are_conserved_and_the_clock_runs_forward(cluster: ClusterSpec, seed: int) -> None:
    """What is left of a flow falls by its speed; it ends within a nanosecond of having passed, never before."""
    film, sizes_XRR, end_R = watched(cluster, seed)
    running: dict[tuple[int, ...], tuple[float, float]] = {}
    seen, before = set(), 0
    for shot in film.shots:
        assert shot.now_ns >= before
        span, before = shot.now_ns - before, shot.now_ns
        now = {}
        for who, speed, left in zip(map(tuple, shot.who_F3.tolist()), shot.speed_F, shot.left_ns_F, strict=True):
            now[who] = (float(speed), float(left))
            alone = shot.alone_ns_F[len(now) - 1]
            expected = running[who][1] - running[who][0] * span if who in running else alone
            assert abs(left - expected) <= 1e-5
            assert left > 0
            seen.add(who)
        for who in set(running) - set(now):
            speed, left = running[who]
            assert -speed - 1e-5 <= left - speed * span <= 1e-5
        running = now
    assert not running
    unseen = {tuple(who) for who in np.argwhere(sizes_XRR > 0).tolist()} ^ seen
    assert all(sizes_XRR[who] <= 6 for who in unseen)  # at 13 bytes a nanosecond they take none
    assert before <= end_R.max()


@settings(max_examples=60, deadline=None)
@given(cluster=clusters(), seed=SEEDS)
def test_no_leg_is_faster_than_its_busiest_port(cluster: ClusterSpec, seed: int) -> None:
    rng = np.random.default_rng(seed)
    sizes_RR = random_bytes(rng, 1, cluster.num_ranks)[0]
    took = times("flow", cluster, [sizes_RR]).total_W[0]
    bare = cluster_of(
        cluster.nodes,
        cluster.ranks_per_node,
        **{
            name: LinkClass(gbytes_per_s=link.gbytes_per_s, alpha_us=link.alpha_us)
            for name in ("intra", "inter", "uplink")
            if (link := getattr(cluster, name)) is not None
        },
    )
    messages = (sizes_RR > 0).sum()
    assert took >= leg_times(bare, sizes_RR[None], 1).slowest_W[0] - messages / 2


@settings(max_examples=80, deadline=None)
@given(cluster=clusters(), seed=SEEDS, legs=st.integers(1, 3))
def test_flow_is_phase_where_messages_do_not_meet(cluster: ClusterSpec, seed: int, legs: int) -> None:
    rng = np.random.default_rng(seed)
    sizes_XRR = random_bytes(rng, legs, cluster.num_ranks, partial=True)
    if cluster.uplink is not None:
        one_way_N = rng.permutation(cluster.nodes)[cluster.node_R]
        sizes_XRR[:, one_way_N[:, None] + 1 != one_way_N[None, :]] = 0
        sizes_XRR[:, np.arange(cluster.num_ranks) % cluster.ranks_per_node > 0] = 0
    ready_R = rng.integers(0, 3000, cluster.num_ranks)
    film = Film()
    flow = times("flow", cluster, sizes_XRR, ready_R, recorder=film)
    assume(not film.contended and not film.overtaken)
    # phase keeps legs in order on every port, flow lets a message of the next leg pass a port that still waits
    phase = times("phase", cluster, sizes_XRR, ready_R)
    assert flow.start_WGR.tolist() == phase.start_WGR.tolist()
    assert flow.end_WGR.tolist() == phase.end_WGR.tolist()


@settings(max_examples=40, deadline=None)
@given(
    link=st.sampled_from([LinkClass(gbytes_per_s=g, alpha_us=a, tail=1.5) for g in (0.7, 13.0) for a in (0.0, 0.3333)]),
    ranks=st.integers(2, 6),
    size=st.integers(1, 10**6),
    steps=st.lists(st.integers(1, 5), min_size=1, max_size=3),
)
def test_flow_is_phase_is_port_in_even_rounds(link: LinkClass, ranks: int, size: int, steps: list[int]) -> None:
    cluster = cluster_of(1, ranks, intra=link)
    legs = [np.roll(np.eye(ranks, dtype=np.int64), step, axis=1) * size * (step % ranks > 0) for step in steps]
    port, phase, flow = (times(name, cluster, legs).end_WGR.tolist() for name in ("port", "phase", "flow"))
    assert port == phase == flow


@settings(max_examples=60, deadline=None)
@given(cluster=clusters(), size=st.integers(1, 10**6), near=st.sets(st.integers(1, 2)), far=st.sets(st.integers(1, 2)))
def test_even_load_takes_the_closed_form(cluster: ClusterSpec, size: int, near: set[int], far: set[int]) -> None:
    """Equal messages to the same relative places inside the node, or in other nodes: to m / 2 + 1 ns, tail included."""
    per_node, ranks = cluster.ranks_per_node, cluster.num_ranks
    rank, node_R = np.arange(ranks), cluster.node_R
    inside_RR = (node_R[:, None] == node_R[None, :]) & np.isin((rank[None, :] - rank[:, None]) % per_node, list(near))
    across_RR = np.isin((node_R[None, :] - node_R[:, None]) % cluster.nodes, list(far))
    for uses_RR in (inside_RR, across_RR):
        sizes_RR = uses_RR * size
        closed = times("port", cluster, [sizes_RR]).total_W[0]
        assert abs(times("flow", cluster, [sizes_RR]).total_W[0] - closed) <= uses_RR.sum() / 2 + 1


@settings(max_examples=40, deadline=None)
@given(cluster=clusters(), seed=SEEDS)
def test_names_of_ranks_do_not_matter(cluster: ClusterSpec, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranks, per_node = cluster.num_ranks, cluster.ranks_per_node
    sizes_XRR, ready_R = random_bytes(rng, 2, ranks), rng.integers(0, 3000, ranks)
    node = rng.permutation(cluster.nodes)
    new_R = np.concatenate([node[n] * per_node + rng.permutation(per_node) for n in range(cluster.nodes)])
    renamed_XRR, renamed_R = np.zeros_like(sizes_XRR), np.zeros_like(ready_R)
    renamed_XRR[:, new_R[:, None], new_R[None, :]] = sizes_XRR
    renamed_R[new_R] = ready_R
    before = times("flow", cluster, sizes_XRR, ready_R).end_WGR[0, 0]
    after = times("flow", cluster, renamed_XRR, renamed_R).end_WGR[0, 0]
    assert after[new_R].tolist() == before.tolist()


@settings(max_examples=20, deadline=None)
@given(cluster=clusters(), seed=SEEDS)
def test_same_input_same_film(cluster: ClusterSpec, seed: int) -> None:
    one, other = watched(cluster, seed)[0], watched(cluster, seed)[0]
    assert len(one.shots) == len(other.shots)
    for a, b in zip(one.shots, other.shots, strict=True):
        assert a.now_ns == b.now_ns
        assert a.speed_F.tobytes() == b.speed_F.tobytes()
        assert a.left_ns_F.tobytes() == b.left_ns_F.tobytes()


@settings(max_examples=40, deadline=None)
@given(seed=SEEDS, speed=st.sampled_from([0.4, 1.5, 9.0]), tail=st.sampled_from([1.0, 1.4]))
def test_a_third_level_shares_fairly_too(seed: int, speed: float, tail: float) -> None:
    """Ranks, two to a node; nodes, two to a pod: a message between pods passes six links."""
    rng = np.random.default_rng(seed)
    cluster = cluster_of(4, 2, uplink=LinkClass(gbytes_per_s=1.2, alpha_us=0.1))
    pod_R = cluster.node_R // 2
    pods = Tier(LinkClass(gbytes_per_s=speed, alpha_us=0.2, tail=tail), pod_R, pod_R)
    topology = cluster_topology(cluster, (pods,))
    assert topology.places == 6
    film = Film()
    times("flow", cluster, random_bytes(rng, 2, 8), rng.integers(0, 3000, 8), topology=topology, recorder=film)
    lengths = {int(n) for shot in film.shots for n in (shot.path_FP < topology.num_links).sum(axis=1)}
    assert lengths == {2, 4, 6}
    for shot in film.shots:
        np.testing.assert_allclose(shot.speed_F, fair_speeds(shot.path_FP, shot.cost_FP), rtol=1e-9)


@settings(max_examples=40, deadline=None)
@given(cluster=clusters(), seed=SEEDS)
def test_streams_run_beside_each_other_and_wait_for_what_they_come_after(cluster: ClusterSpec, seed: int) -> None:
    rng = np.random.default_rng(seed)
    ranks = cluster.num_ranks
    none_WR = np.zeros((1, ranks), dtype=np.int64)
    stages = []
    for index in range(6):
        legs = tuple(exchange(cluster, one) for one in random_bytes(rng, int(rng.integers(0, 3)), ranks))
        work_WR = rng.integers(0, 3000, (1, ranks)) if rng.random() < 0.7 else None
        after = tuple(before for before in range(index) if rng.random() < 0.3)
        stream = int(rng.choice([COMPUTE, NETWORK, INSIDE]))
        stages.append(Stage(index, 1, none_WR, work_WR, legs, stream, after))
    film = Film()
    run = flow_times(work_on(cluster), stages, recorder=film)
    last: dict[int, int] = {}
    for index, stage in enumerate(stages):
        ready_R = np.zeros(ranks, dtype=np.int64)
        for before in (*stage.after, *([last[stage.stream]] if stage.stream in last else [])):
            ready_R = np.maximum(ready_R, run.end_WGR[0, before])
        assert run.start_WGR[0, index].tolist() == ready_R.tolist()
        if stage.work_WR is not None:
            assert (run.end_WGR[0, index] >= ready_R + stage.work_WR[0]).all()
        last[stage.stream] = index
    for shot in film.shots:
        np.testing.assert_allclose(shot.speed_F, fair_speeds(shot.path_FP, shot.cost_FP), rtol=1e-9)


def test_a_stage_of_no_legs_is_its_work() -> None:
    cluster = cluster_of(1, 2)
    run = flow_times(work_on(cluster), [stage_of(cluster, (), [3, 5]), stage_of(cluster, (), [4, 1])])
    assert run.end_WGR.tolist() == [[[3, 5], [7, 6]]]
