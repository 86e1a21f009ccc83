"""Timelines as Trace Event Format JSON, which Perfetto (ui.perfetto.dev) and chrome://tracing open.

One process per timeline, one lane per rank (a device: one for its processor, one for its disk, one for its copy
engine), a span per phase and layer, counters of what each node sends, and an arrow from every dispatch to the combine
of the same layer and rank. Times in the file are microseconds with three decimals:
nanoseconds. The format is the Chromium project's document "Trace Event Format".

Legend: I spans.
"""

import gzip
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.atomic import write_atomically, write_text_atomically
from placer.core.errors import UsageError
from placer.core.timeline import PHASES, Timeline

__all__ = ["chrome_trace", "write_chrome_trace"]

Event = dict[str, Any]
ITERATIONS_LANE = 0
"""Thread id of the lane that shows where iterations begin and end; rank r has the lanes r + 1, R + r + 1, ..."""
SERVERS = ("processor", "disk", "copy engine")
"""What a device has lanes for, in this order, before any further lanes."""
SERVER_OF = {"load": "disk", "copy": "copy engine"}
"""Who does a phase, where it is not the processor."""


def chrome_trace(timelines: Sequence[Timeline], names: Sequence[str]) -> dict[str, Any]:
    """The trace as a JSON object: `traceEvents` (metadata first, then by time), `displayTimeUnit`, `otherData`.

    `names` are shown as process names. Spans of 0 ns are left out, viewers cannot show them. Spans of one rank that
    overlap (a pipelined measured run) go to further lanes of that rank, so that no lane holds overlapping spans.
    Raises UsageError where there is not one name for each timeline.
    """
    if len(timelines) != len(names):
        raise UsageError(f"{len(timelines)} timelines but {len(names)} names; give one name for each")
    metadata: list[Event] = []
    events: list[tuple[int, Event]] = []
    for process, (timeline, name) in enumerate(zip(timelines, names, strict=True), start=1):
        lane_I = _lanes(timeline)
        metadata.extend(_metadata(timeline, name, process, lane_I))
        events.extend(_spans(timeline, process, lane_I))
        events.extend(_counters(timeline, process))
        events.extend(_iterations(timeline, process))
    flow = 0
    for process, timeline in enumerate(timelines, start=1):
        for pair in _flows(timeline, process, _lanes(timeline)):
            flow += 1
            events.extend((time_ns, {**event, "id": flow}) for time_ns, event in pair)
    events.sort(key=lambda item: item[0])  # stable: a span stays before an arrow that begins inside it
    return {
        "traceEvents": metadata + [event for _, event in events],
        "displayTimeUnit": "ns",
        "otherData": {name: json.dumps(t.about, sort_keys=True) for name, t in zip(names, timelines, strict=True)},
    }


def write_chrome_trace(path: Path, timelines: Sequence[Timeline], names: Sequence[str]) -> None:
    """Writes the trace, whole or not at all; gzipped where `path` ends in .gz (both viewers open that)."""
    text = json.dumps(chrome_trace(timelines, names), separators=(",", ":"))
    path = Path(path)
    if path.suffix == ".gz":
        packed = gzip.compress(text.encode(), mtime=0)
        write_atomically(path, lambda temporary: temporary.write_bytes(packed))
    else:
        write_text_atomically(path, text + "\n")


def _lanes(timeline: Timeline) -> npt.NDArray[np.int64]:
    """Thread id of each span, (I,): each goes to its rank's (and server's) first lane that is free when it starts."""
    ranks, servers = int(timeline.about["num_ranks"]), len(_servers(timeline))
    ends: dict[int, int] = {}
    lane_I = np.zeros(len(timeline.start_ns), dtype=np.int64)
    order = np.lexsort((np.arange(len(lane_I)), timeline.start_ns))
    start, duration, rank = (column.tolist() for column in (timeline.start_ns, timeline.duration_ns, timeline.rank))
    server = [SERVERS.index(SERVER_OF.get(PHASES[phase], "processor")) for phase in timeline.phase.tolist()]
    for span in order.tolist():
        copy = server[span]
        lane = rank[span] + 1 + ranks * copy
        while duration[span] and ends.get(lane, 0) > start[span]:
            copy = max(copy + 1, servers)
            lane = rank[span] + 1 + ranks * copy
        lane_I[span] = lane
        if duration[span]:
            ends[lane] = start[span] + duration[span]
    return lane_I


def _servers(timeline: Timeline) -> tuple[str, ...]:
    """What each rank has lanes for: itself, or a device's servers."""
    return SERVERS if timeline.about["mode"] == "device" else ("rank",)


