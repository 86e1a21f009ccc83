"""Hit rates with a predictor: exact at both ends, bounded below by a smaller LRU, and refused where it does not fit."""

import numpy as np
import pytest
from cache_cases import lru_by_hand, random_trace, steps_of, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import UsageError
from solvers.cache.prefetch import corrupted_prediction, hit_rate_with_prediction
from traces.accesses import trace_accesses
from traces.device_work import decode_batches

cases = st.builds(
    random_trace, st.integers(0, 9999), stay=st.sampled_from([0.0, 0.7]), skew=st.sampled_from([0.0, 1.0])
)


@settings(max_examples=25, deadline=None)
@given(cases, st.integers(0, 7), st.booleans())
def test_an_exact_prediction_hits_all_that_fits(trace, slots, batched):
    batches = decode_batches(trace, 2) if batched else None
    run = hit_rate_with_prediction(trace, trace.expert_LTK, slots, batches)
    accesses = trace_accesses(trace, batches)
    for site in range(2):
        assert run.hits_L[site] == sum(min(len(step), slots) for step in steps_of(accesses, site))
    assert (run.hits_L + run.misses_L == accesses.accesses_L).all()
    assert run.most_held <= slots


@settings(max_examples=25, deadline=None)
@given(cases, st.integers(0, 7))
def test_without_predictions_it_is_lru(trace, slots):
    nothing = np.full((2, trace.num_tokens, 1), 255, dtype=np.uint8)
    run = hit_rate_with_prediction(trace, nothing, slots)
    accesses = trace_accesses(trace)
    assert run.hits_L.tolist() == [lru_by_hand(steps_of(accesses, site), slots) for site in range(2)]
    assert not run.prefetched_L.any()


@settings(max_examples=40, deadline=None)
@given(cases, st.integers(2, 6), st.floats(0, 1), st.integers(0, 99))
def test_wrong_predictions_cost_no_more_slots_than_they_name(trace, slots, accuracy, seed):
    predicted_LTK = corrupted_prediction(trace, accuracy, np.random.default_rng(seed))
    run = hit_rate_with_prediction(trace, predicted_LTK, slots)
    for site in range(2):
        assert run.hits_L[site] >= lru_by_hand(steps_of(trace_accesses(trace), site), slots - 2)


def test_an_unneeded_prefetch_goes_first_and_a_miss_is_kept_by_hand():
    trace = trace_of([[[0], [1], [0], [1]]], 4)
    predicted_LTK = np.array([[[2], [3], [2], [3]]], dtype=np.uint8)
    # one slot for the prefetched, one for the needed: 0, then 1, each overwritten before it comes again
    two = hit_rate_with_prediction(trace, predicted_LTK, 2)
    assert (two.hits_L.tolist(), two.prefetched_L.tolist(), two.loads) == ([0], [4], 8)
    # a third slot keeps both
    three = hit_rate_with_prediction(trace, predicted_LTK, 3)
    assert three.hits_L.tolist() == [2]


def test_corruption_keeps_the_share_asked_for():
    trace = random_trace(0, tokens=4000, experts=32)
    for accuracy in (0.0, 0.3, 0.9, 1.0):
        predicted_LTK = corrupted_prediction(trace, accuracy, np.random.default_rng(1))
        right = accuracy + (1 - accuracy) / 32
        assert (predicted_LTK == trace.expert_LTK).mean() == pytest.approx(right, abs=0.02)


def test_refusals():
    trace = random_trace(0)
    with pytest.raises(UsageError, match=r"predicted_LTK is .*; give \(\*\(2, 30\), k\)"):
        hit_rate_with_prediction(trace, trace.expert_LTK[:, :5], 2)
    with pytest.raises(UsageError, match="uint8 or uint16"):
        hit_rate_with_prediction(trace, trace.expert_LTK.astype(np.int64), 2)
    with pytest.raises(UsageError, match="slots is -1"):
        hit_rate_with_prediction(trace, trace.expert_LTK, -1)
    with pytest.raises(UsageError, match=r"accuracy is 1\.5"):
        corrupted_prediction(trace, 1.5, np.random.default_rng(0))
