"""The Chrome trace against the rules of the Trace Event Format, and against the timelines it was made from."""

import gzip
import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from report_cases import iteration_rows, one, timeline

from placer.core.errors import UsageError
from placer.core.timeline import PHASES, Timeline
from placer.report.chrome import chrome_trace, write_chrome_trace


def validate(trace: dict[str, Any]) -> None:
    """Fails where a viewer would drop, misplace or misread an event."""
    trace = json.loads(json.dumps(trace))
    assert set(trace) == {"traceEvents", "displayTimeUnit", "otherData"}
    assert trace["displayTimeUnit"] in ("ms", "ns")
    named: dict[str, set[tuple[int, int]]] = defaultdict(set)
    lanes: dict[tuple[int, int], list[dict[str, Any]]] = defaultdict(list)
    flows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    last_ts: dict[tuple[int, int], float] = {}
    for event in trace["traceEvents"]:
        assert event["ph"] in ("M", "X", "C", "s", "f")
        assert isinstance(event["pid"], int)
        assert isinstance(event["tid"], int)
        assert isinstance(event["name"], str)
        lane = event["pid"], event["tid"]
        if event["ph"] == "M":
            named[event["name"]].add(lane)
            assert set(event["args"]) == {"name" if event["name"].endswith("_name") else "sort_index"}
            continue
        assert isinstance(event["ts"], int | float)
        assert event["ts"] >= 0
        assert event["ts"] >= last_ts.get(lane, 0)
        assert abs(event["ts"] * 1000 - round(event["ts"] * 1000)) < 1e-3, "whole nanoseconds"
        last_ts[lane] = event["ts"]
        if event["ph"] == "X":
            assert event["dur"] > 0
            assert isinstance(event["args"], dict)
            assert isinstance(event["cat"], str)
            lanes[lane].append(event)
        elif event["ph"] == "C":
            assert event["args"]
            assert all(isinstance(value, int | float) and value >= 0 for value in event["args"].values())
        else:
            flows[event["id"]].append(event)
    assert named["thread_name"] >= set(lanes)
    assert named["thread_sort_index"] == named["thread_name"]
    assert {pid for pid, _ in named["process_name"]} == {pid for pid, _ in named["thread_name"]}
    for events in lanes.values():
        for before, after in pairwise(events):
            assert round(1000 * (before["ts"] + before["dur"])) <= round(1000 * after["ts"])
    for start, finish in flows.values():
        assert (start["ph"], finish["ph"], finish["bp"]) == ("s", "f", "e")
        assert "bp" not in start
        assert (start["cat"], start["name"], start["pid"]) == (finish["cat"], finish["name"], finish["pid"])
        assert start["ts"] <= finish["ts"]
        holders = []
        for end in (start, finish):
            # whole nanoseconds: 0.101 us + 0.001 us is more than 0.102 us in floats
            at = round(1000 * end["ts"])
            lane = lanes[end["pid"], end["tid"]]
            around = [e for e in lane if round(1000 * e["ts"]) <= at < round(1000 * (e["ts"] + e["dur"]))]
            assert len(around) == 1, "an arrow's end lies in exactly one span"
            assert trace["traceEvents"].index(around[0]) < trace["traceEvents"].index(end), "which is already open"
            holders.append(around[0])
        assert [holder["name"] for holder in holders] == ["dispatch", "combine"]
        assert holders[0]["args"]["layer"] == holders[1]["args"]["layer"]
        assert holders[0]["args"]["iteration"] == holders[1]["args"]["iteration"]


def events(trace: dict[str, Any], phase: str, **match: object) -> list[dict[str, Any]]:
    return [e for e in trace["traceEvents"] if e["ph"] == phase and all(e[key] == match[key] for key in match)]


