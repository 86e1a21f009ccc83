"""Planes read ahead: what is exposed when predictions are perfect, what it costs when they are useless, by hand."""

from typing import Any

import numpy as np
import pytest
from device_sim_cases import COPIES, NESTED, device_of, plan_of, random_plan, random_work, spans_of, work_of
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.device.ladder import BitLadder
from placer.core.device.summary import summarize_device
from placer.core.device.work import DeviceWork
from placer.core.timeline import PHASES
from sim.device import simulate_device

ONE = BitLadder(bits_K=(2,))
LOAD = PHASES.index("load")


def loads_of(spans: Any) -> list[tuple[int, int, int, float, float]]:
    """(site, expert, plane, start us, end us)."""
    pick = spans["phase"] == LOAD
    names = ("site", "expert", "plane")
    columns = [*(spans[name][pick].tolist() for name in names)]
    return list(zip(*columns, *((spans[name][pick] / 1000).tolist() for name in ("start_ns", "end_ns")), strict=True))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 30), min_size=1, max_size=6),
    st.sampled_from([0.5, 8.0, 15.0, 40.0]),
    st.integers(1, 2),
)
def test_perfect_predictions_expose_layer_0_and_the_excess(tokens_L: list[int], read_us: float, repeats: int) -> None:
    """Read-ME: load(l + 1) runs beside compute(l), the next attention included; only what is longer shows."""
    counts = np.array([[[[tokens]] for tokens in tokens_L]] * repeats)
    work, device = work_of(counts, counts), device_of(read_us=read_us)
    plan = plan_of(work, ONE, buffer_bytes=3 * 2000, prefetch_layers=1)
    summary = summarize_device(simulate_device(plan, work, device))
    attention, load = device.compute.layer_ns(4), device.read_ns(2000)
    compute_L = [device.compute.item_ns(base=True, tokens=tokens) for tokens in tokens_L]
    excess = sum(max(0, load - compute - attention) for compute in compute_L[:-1])
    assert summary.wait_ns == repeats * (load + excess)
    assert summary.reads == repeats * len(tokens_L)
    if all(load <= compute + attention for compute in compute_L):
        assert summary.stalls == repeats


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_perfect_predictions_never_cost_time(seed: int, nested: bool, two_hops: bool) -> None:
    """With room for all that a site and the next one need, and planes read in the order in which they are wanted."""
    work = random_work(seed)
    work = work_of(work.count_BLEK, work.count_BLEK, int(work.tokens_B[0]))
    room = {"order": "hebf", "cache": "none", "cache_bytes": 0, "buffer_bytes": 11 * 9000}
    ladder, device = NESTED if nested else COPIES, device_of(two_hops=two_hops)
    plans = [
        random_plan(seed, work, ladder, prefetch_layers=ahead, **room, ceiling_LE=np.full((3, 5), 3))
        for ahead in (0, 1)
    ]
    without, ahead = (summarize_device(simulate_device(plan, work, device)) for plan in plans)
    assert ahead.total_ns <= without.total_ns
    assert ahead.read_bytes == without.read_bytes


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.sampled_from([1.0, 10.0, 100.0]))
def test_useless_predictions_delay_a_site_by_one_read_at_most(seed: int, nested: bool, read_us: float) -> None:
    """Experts 0 and 1 are predicted and never used: at a routing one read is in flight, and it is finished."""
    work = random_work(seed, (3, 3, 6, 3))
    counts = work.count_BLEK.copy()
    counts[:, :, :2] = 0
    predicted = np.zeros_like(counts)
    predicted[:, :, :2] = 3
    work = work_of(counts, predicted)
    ladder, device = NESTED if nested else COPIES, device_of(read_us=read_us)
    plans = [random_plan(seed, work, ladder, prefetch_layers=ahead) for ahead in (0, 1)]
    (_, without), (spans, ahead) = (spans_of(plan, work, device) for plan in plans)
    ends = [summarize_device(simulate_device(plan, work, device)).total_ns for plan in plans]
    longest = device.read_ns(max(plans[0].plane_bytes_K))
    sites = work.count_BLEK.shape[0] * work.count_BLEK.shape[1]
    assert ends[0] <= ends[1] <= ends[0] + sites * longest
    assert ahead["wasted_bytes"] == ahead["ahead_bytes"]
    assert ahead["prefetch_used"] == 0
    assert ahead["demand_reads"] == without["demand_reads"]
    assert ahead["peak_plane_bytes"] <= plans[1].memory_bytes
    if plans[0].buffer_bytes >= 5 * sum(plans[0].plane_bytes_K) and ahead["prefetched"]:
        assert len(loads_of(spans)) > without["demand_reads"]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.booleans(), st.booleans())
