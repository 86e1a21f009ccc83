"""Rounds: laws of both decompositions, brute force on few ranks, hot ports and uplinks."""

from itertools import permutations

import numpy as np
import pytest
from choosing_cases import cluster_of, clusters
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.cluster import ClusterSpec
from placer.core.cost import leg_times
from placer.core.schedule import expand_leg
from solvers.schedule.birkhoff import birkhoff, bottleneck_matching, complete
from solvers.schedule.one_factor import one_factor_rounds, rounds_ns
from solvers.schedule.rounds import plan_rounds, rounds_bound_ns, rounds_families, rounds_price_ns


def random_load(seed: int, ranks: int, empty: float = 0.3, most: int = 50) -> np.ndarray:
    rng = np.random.default_rng(seed)
    load = rng.integers(0, most, (ranks, ranks)) * (rng.random((ranks, ranks)) >= empty)
    np.fill_diagonal(load, 0)
    return load


def carried(to_GR: np.ndarray, amount_GR: np.ndarray) -> np.ndarray:
    ranks = to_GR.shape[1]
    total = np.zeros((ranks, ranks), dtype=amount_GR.dtype)
    at, sender = np.nonzero(to_GR >= 0)
    np.add.at(total, (sender, to_GR[at, sender]), amount_GR[at, sender])
    return total


@settings(max_examples=80, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ranks=st.integers(2, 9), empty=st.sampled_from([0.0, 0.5, 0.9, 1.0]))
def test_birkhoff_carries_all_in_the_time_of_the_busiest_port(seed: int, ranks: int, empty: float) -> None:
    load = random_load(seed, ranks, empty)
    to_GR, amount_GR = birkhoff(load, ranks**2)
    assert (carried(to_GR, amount_GR) == load).all()
    busiest = max(load.sum(axis=0).max(), load.sum(axis=1).max())
    assert amount_GR.max(axis=1, initial=0).sum() == busiest
    assert len(to_GR) <= ranks**2 - 2 * ranks + 2
    whole_GR, share_GR = complete(load, to_GR, amount_GR)
    covered = carried(whole_GR, share_GR)
    assert covered == pytest.approx(1.0 - np.eye(ranks))
    # pairs without load found a place that costs nothing
    assert carried(whole_GR, share_GR * load[np.arange(ranks), whole_GR]) == pytest.approx(load)
    assert (share_GR * load[np.arange(ranks), whole_GR]).max(axis=1).sum() == pytest.approx(busiest)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ranks=st.integers(2, 7), cap=st.integers(0, 10))
def test_a_cap_on_rounds_leaves_nothing_behind(seed: int, ranks: int, cap: int) -> None:
    load = random_load(seed, ranks)
    to_GR, amount_GR = birkhoff(load, cap)
    assert len(to_GR) <= cap
    whole_GR, share_GR = complete(load, to_GR, amount_GR)
    assert carried(whole_GR, share_GR) == pytest.approx(1.0 - np.eye(ranks))
    for to_R in whole_GR:
        receivers = to_R[to_R >= 0]
        assert len(set(receivers.tolist())) == len(receivers)


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), ranks=st.integers(1, 5))
def test_bottleneck_matching_equals_brute_force(seed: int, ranks: int) -> None:
    entry = np.random.default_rng(seed).integers(0, 6, (ranks, ranks)) + np.eye(ranks, dtype=np.int64)
    rank = np.arange(ranks)
    best = max(entry[rank, list(order)].min() for order in permutations(range(ranks)))
    match_R = bottleneck_matching(entry, np.full(ranks, -1))
    assert sorted(match_R.tolist()) == list(range(ranks))
    assert entry[rank, match_R].min() == best


