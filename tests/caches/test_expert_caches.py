"""Caches of whole experts: each rule by a plain replay, Belady by brute force, and what any cache conserves."""

from itertools import combinations

import numpy as np
import pytest
from cache_cases import lru_by_hand, random_trace, steps_of, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import UsageError
from solvers.cache.policies import CACHE_RULES, simulate_cache
from traces.accesses import step_accesses, trace_accesses
from traces.device_work import decode_batches

cases = st.builds(
    random_trace, st.integers(0, 9999), stay=st.sampled_from([0.0, 0.7]), skew=st.sampled_from([0.0, 1.0])
)


def accesses_of(trace, batched):
    return trace_accesses(trace, decode_batches(trace, 3) if batched else None)


def most_hits(steps, slots):
    """The most hits that any choice of what to keep can have, by dynamic programming over the sets held."""
    best = {frozenset(): 0}
    for step in steps:
        after = {}
        for held, hits in best.items():
            hits += len(held & set(step))
            there = held | set(step)
            for kept in combinations(sorted(there), min(slots, len(there))):
                kept = frozenset(kept)
                after[kept] = max(after.get(kept, 0), hits)
        best = after
    return max(best.values())


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 9999), st.integers(0, 4), st.booleans(), st.sampled_from([0.0, 0.6]))
def test_belady_is_the_optimum(seed, slots, batched, stay):
    trace = random_trace(seed, layers=1, tokens=12, experts=5, stay=stay)
    accesses = accesses_of(trace, batched)
    assert simulate_cache(accesses, "belady", slots).hits_L[0] == most_hits(steps_of(accesses, 0), slots)


@settings(max_examples=30, deadline=None)
@given(cases, st.integers(0, 7), st.booleans(), st.integers(1, 40))
def test_belady_is_never_below_any_and_all_conserve(trace, slots, batched, window):
    accesses = accesses_of(trace, batched)
    rng = np.random.default_rng(0)
    runs = {rule: simulate_cache(accesses, rule, slots, window=window, rng=rng) for rule in CACHE_RULES}
    for run in runs.values():
        assert (run.hits_L <= runs["belady"].hits_L).all()
        assert (run.hits_L >= 0).all()
        assert (run.hits_L + run.misses_L).tolist() == accesses.accesses_L.tolist()
        assert run.most_held <= slots
        # loaded on demand only, and nothing is written back
        assert run.loads == run.misses_L.sum()
    if slots >= 6:
        assert {run.hit_rate for run in runs.values()} == {runs["lru"].hit_rate}


def lfu_by_hand(steps, slots):
    held, uses, last, hits, clock = set(), {}, {}, 0, 0
    for step in steps:
        hits += len(held & set(step))
        for expert in step:
            clock += 1
            uses[expert] = uses.get(expert, 0) + 1
            last[expert] = clock
        held = set(sorted(held | set(step), key=lambda e: (uses[e], last[e]), reverse=True)[:slots])
    return hits


@settings(max_examples=30, deadline=None)
@given(cases, st.integers(0, 7), st.booleans())
def test_lru_and_lfu_by_hand(trace, slots, batched):
    accesses = accesses_of(trace, batched)
    for rule, by_hand in (("lru", lru_by_hand), ("lfu", lfu_by_hand)):
        found = simulate_cache(accesses, rule, slots).hits_L.tolist()
        assert found == [by_hand(steps_of(accesses, site), slots) for site in range(2)]


def test_random_replacement_keeps_a_uniform_choice():
    trace = trace_of([[[0], [1], [2], [0]] * 3000], 3)
    run = simulate_cache(trace_accesses(trace), "random", 2, rng=np.random.default_rng(1))
    again = simulate_cache(trace_accesses(trace), "random", 2, rng=np.random.default_rng(1))
    assert run.hits_L.tolist() == again.hits_L.tolist()
    # 0 0 1 2 again and again: with p the chance that 1 is held beside 0, p = (3 - p) / 8, and of four accesses
    # 1 + p + (1 - p) / 2 + (1 + p) / 4 = 2 hit
    assert run.hit_rate == pytest.approx(0.5, abs=0.02)
    lru = simulate_cache(trace_accesses(trace), "lru", 2)
    # 0 0 1 2 0 0 1 2: only the second 0 of each pair hits
    assert lru.hits_L[0] == 2999


def test_sweeps_fool_lru_and_not_belady():
    trace = trace_of([[[e] for e in range(4)] * 10], 4)
    accesses = trace_accesses(trace)
    assert simulate_cache(accesses, "lru", 3).hits_L[0] == 0
    # two of the three slots never change, and every sweep finds them
    assert simulate_cache(accesses, "belady", 3).hits_L[0] == most_hits(steps_of(accesses, 0), 3) > 20


def test_steps_hold_each_expert_once_in_the_order_asked_for():
    ids = np.array([[[3, 1], [1, 1], [2, 255], [255, 255]]], dtype=np.uint8)
    alone = step_accesses(ids, [4])
    assert steps_of(alone, 0) == [[1, 3], [1], [2], []]
    batches = [np.array([0, 1, 2]), np.array([], dtype=np.int64), np.array([3, 2])]
    assert steps_of(step_accesses(ids, [4], batches), 0) == [[1, 2, 3], [], [2]]
    assert steps_of(step_accesses(ids, [4], batches, hottest_first=True), 0) == [[1, 2, 3], [], [2]]
    ids[0, 1] = [3, 255]
    assert steps_of(step_accesses(ids, [4], batches, hottest_first=True), 0) == [[3, 1, 2], [], [2]]
    # ids from a site's own number of experts on are null experts
    assert steps_of(step_accesses(ids, [3]), 0) == [[1], [], [2], []]
    with pytest.raises(UsageError, match="batches name token 4"):
        step_accesses(ids, [4], [np.array([4])])
    with pytest.raises(UsageError, match=r"give \(2 sites, tokens, k\)"):
        step_accesses(ids, [4, 4])


def test_refusals():
    accesses = trace_accesses(random_trace(0))
    with pytest.raises(UsageError, match="slots is -2"):
        simulate_cache(accesses, "lru", -2)
    with pytest.raises(UsageError, match="cache rule is 'mru'; use one of random, lru"):
        simulate_cache(accesses, "mru", 2)
    with pytest.raises(UsageError, match="has no rng"):
        simulate_cache(accesses, "random", 2)
    with pytest.raises(UsageError, match="window is 0"):
        simulate_cache(accesses, "sch", 2, window=0)
