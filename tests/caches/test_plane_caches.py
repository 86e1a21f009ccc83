"""The caches of planes that simulate and run share: laws of all, each rule by hand, and the cache of whole experts."""

import numpy as np
import pytest
from cache_cases import random_trace
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.device.cache import CACHE_POLICIES, make_cache
from placer.core.device.ladder import BitLadder
from placer.core.device.work import DeviceWork
from placer.core.errors import MismatchError, UsageError
from solvers.cache.policies import simulate_cache
from traces.accesses import Accesses
from traces.device_work import device_work, prefill_batches

SHAPE = (3, 4, 3)
SIZES = (5, 2, 2)
KEEPING = [policy for policy in CACHE_POLICIES if policy != "none"]


def work_of(count_BLEK):
    return DeviceWork(tokens_B=np.ones(len(count_BLEK), dtype=np.int64), count_BLEK=count_BLEK)


def random_work(seed, iterations=8, shape=SHAPE):
    rng = np.random.default_rng(seed)
    return work_of(rng.integers(1, 3, (iterations, *shape)) * (rng.random((iterations, *shape)) < 0.25))


def visits(work, rng=None, nested=True):
    """Every site of every iteration with the planes it uses: by expert, or experts in a random order."""
    for count_LEK in work.count_BLEK:
        for site, count_EK in enumerate(count_LEK):
            used_EK = np.flip(np.cumsum(np.flip(count_EK, 1), axis=1), 1) > 0 if nested else count_EK > 0
            experts = np.arange(len(count_EK)) if rng is None else rng.permutation(len(count_EK))
            yield site, [(site, int(e), int(k)) for e in experts for k in np.flatnonzero(used_EK[e])]


def replay(cache, work, rng=None, nested=True):
    hits = 0
    for site, used in visits(work, rng, nested):
        present_EK = cache.present_EK(site)
        hits += sum(bool(present_EK[plane[1:]]) for plane in used)
        cache.end_site(site, used)
    return hits


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(CACHE_POLICIES), st.integers(0, 9999), st.integers(0, 120), st.booleans())
def test_what_every_cache_keeps_to(policy, seed, capacity, nested):
    work = random_work(seed)
    cache = make_cache(policy, SHAPE, SIZES, capacity, future=work, nested=nested)
    held = set()
    for site, used in visits(work, np.random.default_rng(seed), nested):
        taken, thrown = cache.end_site(site, used)
        assert not set(taken) & held
        assert set(taken) <= set(used)
        assert set(thrown) <= held
        held = (held | set(taken)) - set(thrown)
        there = {(row, int(e), int(k)) for row in range(3) for e, k in np.argwhere(cache.present_EK(row))}
        assert there == held
        assert cache.used_bytes == sum(SIZES[plane[2]] for plane in held) <= capacity
        if nested and capacity >= max(SIZES):
            # no plane without the lower ones of its expert
            assert all((row, e, k - 1) in held for row, e, k in held if k)
    if capacity >= 12 * sum(SIZES) and policy != "none":
        assert held == {plane for _, used in visits(work, nested=nested) for plane in used}


def lru_planes(work, capacity, rng):
    """The most recent planes that fit, newest first; the planes of an expert at one visit are newest from below."""
    order, hits, held = [], 0, set()
    for _, used in visits(work, rng):
        hits += len(held & set(used))
        experts = list(dict.fromkeys(plane[:2] for plane in used))
        now = [plane for e in reversed(experts) for plane in sorted(p for p in used if p[:2] == e)]
        order = now + [plane for plane in order if plane not in now and plane in held]
        held, room = set(), capacity
        for plane in order:
            room -= SIZES[plane[2]]
            if room < 0:
                break
            held.add(plane)
    return hits


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.integers(5, 100))
def test_lru_keeps_the_most_recent_planes_that_fit(seed, capacity):
    work = random_work(seed)
    found = replay(make_cache("lru", SHAPE, SIZES, capacity), work, np.random.default_rng(seed))
    assert found == lru_planes(work, capacity, np.random.default_rng(seed))


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(["lru", "lfu", "belady"]), st.integers(0, 9999), st.integers(0, 14), st.integers(1, 3))
def test_with_one_plane_it_is_the_cache_of_whole_experts(policy, seed, slots, tokens):
    trace = random_trace(seed, layers=2, experts=6, stay=0.5, skew=0.5)
    work = device_work(trace, prefill_batches(trace, tokens), BitLadder(bits_K=(4,)))
    cache = make_cache(policy, (2, 6, 1), (7,), 7 * slots, future=work)
    # one cache for all layers: every site of an iteration is a step, its experts are items of their own
    used = [[site * 6 + expert for _, expert, _ in planes] for site, planes in visits(work)]
    accesses = Accesses(
        num_experts=12,
        start_LS=np.cumsum([0, *map(len, used)])[None, :],
        expert_A=np.array([item for items in used for item in items], dtype=np.int32),
    )
    assert replay(cache, work) == simulate_cache(accesses, policy, slots).hits_L[0]


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.integers(0, 36), st.booleans())
def test_belady_is_never_below_any_when_planes_have_one_size(seed, planes, nested):
    work = random_work(seed)
    hits = {p: replay(make_cache(p, SHAPE, (3, 3, 3), 3 * planes, future=work, nested=nested), work, nested=nested)
            for p in CACHE_POLICIES}  # fmt: skip
    assert max(hits.values()) == hits["belady"]
    assert hits["none"] == 0


