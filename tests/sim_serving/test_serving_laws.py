"""Laws of the serving loop on random workloads: nothing is lost, nothing overflows, nobody idles who could work."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from serving_cases import FormulaPricer, barrier, pool, run, workload

from placer.core.cluster import LinkClass
from sim.serving import HandoffSpec, Limits, PoolSpec, Served, Slo, Workload, least_loaded, report, round_robin
from sim.serving.batcher import Piece, RankQueue
from sim.serving.requests import Request

HANDOFF = HandoffSpec(link=LinkClass(gbytes_per_s=1.0, alpha_us=0.1), kv_bytes_per_token=50)


@st.composite
def workloads(draw: st.DrawFn) -> Workload:
    row = st.tuples(st.integers(0, 3000), st.integers(1, 30), st.integers(1, 12))
    return workload(*sorted(draw(st.lists(row, min_size=1, max_size=25))))


@st.composite
def limits(draw: st.DrawFn) -> Limits:
    return Limits(
        tokens_per_rank=draw(st.integers(1, 20)),
        requests_per_rank=draw(st.integers(1, 6)),
        block_tokens=draw(st.sampled_from([1, 4])),
        blocks_per_rank=draw(st.sampled_from([5, 12, 42, 200])),
        horizon_s=draw(st.sampled_from([1.0, 4e-6])),
    )


def deployment(limits: Limits, ranks: int, apart: bool) -> tuple[tuple[PoolSpec, ...], HandoffSpec | None]:
    mixed = pool(ranks, barrier(10, 3), limits, policy=least_loaded())
    if not apart:
        return (mixed,), None
    return (pool(2, barrier(5, 1), limits, policy=round_robin()), mixed), HANDOFF


def served(work: Workload, limits: Limits, ranks: int, apart: bool) -> Served:
    pools, handoff = deployment(limits, ranks, apart)
    return run(work, *pools, handoff=handoff)


@given(workloads(), limits(), st.integers(1, 3), st.booleans())
@settings(max_examples=150, deadline=None)
def test_requests_tokens_and_blocks_are_conserved(work: Workload, limits: Limits, ranks: int, apart: bool) -> None:
    done = served(work, limits, ranks, apart)
    told = report(done, Slo())["requests"]
    came = int((work.arrival_ns_Q <= limits.horizon_ns).sum())
    assert told["arrived"] == came
    left = told["running"] + told["waiting"] + told["in_transfer"]
    assert told["arrived"] == told["finished"] + told["refused"] + left
    assert left == done.in_system.value
    if done.stopped_by == "done":
        assert left == 0
    for request in done.finished:
        assert request.generated == request.output_length
        assert request.arrival_ns <= request.started_ns < request.first_ns <= request.finish_ns <= done.end_ns
    for request in done.refused:
        assert request.generated == 0
        assert limits.blocks(request.input_length + request.output_length - 1) > limits.blocks_per_rank
    # every scheduled token was needed: prompt, all generated but the last, and what was dropped
    if done.stopped_by == "done":
        scheduled = sum(sum(one.log.tokens) for one in done.pools)
        needed = sum(r.input_length + r.output_length - 1 + r.recomputed for r in done.finished)
        assert scheduled == needed
        for one in done.pools:
            assert all(queue.free_blocks == limits.blocks_per_rank for queue in one.queues)
            assert one.peak_blocks <= limits.blocks_per_rank


@given(workloads(), limits(), st.integers(1, 3), st.booleans())
@settings(max_examples=60, deadline=None)
def test_iterations_follow_each_other_within_the_budgets(
    work: Workload, limits: Limits, ranks: int, apart: bool
) -> None:
    done = served(work, limits, ranks, apart)
    for one in done.pools:
        ends = [start + duration for start, duration in zip(one.log.start_ns, one.log.duration_ns, strict=True)]
        assert all(end <= start for end, start in zip(ends, one.log.start_ns[1:], strict=False))
        assert isinstance(one.pricer, FormulaPricer)
        for batch in one.pricer.batches:
            assert np.bincount(batch.source_I).max() <= limits.tokens_per_rank


@given(workloads(), limits(), st.integers(1, 3), st.booleans())
@settings(max_examples=40, deadline=None)
def test_same_workload_same_bytes(work: Workload, limits: Limits, ranks: int, apart: bool) -> None:
    assert report(served(work, limits, ranks, apart), Slo()) == report(served(work, limits, ranks, apart), Slo())


@given(workloads(), st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_a_pool_idles_only_when_it_has_no_requests(work: Workload, ranks: int) -> None:
    """Work conserving: iterations fill the time in which anybody is in the system."""
    done = served(work, Limits(tokens_per_rank=7), ranks, apart=False)
    present = sorted(
        [(request.arrival_ns, 1) for request in done.requests] + [(request.finish_ns, -1) for request in done.requests]
    )
    inside = busy = since = 0
    for time, change in present:
        busy += (time - since) if inside else 0
        since, inside = time, inside + change
    assert sum(done.pools[0].log.duration_ns) == busy


@given(st.data(), limits())
@settings(max_examples=100, deadline=None)
def test_a_rank_leaves_nothing_undone_that_its_limits_allow(data: st.DataObject, limits: Limits) -> None:
    """After scheduling: no budget, nobody waiting, no seat, an eviction, or no block for the first who waits."""
    queue = RankQueue(0, limits)
    for number in range(data.draw(st.integers(1, 8))):
        request = Request(number, 0, data.draw(st.integers(1, 30)), data.draw(st.integers(1, 8)))
        if queue.fits(request):
            queue.add(request)
    for _ in range(200):
        before = sum(request.preemptions for request in [*queue.waiting, *queue.running])
        pieces = queue.schedule(0)
        everybody = [*queue.waiting, *queue.running]
        assert bool(pieces) == bool(everybody), "somebody can always go on"
        used = sum(piece.tokens for piece in pieces)
        held = sum(request.blocks for request in everybody)
        assert held + queue.free_blocks == limits.blocks_per_rank
        assert all(limits.blocks(p.first + p.tokens) <= p.request.blocks for p in pieces)
        evicted = sum(request.preemptions for request in everybody) > before
        if queue.waiting and used < limits.tokens_per_rank and not evicted:
            first = queue.waiting[0]
            count = min(first.length, limits.tokens_per_rank - used)
            full = len(queue.running) == limits.requests_per_rank
            assert full or limits.blocks(count) > queue.free_blocks
        _advance(queue, pieces)
    assert not queue.waiting
    assert not queue.running


def _advance(queue: RankQueue, pieces: list[Piece]) -> None:
    for request, first, tokens in pieces:
        request.computed = first + tokens
        if request.computed == request.length:
            request.generated += 1
            if request.finished:
                queue.leave(request)


def test_the_youngest_is_evicted_and_computed_again() -> None:
    """Two requests of 4 tokens on 3 blocks of 4: both prompts fit, the first to grow takes the second's block."""
    limits = Limits(block_tokens=4, blocks_per_rank=3, tokens_per_rank=100)
    done = run(workload((0, 4, 3), (0, 4, 3)), pool(1, lambda batch: 10, limits))
    first, second = done.requests
    assert (first.preemptions, second.preemptions) == (0, 1)
    # the prompts; the first alone twice, as the second is evicted; the second from its 5 tokens on; one more
    assert [len(batch.row_I) for batch in done.pools[0].pricer.batches] == [8, 1, 1, 5, 1]
    assert (first.finish_ns, second.first_ns, second.finish_ns) == (30, 10, 50)
    assert second.recomputed == 4