def all_factorisations(ranks: int) -> list[np.ndarray]:
    """All ways to cut the pairs of different ranks into R - 1 rounds; rounds in order of rank 0's partner."""
    rounds = [p for p in permutations(range(ranks)) if all(p[a] != a for a in range(ranks))]
    found: list[list[tuple[int, ...]]] = [[]]
    for partner in range(1, ranks):
        found = [
            [*chosen, p]
            for chosen in found
            for p in rounds
            if p[0] == partner and all(p[a] != q[a] for q in chosen for a in range(ranks))
        ]
    return [np.array(chosen) for chosen in found]


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), shape=st.sampled_from([(1, 2), (2, 1), (1, 3), (1, 4), (2, 2), (4, 1)]))
def test_one_factors_equal_brute_force_up_to_four_ranks(seed: int, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    ranks = shape[0] * shape[1]
    node_R = np.arange(ranks) // shape[1]
    time = random_load(seed, ranks, 0.2).astype(float)
    uplink = rng.choice([0.0, 0.3, 1.0]) * time * (node_R[:, None] != node_R)
    found = one_factor_rounds(time, uplink, node_R, restarts=4, rng=rng)
    assert carried(found, np.ones(found.shape)) == pytest.approx(1.0 - np.eye(ranks))
    best = min(rounds_ns(one, time, uplink, node_R) for one in all_factorisations(ranks))
    assert rounds_ns(found, time, uplink, node_R) == pytest.approx(best)


@settings(max_examples=40, deadline=None)
@given(cluster=clusters(most=3).filter(lambda c: c.num_ranks > 1), seed=st.integers(0, 2**32 - 1))
def test_both_families_cover_every_pair_and_respect_the_bound(cluster: ClusterSpec, seed: int) -> None:
    copies = np.stack([random_load(seed + window, cluster.num_ranks) for window in range(2)])
    families = rounds_families(copies, cluster, 1000, rng=np.random.default_rng(0))
    best = plan_rounds(copies, cluster, 1000, rng=np.random.default_rng(0))
    assert best.objective_ns == min(result.objective_ns for result in families.values())
    assert len(families["one_factor"].rounds.to_GR) == cluster.num_ranks - 1
    bound = rounds_bound_ns(copies, cluster, 1000)
    for result in families.values():
        legs = expand_leg(copies, "rounds", cluster.ranks_per_node, result.rounds)
        assert (np.sum(legs, axis=0) == copies).all(), "no copy is lost"
        price = np.mean([sum(leg_times(cluster, leg, 1000).slowest_W[w] for leg in legs) for w in range(2)])
        assert result.objective_ns == pytest.approx(price)
        assert bound <= price + len(legs) / 2
        assert 0 <= result.gap < 1


def test_the_better_family_depends_on_alpha() -> None:
    """Two hot pairs: without alpha they are split beside the others, with a dear alpha every pair stays whole."""
    copies = np.full((1, 4, 4), 10)
    copies[0, 0, 1:], copies[0, 1:, 0] = (30, 10, 20), (20, 30, 10)
    copies[0, np.arange(4), np.arange(4)] = 0
    free, dear = (cluster_of(1, 4, intra=(1.0, alpha)) for alpha in (0.0, 1000.0))
    split = plan_rounds(copies, free, 1000, rng=np.random.default_rng(0))
    assert split.objective_ns == pytest.approx(60_000, abs=200)
    assert split.gap < 0.01
    whole = plan_rounds(copies, dear, 1000, rng=np.random.default_rng(0))
    assert len(whole.rounds.to_GR) == 3


def test_rounds_beat_linear_where_shared_ports_have_a_tail_and_never_without() -> None:
    copies = random_load(3, 8, 0.1)[None]
    for tail in (1.0, 1.7):
        cluster = cluster_of(1, 8, intra=(1.0, 1.0, tail))
        linear = float(leg_times(cluster, copies, 1000).slowest_W[0])
        rounds = plan_rounds(copies, cluster, 1000, rng=np.random.default_rng(0)).objective_ns
        assert (rounds < linear) == (tail > 1)


def test_rounds_spread_messages_over_a_shared_uplink() -> None:
    """2 nodes of 4, an uplink as fast as two network ports: at most two messages may leave a node at once."""
    cluster = cluster_of(2, 4, intra=(1.0, 0.0), inter=(1.0, 0.0), uplink=(2.0, 0.0))
    copies = np.full((1, 8, 8), 10)
    copies[0, np.arange(8), np.arange(8)] = 0
    best = plan_rounds(copies, cluster, 1000, rng=np.random.default_rng(0))
    # 16 messages of 10 copies at two at a time: the uplink is the busiest port, and the rounds keep it busy
    assert best.bound_ns == 16 * 10_000 / 2
    naive = rounds_families(copies, cluster, 1000, rng=np.random.default_rng(0))["one_factor"].rounds
    assert rounds_price_ns(copies, naive, cluster, 1000) == best.objective_ns
    assert best.objective_ns <= 90_000