def _metadata(timeline: Timeline, name: str, process: int, lane_I: npt.NDArray[np.int64]) -> Iterator[Event]:
    ranks = int(timeline.about["num_ranks"])
    per_node = int(timeline.about.get("ranks_per_node", ranks))
    shown = f"{name} ({timeline.about['source']}, {timeline.about['mode']})"
    yield _named(process, ITERATIONS_LANE, "process_name", {"name": shown})
    yield _named(process, ITERATIONS_LANE, "process_sort_index", {"sort_index": process})
    yield _named(process, ITERATIONS_LANE, "thread_name", {"name": "iterations"})
    yield _named(process, ITERATIONS_LANE, "thread_sort_index", {"sort_index": 0})
    servers = _servers(timeline)
    for lane in sorted({*range(1, ranks + 1), *lane_I.tolist()}):
        rank, copy = (lane - 1) % ranks, (lane - 1) // ranks
        title = f"rank {rank} (node {rank // per_node})"
        if len(servers) > 1:
            title = servers[copy] if copy < len(servers) else "device"
            title += f" of rank {rank}" if ranks > 1 else ""
        title += f" +{copy - len(servers) + 1}" if copy >= len(servers) else ""
        yield _named(process, lane, "thread_name", {"name": title})
        order = rank * (1 + int(lane_I.max(initial=1) - 1) // ranks) + copy + 1
        yield _named(process, lane, "thread_sort_index", {"sort_index": order})


def _named(process: int, lane: int, name: str, args: dict[str, Any]) -> Event:
    return {"ph": "M", "pid": process, "tid": lane, "name": name, "args": args}


def _spans(timeline: Timeline, process: int, lane_I: npt.NDArray[np.int64]) -> Iterator[tuple[int, Event]]:
    columns = (timeline.iteration, timeline.layer, timeline.phase, lane_I, timeline.start_ns, timeline.duration_ns)
    volumes = (timeline.tokens, timeline.sent_bytes, timeline.received_bytes)
    rows = zip(*(column.tolist() for column in columns), *(column.tolist() for column in volumes), strict=True)
    for iteration, layer, phase, lane, start, duration, tokens, sent, received in rows:
        if duration == 0:
            continue
        args = {"iteration": iteration, "layer": layer, "tokens": tokens}
        args |= {"sent_bytes": sent, "received_bytes": received}
        event = {"ph": "X", "pid": process, "tid": lane, "name": PHASES[phase], "cat": PHASES[phase]}
        yield start, {**event, "ts": _us(start), "dur": _us(duration), "args": args}


def _iterations(timeline: Timeline, process: int) -> Iterator[tuple[int, Event]]:
    """Where each iteration begins and ends; one with a span that began before the last one ended begins there."""
    length = timeline.iteration_ns().tolist()
    first = np.full(len(length), np.iinfo(np.int64).max, dtype=np.int64)
    np.minimum.at(first, timeline.iteration, timeline.start_ns)
    before = 0
    for iteration, (begin, whole) in enumerate(zip(first.tolist(), length, strict=True)):
        start = max(before, begin)
        duration = begin + whole - start
        if duration > 0:
            before = start + duration
            event = {"ph": "X", "pid": process, "tid": ITERATIONS_LANE, "name": f"iteration {iteration}"}
            yield start, {**event, "cat": "iteration", "ts": _us(start), "dur": _us(duration), "args": {}}


def _counters(timeline: Timeline, process: int) -> Iterator[tuple[int, Event]]:
    """Bytes per microsecond that each node's ranks send, as steps: a span's bytes are spread evenly over it."""
    per_node = int(timeline.about.get("ranks_per_node", timeline.about["num_ranks"]))
    sending = (timeline.sent_bytes > 0) & (timeline.duration_ns > 0)
    node_I = timeline.rank // per_node
    for node in np.unique(node_I[sending]).tolist():
        pick = sending & (node_I == node)
        start, duration = timeline.start_ns[pick], timeline.duration_ns[pick]
        rate = timeline.sent_bytes[pick] * 1e3 / duration
        edge, index = np.unique(np.concatenate((start, start + duration)), return_inverse=True)
        change = np.bincount(index.reshape(-1), weights=np.concatenate((rate, -rate)), minlength=len(edge))
        level = np.maximum(np.round(np.cumsum(change), 3), 0.0)
        event = {"ph": "C", "pid": process, "tid": ITERATIONS_LANE, "name": f"node {node} sends"}
        for time_ns, value in zip(edge.tolist(), level.tolist(), strict=True):
            yield time_ns, {**event, "ts": _us(time_ns), "args": {"bytes_per_us": value}}


def _flows(
    timeline: Timeline, process: int, lane_I: npt.NDArray[np.int64]
) -> Iterator[tuple[tuple[int, Event], tuple[int, Event]]]:
    """Arrow tail in the middle of a dispatch span, head in the middle of its combine span, where both are shown.

    The n-th combine of a rank's layer belongs to its n-th dispatch: pipeline chunks keep their order. No arrow points
    back in time: where a combine's middle is before its dispatch's, there is none.
    """
    shown = timeline.duration_ns > 0
    keys = (timeline.iteration, timeline.layer, timeline.rank)
    middle_I = timeline.start_ns + timeline.duration_ns // 2
    tails: dict[tuple[int, ...], list[int]] = {}
    for span in np.flatnonzero(shown & (timeline.phase == PHASES.index("dispatch"))).tolist():
        tails.setdefault(tuple(int(column[span]) for column in keys), []).append(span)
    for span in np.flatnonzero(shown & (timeline.phase == PHASES.index("combine"))).tolist():
        waiting = tails.get(tuple(int(column[span]) for column in keys))
        if not waiting:
            continue
        tail = waiting.pop(0)
        if middle_I[tail] > middle_I[span]:
            continue
        ends = []
        for phase, at in (("s", tail), ("f", span)):
            time_ns = int(middle_I[at])
            event = {"ph": phase, "pid": process, "tid": int(lane_I[at]), "name": "tokens", "cat": "tokens"}
            ends.append((time_ns, {**event, "ts": _us(time_ns), **({"bp": "e"} if phase == "f" else {})}))
        yield ends[0], ends[1]


def _us(time_ns: int) -> float:
    """Microseconds; a double holds nanosecond steps of a run of up to three months."""
    return time_ns / 1000
