"""Expert-aware batching: every token once, no token late, fewer experts than first come, first served."""

import numpy as np
import pytest
from batching_cases import random_routes, seeds, touched
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import UsageError
from solvers.batching.expert_aware import aware_batches
from solvers.batching.routes import pack_routes, unique_experts
from traces.synthetic import synthesize

QUICK = settings(max_examples=30, deadline=None)


@QUICK
@given(seeds, st.integers(0, 30), st.integers(1, 3), st.integers(1, 40))
def test_packed_routes_count_as_sets_do(seed, tokens, sites, experts):
    rng = np.random.default_rng(seed)
    expert_LTK = random_routes(rng, tokens, sites, experts, top_k=min(3, experts))
    expert_LTK[rng.random(expert_LTK.shape) < 0.2] = 255
    batch_T = rng.integers(0, 4, tokens)
    found = unique_experts(pack_routes(expert_LTK, experts), batch_T)
    wanted = [len(touched(expert_LTK, np.flatnonzero(batch_T == b))) for b in range(batch_T.max(initial=-1) + 1)]
    assert found.tolist() == wanted


@QUICK
@given(
    seeds,
    st.integers(0, 60),
    st.integers(1, 5),
    st.integers(0, 12),
    st.integers(0, 6),
    st.sampled_from(["oldest", "hottest"]),
    st.booleans(),
)
def test_every_token_once_and_none_late(seed, tokens, size, more, slack, start, in_requests):
    rng = np.random.default_rng(seed)
    route_TW = pack_routes(random_routes(rng, tokens), 5)
    requests = rng.integers(0, 6, tokens) if in_requests else None
    queue = size + more
    limit = -(-queue // size) - 1 + slack
    made = aware_batches(route_TW, size, queue, start=start, max_wait=limit, request_id_T=requests)
    assert sorted(np.concatenate([*made.batches(), np.zeros(0, int)]).tolist()) == list(range(tokens))
    assert np.bincount(made.batch_T, minlength=1).max() <= size
    assert all(len(batch) for batch in made.batches())
    assert made.wait_T.max(initial=0) <= limit
    if requests is not None:
        for request in range(6):
            assert (np.diff(made.batch_T[requests == request]) > 0).all(), "a request's tokens run one after another"
    elif slack == 0:
        assert (made.batch_T == np.arange(tokens) // size).all(), "the tightest limit is order of arrival"


@QUICK
@given(seeds, st.integers(1, 60), st.integers(1, 4), st.integers(0, 8))
def test_from_the_oldest_nobody_waits_for_a_whole_queue(seed, tokens, size, more):
    route_TW = pack_routes(random_routes(np.random.default_rng(seed), tokens), 5)
    assert aware_batches(route_TW, size, size + more).wait_T.max() < size + more


def test_the_token_that_adds_least_joins():
    expert_LTK = np.array([[[0], [7], [0], [8], [0], [7]]], dtype=np.uint8)
    made = aware_batches(pack_routes(expert_LTK, 9), 3, 6)
    assert made.batch_T.tolist() == [0, 1, 0, 1, 0, 1]
    assert made.wait_T.tolist() == [0, 1, 0, 1, 0, 1]


def test_without_a_guard_a_rare_expert_starves_and_the_guard_saves_it():
    # one token wants expert 1, everybody else who keeps coming wants expert 0
    expert_LTK = np.zeros((1, 101, 1), dtype=np.uint8)
    expert_LTK[0, 2] = 1
    route_TW = pack_routes(expert_LTK, 2)
    assert aware_batches(route_TW, 2, 4, start="hottest").wait_T[2] == 50
    assert aware_batches(route_TW, 2, 4, start="hottest", max_wait=5).wait_T[2] <= 5
    assert aware_batches(route_TW, 2, 4).wait_T[2] <= 3


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("start", ["oldest", "hottest"])
def test_fewer_experts_than_first_come_first_served_on_synthetic_traces(seed, start):
    trace = synthesize(num_layers=4, num_experts=16, top_k=2, num_tokens=2000, num_requests=40, seed=seed)
    route_TW = pack_routes(trace.expert_LTK, 16)
    for requests in (None, trace.request_id_T):
        fifo = aware_batches(route_TW, 8, 32, max_wait=3, request_id_T=requests)
        aware = aware_batches(route_TW, 8, 32, start=start, max_wait=12, request_id_T=requests)
        assert unique_experts(route_TW, aware.batch_T).sum() < unique_experts(route_TW, fifo.batch_T).sum()


@pytest.mark.parametrize(
    ("size", "queue", "given", "says"),
    [
        (0, 4, {}, "batch_tokens 0"),
        (4, 3, {}, "queue is 3"),
        (2, 8, {"max_wait": 2}, "waits for 3 batches"),
        (2, 8, {"start": "first"}, "start is 'first'"),
        (2, 8, {"request_id_T": np.zeros(3, int)}, "3 tokens"),
    ],
)
def test_what_makes_no_sense_is_refused(size, queue, given, says):
    with pytest.raises(UsageError, match=says):
        aware_batches(pack_routes(random_routes(np.random.default_rng(0), 6), 5), size, queue, **given)
