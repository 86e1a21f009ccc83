"""SRP and both SCH: known answers, brute force over windows, the analytic case; the advice on both kinds of trace."""

from pathlib import Path

import numpy as np
import pytest
from cache_cases import random_trace, steps_of, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import UsageError
from solvers.cache.policies import simulate_cache
from traces.accesses import trace_accesses
from traces.device_work import decode_batches
from traces.locality import offload_advice, sch_v1, sch_v2, segment_routing, uniform_srp
from traces.readers import read_any

DATA = Path(__file__).resolve().parents[2].parent / "shared" / "data"
cases = st.builds(random_trace, st.integers(0, 9999), stay=st.sampled_from([0.0, 0.7]))
windows = st.integers(1, 6)


def window_counts_by_hand(trace, window):
    """(site, windows, experts): tokens of each window of one request that use each expert."""
    request_id_T = trace.request_id_T
    counts = []
    for request in np.unique(request_id_T):
        tokens = np.flatnonzero(request_id_T == request)
        for at in range(len(tokens) - window + 1):
            ids = trace.expert_LTK[:, tokens[at : at + window]].reshape(len(trace.expert_LTK), -1)
            counts.append([np.bincount(row, minlength=trace.model.num_experts) for row in ids])
    return np.array(counts).transpose(1, 0, 2)


def best_f1_by_hand(counts_XE, window, thresholds_E):
    on_XE = counts_XE >= np.asarray(thresholds_E)
    below = window * on_XE.sum() + counts_XE.sum()
    return 2 * counts_XE[on_XE].sum() / below, on_XE.sum()


@settings(max_examples=20, deadline=None)
@given(cases, windows)
def test_srp_is_the_best_threshold_by_brute_force(trace, window):
    found = segment_routing(trace, window)
    counts_LWE = window_counts_by_hand(trace, window)
    assert found.windows == counts_LWE.shape[1]
    for site in range(2):
        for expert in range(6):
            counts_W1 = counts_LWE[site, :, expert : expert + 1]
            if counts_W1.sum():
                best = max(best_f1_by_hand(counts_W1, window, [a])[0] for a in range(1, window + 1))
                assert found.expert_LE[site, expert] == pytest.approx(best)
            else:
                assert np.isnan(found.expert_LE[site, expert])
        best, on = max(best_f1_by_hand(counts_LWE[site], window, [a] * 6) for a in range(1, window + 1))
        assert found.layer_L[site] == pytest.approx(best)
        if sum(best_f1_by_hand(counts_LWE[site], window, [a] * 6)[0] > best - 1e-9 for a in range(1, window + 1)) == 1:
            assert found.rho_L[site] == pytest.approx(on / (found.windows * 2))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 9999), st.integers(1, 3))
def test_no_thresholds_of_their_own_beat_the_common_one(seed, window):
    trace = random_trace(seed, layers=1, tokens=14, experts=3, top_k=1, requests=2, stay=0.5)
    counts_WE = window_counts_by_hand(trace, window)[0]
    every = np.ndindex((window + 1,) * 3)
    best = max(best_f1_by_hand(counts_WE, window, [a + 1 for a in chosen])[0] for chosen in every)
    assert segment_routing(trace, window).layer_L[0] == pytest.approx(best)


@settings(max_examples=20, deadline=None)
@given(cases, windows, st.integers(0, 7))
def test_sch_v1_is_the_best_fixed_set_of_each_window(trace, window, slots):
    counts_LWE = np.sort(window_counts_by_hand(trace, window), axis=2)[:, :, ::-1]
    found = sch_v1(trace, window, slots)
    assert found.hits_L.tolist() == counts_LWE[:, :, :slots].sum(axis=(1, 2)).tolist()
    assert found.accesses_L.tolist() == counts_LWE.sum(axis=(1, 2)).tolist()


def lookahead_by_hand(steps, window, slots):
    held, hits, last, clock = set(), 0, {}, 0
    for at, step in enumerate(steps):
        hits += len(held & set(step))
        for expert in step:
            clock += 1
            last[expert] = clock
        ahead = [expert for later in steps[at + 1 : at + 1 + window] for expert in later]
        held = set(sorted(held | set(step), key=lambda e: (ahead.count(e), last[e]), reverse=True)[:slots])
    return hits


@settings(max_examples=20, deadline=None)
@given(cases, windows, st.integers(0, 7), st.booleans())
def test_sch_v2_by_hand_and_never_above_belady(trace, window, slots, batched):
    batches = decode_batches(trace, 2) if batched else None
    found = sch_v2(trace, window, slots, batches)
    accesses = trace_accesses(trace, batches)
    assert found.hits_L.tolist() == [lookahead_by_hand(steps_of(accesses, s), window, slots) for s in range(2)]
    assert (found.hits_L <= simulate_cache(accesses, "belady", slots).hits_L).all()
    assert (found.hits_L == simulate_cache(accesses, "sch", slots, window=window).hits_L).all()


