"""Fidelity `phase`: one SimPy process per rank; a rank goes on as soon as what it needs is there.

Legend: W windows (iterations), G stages, R ranks, X legs. No barrier between phases or layers; one between iterations.
"""

from collections.abc import Callable, Iterator

import numpy as np
import simpy

from sim.ports import Ports, arrive, open_ports
from sim.stages import Stage, StageTimes
from sim.traffic import Work

__all__ = ["phase_times"]


class _Departure(simpy.Event):
    """One rank's leave from a leg: waited for before its time is known, then set for that time."""

    def leave_at(self, time_ns: int) -> None:
        """Fires at `time_ns`; the clock never runs back."""
        assert time_ns >= self.env.now, "a rank would leave before its last copy was handed in"
        self._ok, self._value = True, None
        self.env.schedule(self, delay=time_ns - self.env.now)


class _Legs:
    """The ports with the waiting ranks' events: the one seam between the arithmetic and SimPy."""

    __slots__ = ("_env", "_leaves_R2", "_ports", "_waiting_R")

    def __init__(self, env: simpy.Environment, ports: Ports) -> None:
        self._env = env
        self._ports = ports
        ranks = len(ports.node_R)
        self._waiting_R = [_Departure(env) for _ in range(ranks)]
        self._leaves_R2 = np.zeros((ranks, 2), dtype=np.int64)

    def pass_leg(self, leg: int, rank: int) -> _Departure:
        """The event on which `rank`, ready for `leg` now, may go on."""
        departure = self._waiting_R[rank] = _Departure(self._env)
        count = arrive(self._ports, leg, rank, self._env.now, self._leaves_R2)
        for other, time_ns in self._leaves_R2[:count].tolist():
            self._waiting_R[other].leave_at(time_ns)
        return departure


def phase_times(work: Work, stages: list[Stage], progress: Callable[[int, int], None] | None = None) -> StageTimes:
    """Starts and ends of every stage when no rank waits for more than what it needs (see sim.ports).

    Never later than fidelity `port`, and equal to it where all ranks have equal work and traffic.
    Events: one per rank and stage with local work, one per rank and leg.
    """
    shape = (work.windows, len(stages), work.cluster.num_ranks)
    start_WGR, end_WGR = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    for window in range(work.windows):
        start_WGR[window], end_WGR[window] = _iteration(work, stages, window)
        if progress is not None:
            progress(window + 1, work.windows)
    return StageTimes(start_WGR, end_WGR, end_WGR.max(axis=(1, 2)))


def _iteration(work: Work, stages: list[Stage], window: int) -> tuple[list[list[int]], list[list[int]]]:
    """Starts and ends (G, R) of one iteration."""
    env = simpy.Environment()
    ranks = work.cluster.num_ranks
    legs = _Legs(env, open_ports(work.cluster, [leg for s in stages for leg in s.legs], window))
    work_GR = [[0] * ranks if stage.work_WR is None else stage.work_WR[window].tolist() for stage in stages]
    legs_G = [len(stage.legs) for stage in stages]
    start_GR = [[0] * ranks for _ in stages]
    end_GR = [[0] * ranks for _ in stages]

    def live(rank: int) -> Iterator[simpy.Event]:
        """One rank's iteration: the stages in order, each as soon as the one before is done."""
        leg = 0
        for stage in range(len(stages)):
            start_GR[stage][rank] = env.now
            if work_GR[stage][rank]:
                yield env.timeout(work_GR[stage][rank])
            for _ in range(legs_G[stage]):
                yield legs.pass_leg(leg, rank)
                leg += 1
            end_GR[stage][rank] = env.now

    for rank in range(ranks):
        env.process(live(rank))
    env.run()
    return start_GR, end_GR