def test_by_hand() -> None:
    trace = chrome_trace([one()], ["linear"])
    validate(trace)
    names = {event["tid"]: event["args"]["name"] for event in events(trace, "M", name="thread_name")}
    assert names == {0: "iterations", 1: "rank 0 (node 0)", 2: "rank 1 (node 1)"}
    assert events(trace, "M", name="process_name")[0]["args"] == {"name": "linear (simulated, per_rank)"}
    drawn = {(e["tid"], e["name"]): (e["ts"], e["dur"]) for e in events(trace, "X")}
    assert drawn == {
        (0, "iteration 0"): (0.0, 6.0),
        (1, "dispatch"): (0.0, 1.0),
        (2, "dispatch"): (0.0, 1.0),
        (1, "combine"): (1.0, 5.0),
        (2, "experts"): (1.0, 4.0),
        (2, "combine"): (5.0, 1.0),
    }
    args = events(trace, "X", tid=2, name="experts")[0]["args"]
    assert args == {"iteration": 0, "layer": 0, "tokens": 2, "sent_bytes": 0, "received_bytes": 0}
    steps = [(e["name"], e["ts"], e["args"]["bytes_per_us"]) for e in events(trace, "C")]
    assert sorted(steps) == [
        ("node 0 sends", 0.0, 1000.0),
        ("node 0 sends", 1.0, 0.0),
        ("node 1 sends", 5.0, 1000.0),
        ("node 1 sends", 6.0, 0.0),
    ]
    arrows = [(e["tid"], e["ph"], e["ts"]) for e in trace["traceEvents"] if e["ph"] in "sf"]
    assert sorted(arrows) == [(1, "f", 3.5), (1, "s", 0.5), (2, "f", 5.5), (2, "s", 0.5)]


@st.composite
def timelines(draw: st.DrawFn) -> Timeline:
    """Random spans, overlaps and spans of 0 ns among them, as a pipelined measured run may have."""
    rows = []
    for iteration in range(draw(st.integers(1, 2))):
        for layer in range(draw(st.integers(1, 2))):
            for rank in range(2):
                at = draw(st.integers(0, 40)) + 1000 * iteration + 100 * layer
                for phase in ("dispatch", "experts", "combine"):
                    duration, back = draw(st.integers(0, 30)), draw(st.integers(0, 12))
                    sent = draw(st.integers(0, 5)) * (phase != "experts")
                    rows.append((iteration, layer, phase, rank, max(0, at - back), duration, sent, sent, 1))
                    at += duration
    rows.sort(key=lambda row: (row[0], row[4], row[3]))
    return timeline(rows, num_ranks=2, ranks_per_node=draw(st.integers(1, 2)), source="measured")


@settings(max_examples=60, deadline=None)
@given(first=timelines(), second=timelines())
def test_any_timeline_gives_a_valid_trace(first: Timeline, second: Timeline) -> None:
    trace = chrome_trace([first, second], ["first", "second"])
    validate(trace)
    for process, source in ((1, first), (2, second)):
        spans = [e for e in events(trace, "X", pid=process) if e["cat"] != "iteration"]
        assert len(spans) == (source.duration_ns > 0).sum()
        for phase in PHASES:
            mine = source.phase == PHASES.index(phase)
            drawn_ns = sum(round(e["dur"] * 1000) for e in spans if e["name"] == phase)
            assert drawn_ns == source.duration_ns[mine].sum()
        rank_of_span = sorted((round(e["ts"] * 1000), (e["tid"] - 1) % 2) for e in spans)
        shown = source.duration_ns > 0
        assert rank_of_span == sorted(zip(source.start_ns[shown].tolist(), source.rank[shown].tolist(), strict=True))


@settings(max_examples=40, deadline=None)
@given(source=timelines())
def test_the_area_under_the_counters_is_the_bytes_sent(source: Timeline) -> None:
    trace = chrome_trace([source], ["x"])
    area = 0.0
    for name in {e["name"] for e in events(trace, "C")}:
        steps = events(trace, "C", name=name)
        area += sum(a["args"]["bytes_per_us"] * (b["ts"] - a["ts"]) for a, b in pairwise(steps))
        assert steps[-1]["args"]["bytes_per_us"] == 0
    moved = source.sent_bytes[source.duration_ns > 0].sum()
    assert area == pytest.approx(moved, abs=1e-2)


