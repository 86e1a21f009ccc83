"""What holds for every simulation of a device, whatever the plan; audited from its spans alone."""

from collections import defaultdict
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from device_sim_cases import COPIES, NESTED, device_of, plan_of, random_plan, random_work, spans_of
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.device.buffer import fitting_order
from placer.core.device.flowshop import makespan_bound_ns, run_in_order
from placer.core.device.items import ItemTimes, layer_items, order_items
from placer.core.device.summary import summarize_device
from placer.core.timeline import PHASES
from sim.device import simulate_device

ATTENTION, EXPERTS, LOAD, COPY = (PHASES.index(name) for name in ("attention", "experts", "load", "copy"))

cases = st.builds(
    lambda seed, nested, two_hops, read_us, slowdown, prefetch: (seed, nested, two_hops, read_us, slowdown, prefetch),
    st.integers(0, 10**6),
    st.booleans(),
    st.booleans(),
    st.sampled_from([0.5, 3.0, 10.0]),
    st.sampled_from([1.0, 1.3, 2.777]),
    st.booleans(),
)


def case_of(case: Any) -> Any:
    seed, nested, two_hops, read_us, slowdown, prefetch = case
    work = random_work(seed, predicted=prefetch)
    plan = random_plan(seed, work, NESTED if nested else COPIES, prefetch_layers=int(prefetch))
    return plan, work, device_of(read_us=read_us, two_hops=two_hops, slowdown=slowdown)


def spans_at(spans: Any, *phases: int) -> list[tuple[int, ...]]:
    """(start, end, iteration, site, expert, plane, bytes, tokens) of some phases, by start."""
    names = ("start_ns", "end_ns", "iteration", "site", "expert", "plane", "bytes", "tokens")
    pick = np.isin(spans["phase"], phases)
    return sorted(zip(*(spans[name][pick].tolist() for name in names), strict=True))


@settings(max_examples=40, deadline=None)
@given(cases)
def test_servers_do_one_thing_at_a_time_and_tokens_run_once(case: Any) -> None:
    plan, work, device = case_of(case)
    spans, _ = spans_of(plan, work, device)
    for phases in ((ATTENTION, EXPERTS), (LOAD,), (COPY,)):
        for before, after in pairwise(spans_at(spans, *phases)):
            assert before[1] <= after[0]
    counts = work.clipped(plan.ceiling_LE).count_BLEK.copy()
    for _, _, iteration, site, expert, plane, _, tokens in spans_at(spans, EXPERTS):
        assert tokens > 0
        counts[iteration, site, expert, plane] -= tokens
    assert not counts.any()
    assert len(spans_at(spans, EXPERTS)) == np.count_nonzero(work.clipped(plan.ceiling_LE).count_BLEK)


@settings(max_examples=40, deadline=None)
@given(cases)
def test_planes_are_there_when_they_are_used_and_come_in_order(case: Any) -> None:
    plan, work, device = case_of(case)
    spans, about = spans_of(plan, work, device)
    present = plan.present_LEK
    last_hop = LOAD if device.to_device is None else COPY
    there: dict[tuple[int, int, int], list[int]] = defaultdict(list)
    for _, end, _, site, expert, plane, *_ in spans_at(spans, last_hop):
        assert not present[site, expert, plane], "what is resident is not read"
        there[site, expert, plane].append(end)
    lowest: dict[tuple[int, ...], int] = {}
    for start, _, iteration, site, expert, plane, _, _ in spans_at(spans, EXPERTS):
        for one in plan.ladder.planes_of(plane + 1):
            key = (site, expert, one)
            assert present[key] or (there[key] and there[key][0] <= start)
        if plan.ladder.nested:
            assert lowest.get((iteration, site, expert), -1) < plane, "planes of an expert in ascending order"
        lowest[iteration, site, expert] = plane
    loads = spans_at(spans, LOAD)
    assert all(size == plan.plane_bytes_K[plane] for *_, plane, size, _ in loads)
    assert len(loads) <= about["demand_reads"] + about["prefetched"]
    if not plan.prefetch_layers:
        assert len(loads) == about["demand_reads"]
        assert about["ahead_bytes"] == about["wasted_bytes"] == 0


@settings(max_examples=40, deadline=None)
@given(cases)
def test_memory_stays_within_the_budget(case: Any) -> None:
    plan, work, device = case_of(case)
    _, about = spans_of(plan, work, device)
    assert plan.resident_bytes <= about["peak_plane_bytes"] <= plan.memory_bytes
    assert 0 <= about["wasted_bytes"] <= about["ahead_bytes"]


@settings(max_examples=30, deadline=None)
@given(cases)
def test_peak_memory_from_the_spans_alone(case: Any) -> None:
    """Without a cache and without reading ahead a plane is in memory from its read to its expert's last item."""
    plan, work, device = case_of((*case[:5], False))
    plan = random_plan(case[0], work, plan.ladder, cache="none", cache_bytes=0)
    spans, about = spans_of(plan, work, device)
    done = {(iteration, site, expert): end for _, end, iteration, site, expert, *_ in spans_at(spans, EXPERTS)}
    changes = []
    for start, _, iteration, site, expert, _, size, _ in spans_at(spans, LOAD):
        changes += [(start, 1, size), (done[iteration, site, expert], 0, -size)]
    held = np.cumsum([change for *_, change in sorted(changes)]).max(initial=0)
    assert about["peak_plane_bytes"] == plan.resident_bytes + held
    assert held <= plan.buffer_bytes