def test_what_is_needed_is_read_before_what_is_expected(seed: int, nested: bool, two_hops: bool) -> None:
    """Reads for the next site begin when this site's are over, and no read at all begins for any other site."""
    work = random_work(seed, predicted=True)
    plan = random_plan(seed, work, NESTED if nested else COPIES, prefetch_layers=1, buffer_bytes=60_000)
    spans, about = spans_of(plan, work, device_of(two_hops=two_hops, slowdown=1.3))
    routed = spans["phase"] == PHASES.index("attention")
    routing_S = spans["end_ns"][routed]
    pick = spans["phase"] == LOAD
    # sites of all iterations in one row; a read that ends in the next iteration began in the one before
    at_X = np.searchsorted(routing_S, spans["start_ns"][pick], side="right") - 1
    ahead_X = spans["site"][pick] != spans["site"][routed][at_X]
    assert np.array_equal(spans["site"][pick][ahead_X], spans["site"][routed][at_X[ahead_X]] + 1)
    for site in np.unique(at_X[ahead_X]).tolist():
        needed, expected = (pick_X & (at_X == site) for pick_X in (~ahead_X, ahead_X))
        assert spans["end_ns"][pick][needed].max(initial=0) <= spans["start_ns"][pick][expected].min()
    assert ahead_X.sum() <= about["prefetched"]
    assert (~ahead_X).sum() == about["demand_reads"]


def two_sites(needed: list[int], expected: list[int], first: int = 0) -> DeviceWork:
    """Four one-plane experts: site 0 uses expert `first`, site 1 `needed`, and was expected to use `expected`."""
    counts, predicted = np.zeros((2, 1, 2, 4, 1), dtype=np.int64)
    counts[0, 0, first] = 1
    counts[0, 1, needed] = 1
    # the first is expected the hottest
    predicted[0, 1, expected] = np.arange(len(expected), 0, -1)[:, None]
    return work_of(counts, predicted)


def test_what_has_not_begun_is_given_up_and_what_has_is_finished() -> None:
    """Site 0: routing at 5, read 5-17, computed 17-27; site 1 is routed at 32.

    Expected 1, 2, 3: read 17-29 and 29-41, 3 never begins. Needed 2 and 3: plane 1 was for nothing, 3 follows 2.
    """
    work = two_sites([2, 3], [1, 2, 3])
    plan = plan_of(work, ONE, prefetch_layers=1, buffer_bytes=20_000)
    spans, about = spans_of(plan, work, device_of())
    assert loads_of(spans) == [(0, 0, 0, 5, 17), (1, 1, 0, 17, 29), (1, 2, 0, 29, 41), (1, 3, 0, 41, 53)]
    assert int(spans["end_ns"].max()) == 63_000
    assert (about["prefetched"], about["prefetch_used"], about["demand_reads"]) == (3, 1, 2)
    assert (about["ahead_bytes"], about["wasted_bytes"]) == (4000, 2000)
    # two planes at a time: 0 and 1 (0 goes at 27), 1 and 2 from 29 on (1 goes at 32), 2 and 3 from 41 on
    assert about["peak_plane_bytes"] == 4000


def test_a_read_that_ends_at_the_routing_has_arrived_and_none_begins_there() -> None:
    """Attention of 2 us: the read ahead ends at 29, just when site 1 is routed; the next would begin there."""
    work = two_sites([1, 3], [1, 2])
    plan = plan_of(work, ONE, prefetch_layers=1, buffer_bytes=20_000)
    spans, about = spans_of(plan, work, device_of(layer_us=2.0, layer_token_us=0.0))
    assert loads_of(spans) == [(0, 0, 0, 2, 14), (1, 1, 0, 14, 26), (1, 3, 0, 26, 38)]
    assert (about["ahead_bytes"], about["wasted_bytes"]) == (2000, 0)


def test_room_is_left_for_a_whole_expert() -> None:
    """8000 bytes: 2000 read at site 0, 2000 kept free, so two of the three expected planes may be read ahead."""
    work = two_sites([1], [1, 2, 3])
    device = device_of(layer_us=1000.0)
    for buffer_bytes, most in ((8000, 2), (7999, 1), (4000, 0)):
        plan = plan_of(work, ONE, prefetch_layers=1, buffer_bytes=buffer_bytes)
        assert spans_of(plan, work, device)[1]["prefetched"] == most


def test_two_hops_ahead() -> None:
    """A copy takes 2 us: expert 1's, read 17-29, arrives at 31, before the routing at 32; expert 2's at 43."""
    work = two_sites([1, 2], [1, 2])
    spans, _ = spans_of(
        plan_of(work, ONE, prefetch_layers=1, buffer_bytes=20_000), work, device_of(two_hops=True, layer_us=2.0)
    )
    copies = spans["phase"] == PHASES.index("copy")
    assert (spans["start_ns"][copies] / 1000).tolist() == [15, 27, 39]
    experts = (spans["phase"] == PHASES.index("experts")) & (spans["site"] == 1)
    # routed at 30 us: expert 1 is there at 29, expert 2 at 41
    assert (spans["start_ns"][experts] / 1000).tolist() == [30, 41]


