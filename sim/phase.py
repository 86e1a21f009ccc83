"""Fidelity `phase`: a rank goes on, on each of its streams, as soon as what it needs is there.

Legend: W windows (iterations), G stages, R ranks, X legs. No barrier between phases or layers; one between iterations.
"""

from collections.abc import Callable

import numpy as np
import simpy

from sim.ports import arrive, open_ports, quiet_arrivals
from sim.stages import Stage, StageTimes, needs_of
from sim.traffic import Work

__all__ = ["phase_times"]


def phase_times(work: Work, stages: list[Stage], progress: Callable[[int, int], None] | None = None) -> StageTimes:
    """Starts and ends of every stage when no rank waits for more than what it needs (see sim.ports).

    Never later than fidelity `port`, stage by stage, and equal to it where all ranks have equal work and traffic.
    Events: one per rank and stage with local work, one per rank and leg. Cost O(X R^2 + G R log R) an iteration.
    """
    shape = (work.windows, len(stages), work.cluster.num_ranks)
    start_WGR, end_WGR = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    needs_G = needs_of(stages)
    for window in range(work.windows):
        iteration = _Iteration(work, stages, needs_G, window)
        start_WGR[window], end_WGR[window] = iteration.run()
        if progress is not None:
            progress(window + 1, work.windows)
    return StageTimes(start_WGR, end_WGR, end_WGR.max(axis=(1, 2)))


class _Iteration:
    """One iteration: every rank's stages, each begun when the last of what it waits for is done on that rank.

    An event's value says which stage of which rank may go on, and with which leg: local work done or a leg left.
    """

    def __init__(self, work: Work, stages: list[Stage], needs_G: list[tuple[int, ...]], window: int) -> None:
        ranks = self._ranks = work.cluster.num_ranks
        self._env = simpy.Environment()
        self._work_GR = [[0] * ranks if s.work_WR is None else s.work_WR[window].tolist() for s in stages]
        self._start_GR = [[0] * ranks for _ in stages]
        self._end_GR = [[0] * ranks for _ in stages]
        self._waits_GR = [[len(needs)] * ranks for needs in needs_G]
        self._next_G: list[list[int]] = [[] for _ in stages]
        for stage, needs in enumerate(needs_G):
            for before in needs:
                self._next_G[before].append(stage)
        self._first_leg_G = np.cumsum([0] + [len(stage.legs) for stage in stages]).tolist()
        self._stage_X = [index for index, stage in enumerate(stages) for _ in stage.legs]
        self._ports = open_ports(work.cluster, [leg for stage in stages for leg in stage.legs], window)
        self._held_X: list[list[tuple[int, int]]] = [[] for _ in self._stage_X]
        self._quiet_X = [quiet_arrivals(self._ports, leg) for leg in range(len(self._stage_X))]
        self._leaves = np.zeros((2 * ranks, 3), dtype=np.int64)

    def run(self) -> tuple[list[list[int]], list[list[int]]]:
        """Starts and ends (G, R)."""
        for rank in range(self._ranks):
            self._begin([stage for stage, waits_R in enumerate(self._waits_GR) if not waits_R[rank]], rank)
        self._env.run()
        assert not any(map(any, self._waits_GR)), "a stage never began"
        return self._start_GR, self._end_GR

    def _begin(self, ready: list[int], rank: int) -> None:
        """Starts the stages in `ready` on this rank now, and what follows those that take no time."""
        now = self._env.now
        while ready:
            stage = ready.pop()
            self._start_GR[stage][rank] = now
            leg = self._first_leg_G[stage]
            if self._work_GR[stage][rank]:
                self._wake(now + self._work_GR[stage][rank], stage, leg, rank)
            elif leg < self._first_leg_G[stage + 1]:
                self._enter(leg, rank)
            else:
                ready += self._finish(stage, rank)

    def _wake(self, time_ns: int, stage: int, leg: int, rank: int) -> None:
        event = self._env.timeout(time_ns - self._env.now, (stage, leg, rank))
        event.callbacks.append(self._go_on)

    def _go_on(self, event: simpy.Event) -> None:
        stage, leg, rank = event.value
        if leg < self._first_leg_G[stage + 1]:
            self._enter(leg, rank)
        else:
            self._begin(self._finish(stage, rank), rank)

    def _enter(self, leg: int, rank: int) -> None:
        """Hands this rank's copies to the ports, now or with others'; whoever may leave a leg then, will."""
        held = self._held_X[leg]
        held.append((rank, self._env.now))
        if len(held) <= self._quiet_X[leg]:
            return
        count, self._quiet_X[leg] = arrive(self._ports, leg, np.array(held, dtype=np.int64), self._leaves)
        held.clear()
        for left, other, time_ns in self._leaves[:count].tolist() if count else ():
            self._wake(time_ns, self._stage_X[left], left + 1, other)

    def _finish(self, stage: int, rank: int) -> list[int]:
        """The stages that this rank may begin because it is done with `stage`."""
        self._end_GR[stage][rank] = self._env.now
        ready = []
        for after in self._next_G[stage]:
            self._waits_GR[after][rank] -= 1
            if not self._waits_GR[after][rank]:
                ready.append(after)
        return ready
