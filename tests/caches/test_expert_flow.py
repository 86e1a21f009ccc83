"""ExpertFlow's cache: its allocation, the best hits within a pass with a right predictor, LRU with a wrong one."""

import numpy as np
import pytest
from cache_cases import lru_by_hand, random_trace, steps_of, trace_of
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import UsageError
from solvers.cache.expert_flow import allocate_slots, expert_flow
from solvers.cache.prefetch import corrupted_prediction
from traces.accesses import trace_accesses
from traces.device_work import decode_batches

cases = st.builds(
    random_trace, st.integers(0, 9999), layers=st.just(3), stay=st.sampled_from([0.0, 0.7]), requests=st.just(4)
)


def test_slots_by_demand_as_in_the_paper():
    assert allocate_slots(np.array([3, 2]), 4).tolist() == [3, 1]
    assert allocate_slots(np.array([0, 0]), 4).tolist() == [0, 0]
    with pytest.raises(UsageError, match="slots -1"):
        allocate_slots(np.array([1]), -1)


@given(st.lists(st.integers(0, 9), max_size=6), st.integers(0, 40))
def test_slots_are_spent_in_proportion(demand, slots):
    demand_L = np.array(demand, dtype=np.int64)
    found_L = allocate_slots(demand_L, slots)
    assert found_L.sum() == min(slots, demand_L.sum())
    assert (found_L <= demand_L).all()
    if slots < demand_L.sum():
        assert (np.abs(found_L - demand_L * slots / demand_L.sum()) < 1).all()


def hits_within_passes(needs_SL, slots):
    """What exact knowledge of a pass allows: min(needed, slots), where a finished layer's slots go to the next ones."""
    hits_L = np.zeros(needs_SL.shape[1], dtype=np.int64)
    for need_L in needs_SL:
        room_L = allocate_slots(need_L, slots)
        for site in range(len(need_L)):
            hits_L[site] += min(room_L[site], need_L[site])
            free = slots - room_L[site + 1 :].sum()
            for later in range(site + 1, len(need_L)):
                more = min(free, need_L[later] - room_L[later])
                room_L[later] += more
                free -= more
    return hits_L


@settings(max_examples=40, deadline=None)
@given(cases, st.integers(0, 7), st.booleans())
def test_an_exact_predictor_gives_belady_within_the_pass(trace, slots, batched):
    batches = decode_batches(trace, 4) if batched else None
    run = expert_flow(trace, trace.expert_LTK, slots, batches)
    accesses = trace_accesses(trace, batches)
    needs_SL = np.diff(accesses.start_LS, axis=1).T
    assert run.hits_L.tolist() == hits_within_passes(needs_SL, 3 * slots).tolist()


def pooled_steps(trace):
    accesses = trace_accesses(trace)
    steps_LS = [steps_of(accesses, site) for site in range(3)]
    return [[(site, e) for e in steps_LS[site][s]] for s in range(accesses.num_steps) for site in range(3)]


@settings(max_examples=40, deadline=None)
@given(cases, st.integers(0, 7), st.floats(0, 1), st.integers(0, 99))
def test_any_predictor_is_worth_an_lru_with_what_it_names_left_out(trace, slots, accuracy, seed):
    run = expert_flow(trace, corrupted_prediction(trace, accuracy, np.random.default_rng(seed)), slots)
    assert run.hits_L.sum() >= lru_by_hand(pooled_steps(trace), 3 * slots - 6)
    assert run.most_held <= 3 * slots
    assert (run.hits_L + run.misses_L).tolist() == trace_accesses(trace).accesses_L.tolist()


@settings(max_examples=20, deadline=None)
@given(cases, st.integers(0, 7))
def test_without_a_prediction_it_is_lru_over_all_layers(trace, slots):
    nothing = np.full((3, trace.num_tokens, 1), 255, dtype=np.uint8)
    run = expert_flow(trace, nothing, slots)
    assert run.hits_L.sum() == lru_by_hand(pooled_steps(trace), 3 * slots)
    assert run.prefetched_L.sum() == 0


def test_hits_rise_with_accuracy_and_end_near_lru():
    trace = random_trace(1, layers=4, tokens=600, experts=16, stay=0.5)
    for slots in (2, 4, 8):
        rates = [
            expert_flow(trace, corrupted_prediction(trace, accuracy, np.random.default_rng(0)), slots).hit_rate
            for accuracy in (0.0, 0.5, 0.8, 0.95, 1.0)
        ]
        assert rates == sorted(rates)
        assert rates[-1] == 1.0


def test_a_layer_corrects_the_predictor_by_hand():
    # two layers, one slot each; the predictor names 2 in both layers, 0 and 1 are needed
    trace = trace_of([[[0], [0]], [[1], [1]]], 4)
    wrong = np.full((2, 2, 1), 2, dtype=np.uint8)
    run = expert_flow(trace, wrong, 1)
    # pass 1 loads both wrong ones; 0 and 1 take their places; pass 2 again
    assert (run.hits_L.tolist(), run.prefetched_L.tolist()) == ([0, 0], [2, 2])
    # with a third and fourth slot what is needed stays
    run = expert_flow(trace, wrong, 2)
    assert run.hits_L.tolist() == [1, 1]
    # an expert that was prefetched in vain is still there
    assert run.prefetched_L.tolist() == [1, 1]
    with pytest.raises(UsageError, match="slots is -1"):
        expert_flow(trace, wrong, -1)