def test_keys_and_values_travel_before_the_decode_pool_goes_on() -> None:
    """8 prompt tokens at 1 ns and 5 ns fixed; 8 x 50 bytes at 1 byte a ns and 100 ns; then one token at 13 ns."""
    pools, handoff = deployment(Limits(), 1, apart=True)
    done = run(workload((0, 8, 2)), *pools, handoff=handoff)
    assert done.handoff is not None
    assert done.requests[0].first_ns == 13
    assert done.requests[0].finish_ns == 13 + 100 + 400 + 13
    assert (done.handoff.transfers, done.handoff.sent_bytes) == (1, 400)


def test_one_sender_sends_one_request_at_a_time() -> None:
    pools, handoff = deployment(Limits(tokens_per_rank=16), 2, apart=True)
    prefill = pool(1, barrier(0, 1), Limits(tokens_per_rank=16))
    done = run(workload((0, 8, 2), (0, 8, 2)), prefill, pools[1], handoff=handoff)
    assert [request.finish_ns for request in done.requests] == [16 + 500 + 13, 16 + 1000 + 13]


def test_one_receiver_receives_one_request_at_a_time() -> None:
    pools, handoff = deployment(Limits(), 1, apart=True)
    prefill = pool(2, barrier(0, 1), Limits())
    done = run(workload((0, 8, 2), (0, 8, 2)), prefill, pools[1], handoff=handoff)
    assert [request.finish_ns for request in done.requests] == [8 + 500 + 13, 8 + 1000 + 13]
