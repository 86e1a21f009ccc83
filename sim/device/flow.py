"""Fidelity `flow`: disk, copy engine and processor as processes of their own; planes may be read ahead.

At one instant, reads and copies that end come first, then the processor, then the disk begins: a plane whose read ends
at the routing has arrived, and one whose read would begin there has not begun. Legend: I items of a site.
"""

from collections import deque
from collections.abc import Callable, Generator
from typing import Any

import numpy as np
import simpy

from placer.core.device.plan import DevicePlan
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import DeviceWork
from sim.device.rows import ATTENTION, COPY, EXPERTS, LOAD, Rows
from sim.device.sites import ExpertPlane, Sites, SiteTask
from sim.device.speed import Speed

__all__ = ["FlowMachine", "flow_rows"]

Events = Generator[Any, Any, None]
FIRST, LAST = 0, 2
"""Before, and after, everything else that happens at an instant (SimPy's own events have 1)."""


def flow_rows(
    plan: DevicePlan,
    work: DeviceWork,
    device: DeviceSpec,
    sites: Sites,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Rows, int]:
    """The spans of all iterations of clipped work, and the bytes read ahead. Some six events for an item."""
    machine = FlowMachine(plan, work, device, sites, progress)
    return machine.run(), machine.ahead_bytes


class _Moment(simpy.Event):
    """An event so many nanoseconds from now, FIRST or LAST at its instant."""

    def __init__(self, env: simpy.Environment, delay_ns: int, priority: int) -> None:
        super().__init__(env)
        self._ok, self._value = True, None
        env.schedule(self, priority, delay_ns)


class _Load:
    """One plane on its way: `start_ns` is when its read began (-1: not yet), `there` triggers when it has arrived."""

    __slots__ = ("ahead", "plane", "site", "size", "start_ns", "there", "unwanted")

    def __init__(self, env: simpy.Environment, site: int, plane: ExpertPlane, size: int, *, ahead: bool) -> None:
        self.site, self.plane, self.size, self.ahead = site, plane, size, ahead
        self.start_ns = -1
        self.unwanted = False
        self.there = env.event()