def test_a_useless_read_may_end_in_the_next_iteration_and_counts_there() -> None:
    work = two_sites([0], [1])
    counts, predicted = (np.concatenate([a, a]) for a in (work.count_BLEK, work.predicted_BLEK))
    twice = work_of(counts, predicted)
    plan = plan_of(twice, ONE, prefetch_layers=1, buffer_bytes=20_000, resident_LE=np.array([[1, 0, 0, 0]] * 2))
    spans, _ = spans_of(plan, twice, device_of(read_us=28.0))
    pick = spans["phase"] == LOAD
    # routed at 5 and 20; the iteration is over at 30 and the read, 5-35, is not; the second one's has 35 to 65 to end
    assert (spans["start_ns"][pick] / 1000).tolist() == [5]
    assert spans["iteration"][pick].tolist() == [1]
    assert int(spans["end_ns"][spans["phase"] != LOAD].max()) == 60_000


@pytest.mark.parametrize("seed", range(3))
def test_without_predictions_a_plan_that_reads_ahead_does_not(seed: int) -> None:
    work = random_work(seed)
    plans = [random_plan(seed, work, prefetch_layers=ahead) for ahead in (0, 1)]
    tables = [spans_of(plan, work, device_of(slowdown=1.3))[0] for plan in plans]
    assert all(np.array_equal(tables[0][name], tables[1][name]) for name in tables[0])


def test_useless_reads_leave_nothing_behind() -> None:
    """Of the expected 1, 2, 3 only 3 is needed: 1 has arrived and 2 is in flight, every time; neither may stay."""
    work = two_sites([3], [1, 2, 3])
    counts, predicted = (np.concatenate([a] * 5) for a in (work.count_BLEK, work.predicted_BLEK))
    work = work_of(counts, predicted)
    spans, about = spans_of(plan_of(work, ONE, prefetch_layers=1, buffer_bytes=10_000), work, device_of())
    assert [load[:2] for load in loads_of(spans)] == [(0, 0), (1, 1), (1, 2), (1, 3)] * 5
    assert about["peak_plane_bytes"] == 4000


def test_a_read_that_would_begin_at_the_routing_does_not() -> None:
    """Half as fast beside reads. Routed at 2; read 0 2-14, 1 14-26, 2 26-38; expert 0 14-34, attention 34-38."""
    work = two_sites([1, 2], [1, 2, 3])
    plan = plan_of(work, ONE, prefetch_layers=1, buffer_bytes=20_000)
    spans, _ = spans_of(plan, work, device_of(layer_us=2.0, layer_token_us=0.0, slowdown=2.0))
    assert loads_of(spans) == [(0, 0, 0, 2, 14), (1, 1, 0, 14, 26), (1, 2, 0, 26, 38)]
    assert int(spans["end_ns"].max()) == 58_000


def test_what_ends_at_the_routing_counts_as_there() -> None:
    """Expert 1's read ends at 26, when site 1 is routed: as present as expert 3, which is resident, and before it."""
    work = two_sites([1, 3], [1])
    resident_LE = np.array([[0, 0, 0, 0], [0, 0, 0, 1]])
    plan = plan_of(work, ONE, prefetch_layers=1, buffer_bytes=20_000, order="resident_first", resident_LE=resident_LE)
    for layer_us, order in ((2.0, [1, 3]), (1.9, [3, 1])):
        spans, _ = spans_of(plan, work, device_of(layer_us=layer_us, layer_token_us=0.0))
        pick = (spans["phase"] == PHASES.index("experts")) & (spans["site"] == 1)
        assert spans["expert"][pick].tolist() == order


def test_what_was_read_ahead_takes_room_from_the_order() -> None:
    """Expert 1's base plane is there, 2000 of 8000 bytes: three more base planes would leave no expert a way on."""
    counts, predicted = np.zeros((2, 1, 2, 5, 2), dtype=np.int64)
    counts[0, 0, 0, 0] = 1
    counts[0, 1, 1:, 1] = 1
    predicted[0, 1, 1, 0] = 1
    work = work_of(counts, predicted)
    plan = plan_of(work, BitLadder(bits_K=(2, 3)), prefetch_layers=1, buffer_bytes=8000)
    spans, about = spans_of(plan, work, device_of(layer_us=100.0))
    assert about["prefetch_used"] == 1
    assert about["peak_plane_bytes"] <= 8000
    assert np.count_nonzero(spans["phase"] == PHASES.index("experts")) == 5