@settings(max_examples=20, deadline=None)
@given(cases, windows)
def test_sch_rises_with_the_cache_and_ends_at_one(trace, window):
    rates = [sch_v1(trace, window, slots).hit_rate for slots in range(7)]
    assert rates == sorted(rates)
    assert (rates[0], rates[6]) == (0.0, 1.0)
    # v2 starts empty: with room for all, each expert misses once
    found = sch_v2(trace, window, 6)
    used = [len(np.unique(ids)) for ids in trace.expert_LTK]
    assert (found.accesses_L - found.hits_L).tolist() == used


def test_constant_routing_is_perfectly_local():
    trace = trace_of(np.tile([[[0, 3]], [[2, 1]]], (1, 40, 1)), 8)
    found = segment_routing(trace, 16)
    assert found.model == 1.0
    assert (found.layer_L == 1.0).all()
    assert np.nanmin(found.expert_LE) == 1.0
    assert (found.rho, found.rho_L.tolist()) == (1.0, [1.0, 1.0])
    assert sch_v1(trace, 16, 2).hit_rate == 1.0
    assert sch_v1(trace, 16, 1).hit_rate == 0.5
    # the first token loads, the other 39 hit
    assert sch_v2(trace, 16, 2).hit_rate == pytest.approx(39 / 40)


def test_uniform_routing_has_the_analytic_srp():
    trace = random_trace(3, layers=2, tokens=30000, experts=16, top_k=2, requests=4)
    assert segment_routing(trace, 16).model == pytest.approx(uniform_srp(16, 2, 16), abs=0.005)
    # one token at a time: on where it is used, always right
    assert segment_routing(trace, 1).model == 1.0
    # two tokens, half the experts, by hand: f is 0, 1, 2 with 1/4, 1/2, 1/4; f >= 1: 2 * 1 / (2 * 3/4 + 1)
    assert uniform_srp(2, 1, 2) == pytest.approx(0.8)


def test_interleaved_requests_have_the_windows_of_each_request():
    apart = random_trace(5, tokens=40, requests=2, stay=0.6)
    order = np.argsort(np.random.default_rng(0).random(40))
    # the same order inside each request
    for request in (0, 1):
        places = np.flatnonzero(apart.request_id_T[order] == request)
        order[places] = np.sort(order[places])
    mixed = apart.select_tokens(order)
    assert (np.diff(mixed.request_id_T) < 0).any()
    assert segment_routing(mixed, 4).model == segment_routing(apart, 4).model
    assert sch_v1(mixed, 4, 2).hits_L.tolist() == sch_v1(apart, 4, 2).hits_L.tolist()


def test_the_advice_tells_local_routing_from_scattered():
    local = offload_advice(random_trace(0, tokens=800, experts=32, stay=0.9))
    scattered = offload_advice(random_trace(0, tokens=800, experts=32))
    assert local.pays
    assert "a cache of experts pays (layers" in local.text
    assert not scattered.pays
    assert "will be small, look to placement and batching first" in scattered.text
    assert scattered.srp == pytest.approx(scattered.uniform, abs=0.02)
    # two of six experts at random: SRP is high only because the layer is small, and the text says so
    small = offload_advice(random_trace(0, tokens=800, experts=6))
    assert small.pays
    assert "routing without locality shows as much" in small.text


def test_refusals():
    trace = random_trace(0)
    with pytest.raises(UsageError, match="window is 0"):
        segment_routing(trace, 0)
    with pytest.raises(UsageError, match=r"window is 31; the longest request has \d+ tokens"):
        segment_routing(trace, 31)
    with pytest.raises(UsageError, match="slots is -1"):
        sch_v2(trace, 4, -1)


@pytest.mark.data
def test_gpt_oss_is_local_and_its_hit_rates_are_as_measured():
    path = DATA / "gptoss20b" / "mmlu.npz"
    if not path.exists():
        pytest.skip("the developers' traces are not here")
    trace = read_any(path)
    advice = offload_advice(trace)
    assert advice.pays
    assert advice.srp == pytest.approx(0.539, abs=0.002)
    assert advice.uniform == pytest.approx(0.321, abs=0.001)
    accesses = trace_accesses(trace)
    for slots, lru, belady in ((4, 0.429, 0.603), (8, 0.646, 0.805)):
        assert simulate_cache(accesses, "lru", slots).hit_rate == pytest.approx(lru, abs=0.001)
        assert simulate_cache(accesses, "belady", slots).hit_rate == pytest.approx(belady, abs=0.001)
