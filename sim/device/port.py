"""Fidelity `port`: every site is a flow shop that begins at its routing; exact where nothing is read ahead.

Legend: B iterations, I items of a site in the order in which they run.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.device.plan import DevicePlan
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import DeviceWork
from sim.device.rows import ATTENTION, COPY, EXPERTS, LOAD, Rows
from sim.device.sites import Sites, SiteTask
from sim.device.speed import Speed

__all__ = ["SiteSpans", "port_rows", "site_spans"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SiteSpans:
    """Nanoseconds since the routing, (I,) each; reads and copies are 0 where the plane is there."""

    read_start_ns_I: IntArray
    read_end_ns_I: IntArray
    copy_start_ns_I: IntArray
    copy_end_ns_I: IntArray
    compute_start_ns_I: IntArray
    compute_end_ns_I: IntArray


def port_rows(
    plan: DevicePlan,
    work: DeviceWork,
    device: DeviceSpec,
    sites: Sites,
    progress: Callable[[int, int], None] | None = None,
) -> Rows:
    """The spans of all iterations of clipped work. Cost O(B L I) where buffers are large and reads do not slow."""
    rows = Rows()
    speed = Speed.of(device)
    now = 0
    for iteration in range(work.num_iterations):
        tokens = int(work.tokens_B[iteration])
        layer_ns = device.compute.layer_ns(tokens)
        for site in range(work.count_BLEK.shape[1]):
            rows.add(iteration, site, ATTENTION, now, now + layer_ns, 0, tokens, -1, -1)
            now += layer_ns
            task = sites.route(now, site, work.count_BLEK[iteration, site])
            spans = site_spans(task, plan.buffer_bytes, speed)
            _add_rows(rows, iteration, now, task, spans, copies=device.to_device is not None)
            missing_I = task.times.bytes_I > 0
            sites.over(task, np.where(missing_I, now + spans.read_start_ns_I, -1), now + spans.compute_end_ns_I)
            now += int(spans.compute_end_ns_I.max(initial=0))
        if progress is not None:
            progress(iteration + 1, work.num_iterations)
    return rows


def site_spans(task: SiteTask, buffer_bytes: int, speed: Speed) -> SiteSpans:
    """When each item is read, copied and computed. Equals `run_in_order` where reads do not slow the processor."""
    if speed.even and int(task.times.bytes_I.sum()) <= buffer_bytes:
        return _unlimited(task)
    return _limited(task, buffer_bytes, speed)


def _unlimited(task: SiteTask) -> SiteSpans:
    """Reads follow one another; a copy, or an item, begins when the one before and the stage before are over."""
    missing_I, times = task.times.bytes_I > 0, task.times
    none_I = np.zeros(len(missing_I), dtype=np.int64)
    read_end_X = np.cumsum(times.read_ns_I[missing_I])
    copy_end_X = _in_turn(read_end_X, times.copy_ns_I[missing_I])
    ready_I = none_I.copy()
    ready_I[missing_I] = copy_end_X
    end_I = _in_turn(ready_I, times.compute_ns_I)
    columns = {
        "read_start_ns_I": read_end_X - times.read_ns_I[missing_I],
        "read_end_ns_I": read_end_X,
        "copy_start_ns_I": copy_end_X - times.copy_ns_I[missing_I],
        "copy_end_ns_I": copy_end_X,
    }
    whole = {}
    for name, column_X in columns.items():
        whole[name] = none_I.copy()
        whole[name][missing_I] = column_X
    return SiteSpans(**whole, compute_start_ns_I=end_I - times.compute_ns_I, compute_end_ns_I=end_I)


def _in_turn(ready_X: IntArray, work_ns_X: IntArray) -> IntArray:
    """Ends on a machine that takes works in turn, each when it is ready and the one before is over."""
    done_X = np.cumsum(work_ns_X)
    return done_X + np.maximum.accumulate(ready_X - (done_X - work_ns_X)) if len(done_X) else done_X


def _limited(task: SiteTask, buffer_bytes: int, speed: Speed) -> SiteSpans:
    """The same where reads wait for room, or slow the processor: reads begin as soon as experts that are done allow.

    While an item is computed nothing gives room, so the disk is busy up to some instant and idle from then on.
    """
    times, count = task.times, len(task.items)
    bytes_I, read_I, copy_I = times.bytes_I.tolist(), times.read_ns_I.tolist(), times.copy_ns_I.tolist()
    compute_I, expert_I, done_I = times.compute_ns_I.tolist(), task.items.expert_I.tolist(), task.done_I.tolist()
    columns = [[0] * count for _ in range(6)]
    read_start_I, read_end_I, copy_start_I, copy_end_I, start_I, end_I = columns
    waiting = deque(item for item in range(count) if bytes_I[item])
    free, disk, copier, processor = buffer_bytes, 0, 0, 0
    held: dict[int, int] = {}
    given = True
    for item in range(count):
        if given:
            # room was given at `processor` (at the start: the routing), the disk may have stood still until then
            stood_still = bool(waiting) and bytes_I[waiting[0]] <= free
            disk = max(disk, processor) if stood_still else disk
            while waiting and bytes_I[waiting[0]] <= free:
                loaded = waiting.popleft()
                free -= bytes_I[loaded]
                held[expert_I[loaded]] = held.get(expert_I[loaded], 0) + bytes_I[loaded]
                read_start_I[loaded], read_end_I[loaded] = disk, disk + read_I[loaded]
                disk = read_end_I[loaded]
                copy_start_I[loaded] = max(copier, disk)
                copy_end_I[loaded] = copier = copy_start_I[loaded] + copy_I[loaded]
            given = False
        assert not waiting or waiting[0] > item, "the order fits the buffer"
        start_I[item] = start = max(processor, copy_end_I[item])
        end_I[item] = processor = start + speed.stretched_ns(compute_I[item], max(0, disk - start))
        if done_I[item] == item and (size := held.pop(expert_I[item], 0)):
            free += size
            given = True
    names = ("read_start", "read_end", "copy_start", "copy_end", "compute_start", "compute_end")
    arrays = {f"{name}_ns_I": np.array(column, dtype=np.int64) for name, column in zip(names, columns, strict=True)}
    return SiteSpans(**arrays)


def _add_rows(rows: Rows, iteration: int, now: int, task: SiteTask, spans: SiteSpans, *, copies: bool) -> None:
    items = task.items
    missing_I, run_I = task.times.bytes_I > 0, items.tokens_I > 0
    stages = [(LOAD, spans.read_start_ns_I, spans.read_end_ns_I)]
    if copies:
        stages.append((COPY, spans.copy_start_ns_I, spans.copy_end_ns_I))
    for phase, start_I, end_I in stages:
        plane = items.expert_I[missing_I], items.plane_I[missing_I]
        sizes = task.times.bytes_I[missing_I]
        rows.add_many(iteration, task.site, phase, now + start_I[missing_I], now + end_I[missing_I], sizes, 0, *plane)
    span = now + spans.compute_start_ns_I[run_I], now + spans.compute_end_ns_I[run_I]
    plane = items.expert_I[run_I], items.plane_I[run_I]
    rows.add_many(iteration, task.site, EXPERTS, *span, 0, items.tokens_I[run_I], *plane)