@settings(max_examples=40, deadline=None)
@given(cases)
def test_nobody_waits_without_a_reason(case: Any) -> None:
    plan, work, device = case_of(case)
    spans, _ = spans_of(plan, work, device)
    arrivals = {end for _, end, *_ in spans_at(spans, LOAD if device.to_device is None else COPY)}
    for before, after in pairwise(spans_at(spans, ATTENTION, EXPERTS)):
        assert before[1] == after[0] or after[0] in arrivals
    events = {end for _, end, *_ in spans_at(spans, ATTENTION, EXPERTS, LOAD, COPY)}
    assert all(start in events for start, *_ in spans_at(spans, LOAD)), "a read begins when something ends"
    routings = {end for _, end, *_ in spans_at(spans, ATTENTION)}
    roomy = plan.buffer_bytes >= sum(plan.plane_bytes_K) * plan.num_experts
    for before, after in pairwise(spans_at(spans, LOAD)) if roomy and not plan.prefetch_layers else ():
        assert before[1] == after[0] or after[0] in routings


@settings(max_examples=40, deadline=None)
@given(cases)
def test_port_and_flow_agree_where_nothing_is_read_ahead(case: Any) -> None:
    plan, work, device = case_of((*case[:5], False))
    port, about_port = spans_of(plan, work, device, fidelity="port")
    flow, about_flow = spans_of(plan, work, device, fidelity="flow")
    for name, column in port.items():
        assert np.array_equal(column, flow[name]), name
    assert {**about_port, "fidelity": "flow"} == about_flow


@settings(max_examples=30, deadline=None)
@given(cases, st.sampled_from(["port", "flow"]))
def test_every_site_is_the_flow_shop_and_not_under_its_bound(case: Any, fidelity: Any) -> None:
    plan, work, device = case_of((*case[:4], 1.0, False))
    plan = random_plan(case[0], work, plan.ladder, cache="none", cache_bytes=0)
    spans, _ = spans_of(plan, work, device, fidelity=fidelity)
    clipped, resident = work.clipped(plan.ceiling_LE), plan.present_LEK
    now = 0
    for iteration, site in np.ndindex(work.count_BLEK.shape[:2]):
        now += device.compute.layer_ns(int(work.tokens_B[iteration]))
        items = layer_items(clipped.count_BLEK[iteration, site], resident[site], plan.ladder)
        times = ItemTimes.of(items, device, plan.ladder, plan.plane_bytes_K)
        order = fitting_order(items, times, order_items(items, plan.order, times), plan.buffer_bytes)
        shop = run_in_order(items.taken(order), times.taken(order), plan.buffer_bytes)
        here = (spans["iteration"] == iteration) & (spans["site"] == site)
        for phase, start, end, shown in (
            (LOAD, shop.read_start_ns_I, shop.read_end_ns_I, times.bytes_I[order] > 0),
            (EXPERTS, shop.compute_start_ns_I, shop.compute_end_ns_I, items.tokens_I[order] > 0),
        ):
            pick = here & (spans["phase"] == phase)
            assert np.array_equal(spans["start_ns"][pick], now + start[shown])
            assert np.array_equal(spans["end_ns"][pick], now + end[shown])
        assert shop.makespan_ns >= makespan_bound_ns(times)
        now += shop.makespan_ns
    assert int(spans["end_ns"].max()) == now


@settings(max_examples=30, deadline=None)
@given(cases)
def test_a_slower_processor_beside_reads_never_ends_sooner(case: Any) -> None:
    plan, work, _ = case_of((*case[:5], False))
    ends = []
    for slowdown in (1.0, 1.5, 4.0):
        spans, _ = spans_of(plan, work, device_of(read_us=case[3], two_hops=case[2], slowdown=slowdown))
        ends.append(int(spans["end_ns"].max()))
    assert ends == sorted(ends)


@settings(max_examples=30, deadline=None)
@given(cases)
def test_idle_time_is_the_sum_of_waits(case: Any) -> None:
    plan, work, device = case_of(case)
    timeline = simulate_device(plan, work, device)
    summary = summarize_device(timeline)
    busy = np.isin(timeline.phase, (ATTENTION, EXPERTS))
    end = int((timeline.start_ns + timeline.duration_ns)[busy].max())
    assert summary.total_ns == end
    assert summary.wait_ns == end - int(timeline.duration_ns[busy].sum()) >= 0
    assert (summary.wait_ns > 0) == (summary.stalls > 0)
    assert summary.tokens == int(work.tokens_B.sum())
    assert summary.read_bytes == int(timeline.received_bytes[timeline.phase == LOAD].sum())
    assert summary.copies in (0, summary.reads) or plan.prefetch_layers
    if not plan.prefetch_layers:
        assert summary.total_ns == int(timeline.iteration_ns().sum())


@pytest.mark.parametrize("fidelity", ["port", "flow"])
def test_same_inputs_same_bytes(fidelity: Any) -> None:
    work = random_work(5)
    plan = random_plan(5, work)
    texts = {simulate_device(plan, work, device_of(slowdown=1.3), fidelity=fidelity).to_json() for _ in range(2)}
    assert len(texts) == 1


def test_iterations_are_cut_and_progress_is_told() -> None:
    work = random_work(1)
    plan = plan_of(work)
    said: list[tuple[int, int]] = []
    for fidelity in ("port", "flow"):
        short = simulate_device(
            plan, work, device_of(), fidelity=fidelity, iterations=2, progress=lambda *at: said.append(at)
        )
        assert short.num_iterations == 2
        assert np.array_equal(short.iteration_ns(), simulate_device(plan, work, device_of()).iteration_ns()[:2])
    assert said == [(1, 2), (2, 2)] * 2
