"""Fidelity `flow` driven by SimPy: ranks live through their stages, the network wakes when something may change.

Legend: W windows (iterations), G stages, R ranks, X legs of an iteration, F messages or flows, P places of a path.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import simpy

from sim.flow.network import active, add, advance
from sim.flow.state import LEAVES, NEVER, Network, open_network
from sim.flow.topology import Messages, Topology, cluster_topology
from sim.stages import Stage, StageTimes
from sim.traffic import Leg, Work

__all__ = ["Recorder", "Snapshot", "flow_times"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

LAST = 2
"""Priority of the network among the events of one nanosecond: it sees all messages that start then."""


class Snapshot(NamedTuple):
    """The flows that run from `now_ns` until the next snapshot; their ends and the links they are on.

    who_F3 (leg, sender, receiver), path_FP (links), speed_F (1 where alone), cost_FP (share of each link's time that a
    flow of speed 1 takes now, 0 where the path is shorter), alone_ns_F, left_ns_F (of alone_ns_F).
    """

    window: int
    now_ns: int
    who_F3: IntArray
    path_FP: IntArray
    speed_F: FloatArray
    cost_FP: FloatArray
    alone_ns_F: FloatArray
    left_ns_F: FloatArray


Recorder = Callable[[Snapshot], None]


class _Legs:
    """All legs of one iteration over one network: the seam between the flows and SimPy."""

    def __init__(
        self, env: simpy.Environment, topology: Topology, legs: list[Leg], window: int, streams: int, observe: bool
    ) -> None:
        self._env, self._topology, self._legs, self._window = env, topology, legs, window
        sends_XRR = np.stack([leg.copies_WRR[window] > 0 for leg in legs]) if legs else np.zeros((0, 1, 1), dtype=bool)
        missing_XR = 1 + sends_XRR.sum(axis=1, dtype=np.int64) + sends_XRR.sum(axis=2, dtype=np.int64)
        self.network = open_network(topology, missing_XR, streams)
        self._to_come_X = [missing_XR.shape[1]] * len(legs)
        self._messages: dict[int, tuple[Messages, IntArray]] = {}
        self._waiting: dict[tuple[int, int], simpy.Event] = {}
        self._arrived: list[tuple[int, int]] = []
        self._asleep = True
        self._observe = observe
        self.watch: Callable[[Network, int], None] = lambda network, now: None

    def pass_leg(self, leg: int, rank: int) -> simpy.Event:
        """The event on which `rank`, ready for `leg` now, may go on."""
        event = self._waiting[leg, rank] = self._env.event()
        self._arrived.append((leg, rank))
        if self._asleep:
            self._wake_at(self._env.now)
        return event

    def _wake_at(self, time_ns: int) -> None:
        self._asleep = False
        event = self._env.event()
        event._ok, event._value = True, None
        event.callbacks.append(self._wake)
        self._env.schedule(event, priority=LAST, delay=time_ns - self._env.now)

    def _wake(self, _: simpy.Event) -> None:
        """Starts the messages of ranks that have become ready, then runs ahead to where a rank may leave.

        Nothing outside the network happens before the next SimPy event, so it may run up to that by itself.
        """
        now = self._env.now
        for leg, rank in self._arrived:
            self._start(leg, rank)
        self._arrived.clear()
        until = self._env.peek()
        until = NEVER if until == float("inf") else int(until)
        reached = advance(self.network, now, until, self._observe)
        if self._observe and self.network.heights[LEAVES] == 0:  # else it stands still until they have gone on
            self.watch(self.network, now)
        self._asleep = True
        for leg, rank in self.network.leaves_N2[: self.network.heights[LEAVES]].tolist():
            event = self._waiting.pop((leg, rank))
            event._ok, event._value = True, None
            self._env.schedule(event, delay=reached - now)
        self.network.heights[LEAVES] = 0
        if reached < NEVER:
            self._wake_at(reached)

    def _start(self, leg: int, rank: int) -> None:
        if leg not in self._messages:
            one = self._legs[leg]
            messages = self._topology.messages(one.copies_WRR[self._window], one.copy_bytes)
            self._messages[leg] = messages, np.searchsorted(messages.sender_F, np.arange(self._sizes[1] + 1))
        messages, first_R = self._messages[leg]
        mine = slice(first_R[rank], first_R[rank + 1])
        add(
            self.network,
            leg,
            rank,
            messages.receiver_F[mine],
            messages.path_FP[mine],
            messages.pair_FP[mine],
            messages.alone_ns_F[mine],
            messages.cost_2FP[:, mine],
        )
        self._to_come_X[leg] -= 1
        if self._to_come_X[leg] == 0:
            del self._messages[leg]

    @property
    def _sizes(self) -> tuple[int, ...]:
        return self.network.missing_XR.shape


def flow_times(
    work: Work,
    stages: list[Stage],
    progress: Callable[[int, int], None] | None = None,
    *,
    topology: Topology | None = None,
    recorder: Recorder | None = None,
) -> StageTimes:
    """Starts and ends of every stage when messages are flows that share links max-min fairly (see sim.flow).

    `topology` replaces the cluster's own links; `recorder` is shown every allocation (slow: for tests and plots).
    Never earlier than any link's closed form without tail; equal to `phase` where no two messages share a link.
    Complexity: each of F flows costs a pass over the flows of the links whose share of time its end changes.
    """
    topology = topology or cluster_topology(work.cluster)
    shape = (work.windows, len(stages), work.cluster.num_ranks)
    start_WGR, end_WGR = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for window in range(work.windows):
        start_WGR[window], end_WGR[window] = _iteration(work, stages, window, topology, recorder)
        if progress is not None:
            progress(window + 1, work.windows)
    return StageTimes(start_WGR, end_WGR, end_WGR.max(axis=(1, 2), initial=0))


def _iteration(
    work: Work, stages: list[Stage], window: int, topology: Topology, recorder: Recorder | None
) -> tuple[list[list[int]], list[list[int]]]:
    """Starts and ends (G, R) of one iteration."""
    env = simpy.Environment()
    ranks = work.cluster.num_ranks
    legs = [leg for stage in stages for leg in stage.legs]
    streams = len({stage.stream for stage in stages if stage.legs})
    passing = _Legs(env, topology, legs, window, streams, recorder is not None)
    if recorder is not None:
        passing.watch = lambda network, now: _show(recorder, network, window, now)
    work_GR = [[0] * ranks if stage.work_WR is None else stage.work_WR[window].tolist() for stage in stages]
    first_G = np.cumsum([0, *(len(stage.legs) for stage in stages)]).tolist()
    start_GR, end_GR = ([[0] * ranks for _ in stages] for _ in range(2))
    done_GR = [[False] * ranks for _ in stages]
    waiting: dict[tuple[int, int], list[simpy.Event]] = {}

    def live(rank: int, stream: list[int]) -> Iterator[simpy.Event]:
        """One stream of one rank: its stages in order, each as soon as those that it comes after are done."""
        for stage in stream:
            for before in stages[stage].after:
                if not done_GR[before][rank]:
                    event = env.event()
                    waiting.setdefault((before, rank), []).append(event)
                    yield event
            start_GR[stage][rank] = env.now
            if work_GR[stage][rank]:
                yield env.timeout(work_GR[stage][rank])
            for leg in range(first_G[stage], first_G[stage + 1]):
                yield passing.pass_leg(leg, rank)
            end_GR[stage][rank] = env.now
            done_GR[stage][rank] = True
            for event in waiting.pop((stage, rank), ()):
                event.succeed()

    for stream in sorted({stage.stream for stage in stages}):
        mine = [index for index, stage in enumerate(stages) if stage.stream == stream]
        for rank in range(ranks):
            env.process(live(rank, mine))
    env.run()
    return start_GR, end_GR


def _show(recorder: Recorder, network: Network, window: int, now: int) -> None:
    slot_F, speed_F, left_F = active(network, now)
    path_FP, links = network.path_FP[slot_F], len(network.flows_Q)
    beside_FP = (np.append(network.pairs_Q, 0)[path_FP] > 1).astype(np.int64)
    cost_FP = np.where(path_FP < links, network.cost_2E[beside_FP, network.entry_FP[slot_F]], 0.0)
    recorder(Snapshot(window, now, network.who_F3[slot_F], path_FP, speed_F, cost_FP, network.size_F[slot_F], left_F))