def test_d2moe_frees_the_layer_before_from_the_high_planes_down():
    cache = make_cache("d2moe", (3, 2, 2), (10, 4), 32)
    assert cache.end_site(0, [(0, 0, 0), (0, 0, 1)])[1] == []
    assert cache.end_site(1, [(1, 0, 0), (1, 0, 1)])[1] == []
    # 28 of 32 are held and layer 2 brings 4 + 10: its own layer before goes first, the high plane, then the low one
    assert cache.end_site(2, [(2, 1, 0)]) == ([(2, 1, 0)], [(1, 0, 0), (1, 0, 1)])
    # the next pass: layer 0 has all; layer 1 brings 14 to 24 and layer 0's high plane is not enough
    assert cache.end_site(0, [(0, 0, 0), (0, 0, 1)]) == ([], [])
    assert cache.end_site(1, [(1, 0, 0)]) == ([(1, 0, 0)], [(0, 0, 1)])
    assert cache.used_bytes == 30
    # a layer that alone is too much keeps its low planes
    alone = make_cache("d2moe", (1, 2, 2), (10, 4), 25)
    taken, _ = alone.end_site(0, [(0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1)])
    assert sorted(taken) == [(0, 0, 0), (0, 1, 0), (0, 1, 1)]


def test_lfu_counts_uses_of_planes_that_are_not_held():
    cache = make_cache("lfu", (1, 3, 1), (1,), 1)
    for expert, held in ((0, 0), (0, 0), (1, 0), (1, 1), (2, 1), (2, 2), (0, 0)):
        # equal counts go to the one used last
        cache.end_site(0, [(0, expert, 0)])
        assert np.flatnonzero(cache.present_EK(0)).tolist() == [held]


def test_a_plane_larger_than_the_cache_never_enters():
    for policy in KEEPING:
        work = work_of(np.array([[[[0, 0, 1]]]]))
        cache = make_cache(policy, (1, 1, 3), SIZES, 4, future=work)
        assert sorted(cache.end_site(0, [(0, 0, 0), (0, 0, 1), (0, 0, 2)])[0]) == [(0, 0, 1), (0, 0, 2)]


def test_many_uses_leave_nothing_behind():
    cache = make_cache("lru", (1, 2, 1), (1,), 2)
    for _ in range(500):
        cache.end_site(0, [(0, 0, 0), (0, 1, 0)])
    assert len(cache._heap) < 200


def test_refusals():
    work = random_work(0)
    with pytest.raises(UsageError, match="cache is 'mru'; use one of none, lru"):
        make_cache("mru", SHAPE, SIZES, 9)
    with pytest.raises(UsageError, match="'belady', which has to know the work"):
        make_cache("belady", SHAPE, SIZES, 9)
    with pytest.raises(MismatchError, match=r"the future has \(3, 4, 3\)"):
        make_cache("belady", (3, 5, 3), SIZES, 9, future=work)
    with pytest.raises(UsageError, match="plane_bytes_K has 2 sizes"):
        make_cache("lru", SHAPE, (1, 2), 9)
    with pytest.raises(UsageError, match="capacity_bytes is -1"):
        make_cache("lfu", SHAPE, SIZES, -1)
    nothing = make_cache("belady", SHAPE, SIZES, 9, future=work_of(np.zeros((1, *SHAPE), dtype=np.int64)))
    with pytest.raises(MismatchError, match="iteration 0 uses plane 0 of expert 2 at site 1, where the future"):
        nothing.end_site(1, [(1, 2, 0)])