def test_simulated_run_is_valid_and_deterministic(tmp_path: Path) -> None:
    from placer.core.cluster import ClusterSpec, Compute, LinkClass
    from placer.core.model import ModelSpec
    from placer.core.plan import Plan
    from sim import simulate

    link = LinkClass(gbytes_per_s=10.0, alpha_us=1.0)
    compute = Compute(tflops=1.0, weight_read_gbytes_per_s=100.0, launch_us=1.0)
    cluster = ClusterSpec(
        name="2x2", nodes=2, ranks_per_node=2, memory_gib=1, intra=link, inter=link, uplink=link, compute=compute
    )
    shape = {"num_experts": 8, "top_k": 2, "num_hidden_layers": 3, "hidden_size": 64, "moe_intermediate_size": 64}
    model = ModelSpec.uniform("m", attention_params=1000, **shape)
    slots = np.tile(np.arange(8), (3, 1))
    plan = Plan(
        model="m",
        num_experts=8,
        num_ranks=4,
        ranks_per_node=2,
        moe_layers=(0, 1, 2),
        slot_expert_LP=slots,
        mode="coherent",
    )
    rng = np.random.default_rng(0)
    routed = np.argsort(rng.random((3, 50, 8)), axis=2)[:, :, :2].astype(np.uint8)
    inputs = (plan, model, cluster, routed, rng.integers(0, 4, 50))
    runs = [simulate(*inputs, fidelity=fidelity, batch_tokens=20) for fidelity in ("port", "phase")]
    trace = chrome_trace(runs, ["port", "phase"])
    validate(trace)
    assert len(events(trace, "M", name="thread_name")) == 2 * 5
    for name in ("trace.json", "trace.json.gz"):
        write_chrome_trace(tmp_path / name, runs, ["port", "phase"])
    text = (tmp_path / "trace.json").read_text()
    assert json.loads(text) == json.loads(json.dumps(trace))
    packed = (tmp_path / "trace.json.gz").read_bytes()
    assert json.loads(gzip.decompress(packed)) == json.loads(text)
    write_chrome_trace(tmp_path / "again.json.gz", runs, ["port", "phase"])
    assert (tmp_path / "again.json.gz").read_bytes() == packed


def test_overlapping_spans_get_a_second_lane() -> None:
    rows = [(0, 0, "dispatch", 0, 0, 100, 5, 5, 1), (0, 0, "experts", 0, 50, 100, 0, 0, 1)]
    trace = chrome_trace([timeline(rows, num_ranks=1)], ["x"])
    validate(trace)
    lanes = {e["name"]: e["tid"] for e in events(trace, "X") if e["cat"] != "iteration"}
    assert lanes == {"dispatch": 1, "experts": 2}
    names = {event["tid"]: event["args"]["name"] for event in events(trace, "M", name="thread_name")}
    assert names[2] == "rank 0 (node 0) +1"


def test_iterations_are_drawn_end_to_end() -> None:
    trace = chrome_trace([timeline(iteration_rows(0, 0) + iteration_rows(1, 6000, 2))], ["x"])
    validate(trace)
    lane = [(e["name"], e["ts"], e["dur"]) for e in events(trace, "X", tid=0)]
    assert lane == [("iteration 0", 0.0, 6.0), ("iteration 1", 6.0, 12.0)]


def test_needs_one_name_for_each() -> None:
    with pytest.raises(UsageError, match="1 timelines but 2 names"):
        chrome_trace([one()], ["a", "b"])


