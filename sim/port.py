"""Fidelity `port`: the closed form, drawn. Every rank waits at the end of every stage for the slowest.

Legend: W windows (iterations), G stages, R ranks.
"""

import numpy as np
import numpy.typing as npt

from sim.stages import Stage, StageTimes
from sim.traffic import Work

__all__ = ["port_times"]

IntArray = npt.NDArray[np.int64]


def port_times(work: Work, stages: list[Stage]) -> StageTimes:
    """Starts and ends of every stage when all ranks start every stage (and every leg of a stage) together.

    A rank's span lasts as long as its own work or ports are busy, the stage as long as the slowest port: totals of
    unpipelined layers equal `placer.core.cost.closed_form_ns` to the nanosecond. Cost O(W G R).
    """
    shape = (work.windows, len(stages), work.cluster.num_ranks)
    start_WGR, end_WGR = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.int64)
    none_W = np.zeros(work.windows, dtype=np.int64)
    stream_W = {stage.stream: none_W for stage in stages}
    done_GW: list[IntArray] = []
    for index, stage in enumerate(stages):
        clock_W = stream_W[stage.stream]
        for before in stage.after:
            clock_W = np.maximum(clock_W, done_GW[before])
        start_WGR[:, index] = end_WGR[:, index] = clock_W[:, None]
        if stage.work_WR is not None:
            end_WGR[:, index] += stage.work_WR
            clock_W = clock_W + stage.work_WR.max(axis=1)
        for leg in stage.legs:
            busy_WR = leg.busy_WR(work.cluster)
            np.add(clock_W[:, None], busy_WR, out=end_WGR[:, index], where=busy_WR > 0)
            clock_W = clock_W + busy_WR.max(axis=1)
        stream_W[stage.stream] = clock_W
        done_GW.append(clock_W)
    return StageTimes(start_WGR, end_WGR, np.max([none_W, *done_GW], axis=0))