class FlowMachine:
    """The three servers and what they share. `ahead_bytes` are the bytes of the reads ahead that were begun."""

    def __init__(
        self,
        plan: DevicePlan,
        work: DeviceWork,
        device: DeviceSpec,
        sites: Sites,
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        self._plan, self._work, self._device, self._sites, self._progress = plan, work, device, sites, progress
        self._rows = Rows()
        self._speed = Speed.of(device)
        self._read_K = [device.read_ns(size) for size in plan.plane_bytes_K]
        self._copy_K = [device.copy_ns(size) for size in plan.plane_bytes_K]
        self.ahead_bytes = 0
        env = self._env = simpy.Environment()
        # a container of nothing is not allowed; nothing is read where the buffer has no bytes
        self._room = simpy.Container(env, capacity=max(1, plan.buffer_bytes), init=max(1, plan.buffer_bytes))
        self._needed: deque[_Load] = deque()
        self._expected: deque[_Load] = deque()
        self._begun: list[_Load] = []
        self._to_copy = None if device.to_device is None else simpy.Store(env)
        self._asked = env.event()
        self._iteration = 0
        self._reading = False
        self._disk_changed = env.event()

    def run(self) -> Rows:
        """Runs until the processor is done with the last iteration."""
        self._env.process(self._disk())
        if self._to_copy is not None:
            self._env.process(self._copier(self._to_copy))
        self._env.run(until=self._env.process(self._processor()))
        return self._rows

    # The disk and the copy engine

    def _disk(self) -> Events:
        """Reads what is needed before what is expected, one plane after another."""
        while True:
            yield _Moment(self._env, 0, LAST)
            queue = self._needed or self._expected
            if not queue:
                self._asked = self._env.event()
                yield self._asked
                continue
            load = queue.popleft()
            yield self._room.get(load.size)
            load.start_ns = self._env.now
            if load.ahead:
                self._begun.append(load)
                self.ahead_bytes += load.size
                self._sites.memory.note(load.start_ns, load.size)
            self._set_reading(True)
            yield _Moment(self._env, self._read_K[load.plane[1]], FIRST)
            self._set_reading(False)
            self._span(LOAD, load, load.start_ns)
            if load.unwanted:
                self._drop(load)
            elif self._to_copy is None:
                load.there.succeed()
            else:
                self._to_copy.put(load)

    def _copier(self, to_copy: simpy.Store) -> Events:
        while True:
            load = yield to_copy.get()
            start = self._env.now
            yield _Moment(self._env, self._copy_K[load.plane[1]], FIRST)
            self._span(COPY, load, start)
            if load.unwanted:
                self._drop(load)
            else:
                load.there.succeed()

    def _span(self, phase: int, load: _Load, start: int) -> None:
        self._rows.add(self._iteration, load.site, phase, start, self._env.now, load.size, 0, *load.plane)

    def _drop(self, load: _Load) -> None:
        self._room.put(load.size)
        self._sites.memory.note(self._env.now, -load.size)

    def _set_reading(self, reading: bool) -> None:
        self._reading = reading
        if not self._speed.even:
            self._disk_changed.succeed()
            self._disk_changed = self._env.event()

    # The processor

    def _processor(self) -> Events:
        work, sites = self._work, self._work.count_BLEK.shape[1]
        for iteration in range(work.num_iterations):
            self._iteration = iteration
            tokens = int(work.tokens_B[iteration])
            for site in range(sites):
                start = self._env.now
                yield from self._compute(self._device.compute.layer_ns(tokens))
                self._rows.add(iteration, site, ATTENTION, start, self._env.now, 0, tokens, -1, -1)
                yield from self._run_site(iteration, site)
            if self._progress is not None:
                self._progress(iteration + 1, work.num_iterations)

    def _run_site(self, iteration: int, site: int) -> Events:
        work, now = self._work, self._env.now
        predicted_EK = None
        if self._plan.prefetch_layers and work.predicted_BLEK is not None and site + 1 < work.count_BLEK.shape[1]:
            predicted_EK = work.predicted_BLEK[iteration, site + 1]
        # what was expected and has not begun is given up
        self._expected.clear()
        ahead, self._begun = self._begun, []
        arrived = [load.plane for load in ahead if load.there.triggered]
        flight = [load.plane for load in ahead if not load.there.triggered]
        task = self._sites.route(now, site, work.count_BLEK[iteration, site], predicted_EK, arrived, flight)
        loads = self._ask(task, ahead)
        yield from self._run_items(iteration, task, loads)

    def _refuse(self, load: _Load) -> None:
        """Drops a plane that nobody needs: now, or when what is being done with it is over."""
        if load.there.triggered:
            self._drop(load)
        elif self._to_copy is not None and load in self._to_copy.items:
            self._to_copy.items.remove(load)
            self._drop(load)
        else:
            load.unwanted = True

    def _ask(self, task: SiteTask, ahead: list[_Load]) -> dict[int, _Load]:
        """Hands the disk its reads; returns what each item's plane has to be waited for, by item."""
        pairs = list(zip(task.items.expert_I.tolist(), task.items.plane_I.tolist(), strict=True))
        item_of = {pair: item for item, pair in enumerate(pairs)}
        loads = {}
        for load in ahead:
            if load.plane in item_of:
                loads[item_of[load.plane]] = load
            else:
                self._refuse(load)
        for item in task.read:
            size = int(task.times.bytes_I[item])
            loads[item] = _Load(self._env, task.site, pairs[item], size, ahead=False)
            self._needed.append(loads[item])
        for expert, plane in task.ahead:
            size = self._plan.plane_bytes_K[plane]
            self._expected.append(_Load(self._env, task.site + 1, (expert, plane), size, ahead=True))
        if (self._needed or self._expected) and not self._asked.triggered:
            self._asked.succeed()
        return loads

    def _run_items(self, iteration: int, task: SiteTask, loads: dict[int, _Load]) -> Events:
        items = task.items
        compute_I, tokens_I, done_I = (a.tolist() for a in (task.times.compute_ns_I, items.tokens_I, task.done_I))
        held: dict[int, int] = {}
        for item, load in loads.items():
            held[done_I[item]] = held.get(done_I[item], 0) + load.size
        end_I = np.zeros(len(items), dtype=np.int64)
        for item in range(len(items)):
            if item in loads and not loads[item].there.processed:
                yield loads[item].there
            start = self._env.now
            if compute_I[item]:
                yield from self._compute(compute_I[item])
            end_I[item] = self._env.now
            if tokens_I[item]:
                plane = int(items.expert_I[item]), int(items.plane_I[item])
                self._rows.add(iteration, task.site, EXPERTS, start, self._env.now, 0, tokens_I[item], *plane)
            if item in held:
                self._room.put(held[item])
        start_I = np.full(len(items), -1, dtype=np.int64)
        for item in task.read:
            start_I[item] = loads[item].start_ns
        self._sites.over(task, start_I, end_I)

    def _compute(self, alone_ns: int) -> Events:
        """Keeps the processor busy for so long, longer where the disk is read meanwhile."""
        if self._speed.even:
            yield self._env.timeout(alone_ns)
            return
        units = alone_ns * self._speed.alone
        while units > 0:
            began, rate = self._env.now, self._speed.beside if self._reading else self._speed.alone
            done: Any = self._env.timeout(-(-units // rate))
            yield done | self._disk_changed
            units -= (self._env.now - began) * rate