def test_a_device_has_lanes_for_processor_disk_and_copy_engine() -> None:
    rows = [
        (0, 0, "attention", 0, 0, 100, 0, 0, 4),
        (0, 0, "load", 0, 100, 200, 0, 2000, 0),
        (0, 0, "load", 0, 300, 200, 0, 1000, 0),
        (0, 0, "copy", 0, 300, 50, 0, 2000, 0),
        (0, 0, "experts", 0, 350, 400, 0, 0, 3),
    ]
    trace = chrome_trace([timeline(rows, num_ranks=1, mode="device")], ["plan"])
    validate(trace)
    names = {event["tid"]: event["args"]["name"] for event in events(trace, "M", name="thread_name")}
    assert names == {0: "iterations", 1: "processor", 2: "disk", 3: "copy engine"}
    lanes = {(e["name"], e["tid"]) for e in events(trace, "X") if e["cat"] != "iteration"}
    assert lanes == {("attention", 1), ("load", 2), ("copy", 3), ("experts", 1)}
    (first, _) = events(trace, "X", tid=2)
    assert first["args"]["received_bytes"] == 2000


def test_overlapping_spans_of_a_device_go_to_a_further_lane() -> None:
    rows = [
        (0, 0, "load", 0, 0, 100, 0, 9, 0),
        (0, 0, "experts", 0, 0, 50, 0, 0, 1),
        (0, 0, "load", 0, 50, 60, 0, 9, 0),
    ]
    trace = chrome_trace([timeline(rows, num_ranks=1, mode="device")], ["plan"])
    validate(trace)
    names = {event["tid"]: event["args"]["name"] for event in events(trace, "M", name="thread_name")}
    assert names == {0: "iterations", 1: "processor", 2: "disk", 4: "device +1"}
    assert [e["tid"] for e in events(trace, "X", name="load")] == [2, 4]


def test_a_read_that_ends_in_the_next_iteration_is_no_overlap_of_iterations() -> None:
    rows = [
        (0, 0, "experts", 0, 0, 100, 0, 0, 1),
        (1, 0, "load", 0, 80, 50, 0, 9, 0),
        (1, 0, "experts", 0, 100, 70, 0, 0, 1),
    ]
    trace = chrome_trace([timeline(rows, num_ranks=1, mode="device")], ["plan"])
    validate(trace)
    assert [(e["ts"], e["dur"]) for e in events(trace, "X", tid=0)] == [(0.0, 0.1), (0.1, 0.07)]


@pytest.mark.parametrize("ahead", [0, 1])
def test_a_simulated_device_is_a_valid_trace(ahead: int) -> None:
    from placer.core.cluster import LinkClass
    from placer.core.device.ladder import LADDERS
    from placer.core.device.plan import DevicePlan
    from placer.core.device.spec import DeviceCompute, DeviceSpec
    from placer.core.device.work import DeviceWork
    from sim.device import simulate_device

    rng = np.random.default_rng(0)
    count_BLEK, predicted_BLEK = rng.integers(0, 3, (2, 4, 3, 6, 3))
    work = DeviceWork(tokens_B=np.full(4, 8), count_BLEK=count_BLEK, predicted_BLEK=predicted_BLEK)
    plan = DevicePlan(
        model="m",
        num_hidden_layers=3,
        moe_layers=(0, 1, 2),
        num_experts=6,
        ladder=LADDERS["v1"],
        plane_bytes_K=(2000, 1000, 1000),
        resident_LE=rng.integers(0, 4, (3, 6)),
        ceiling_LE=np.full((3, 6), 3),
        buffer_bytes=48_000,
        memory_bytes=2**20,
        prefetch_layers=ahead,
    )
    compute = DeviceCompute(layer_us=5.0, base_us=6.0, residual_us=2.0, ffn_tokens=(1, 8), ffn_us=(4.0, 9.0))
    link = LinkClass(gbytes_per_s=1.0, alpha_us=5.0)
    device = DeviceSpec(name="d", memory_mib=1, disk=link, compute=compute, to_device=link)
    run = simulate_device(plan, work, device)
    trace = chrome_trace([run], ["plan"])
    validate(trace)
    names = {event["tid"]: event["args"]["name"] for event in events(trace, "M", name="thread_name")}
    assert names == {0: "iterations", 1: "processor", 2: "disk", 3: "copy engine"}
    assert len(events(trace, "X", name="load")) == np.count_nonzero(run.phase == PHASES.index("load")) > 0
