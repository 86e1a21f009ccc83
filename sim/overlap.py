"""A pipelined MoE layer of given stage times on three streams, by the same machinery as fidelity `phase`.

Legend: W cases simulated together (windows of fidelity `phase`), G stages.
"""

import numpy as np
import numpy.typing as npt

from placer.core.cluster import ClusterSpec, Compute, LinkClass
from placer.core.overlap import ChunkTimes
from placer.core.timeline import PHASES
from sim.phase import phase_times
from sim.stages import COMPUTE, INSIDE, NETWORK, Stage
from sim.traffic import Work

__all__ = ["makespan_ns", "overlap_stages"]


def makespan_ns(degree: int, times_W: list[ChunkTimes]) -> npt.NDArray[np.int64]:
    """How long each case takes on one rank, (W,); times are rounded to whole nanoseconds. Cost O(W degree)."""
    link = LinkClass(gbytes_per_s=1.0)
    compute = Compute(tflops=1.0, weight_read_gbytes_per_s=1.0)
    rank = ClusterSpec(name="rank", nodes=1, ranks_per_node=1, memory_gib=1.0, intra=link, inter=link, compute=compute)
    work = Work(cluster=rank, token_bytes=1, tokens_W=np.zeros(len(times_W), dtype=np.int64), layers=(), gather=None)
    return phase_times(work, overlap_stages(degree, times_W)).total_W


def overlap_stages(degree: int, times_W: list[ChunkTimes]) -> list[Stage]:
    """The stages in the order of `sim.stages.stages_of` for a two-level exchange, each with its time as local work.

    The gradients' slice is one more stage on the network after the last chunk is sent, where any case has one.
    """
    stages: list[Stage] = []

    def add(phase: str, field: str, stream: int, *after: int) -> int:
        work_WR = np.array([[round(getattr(times, field))] for times in times_W], dtype=np.int64)
        none_WR = np.zeros_like(work_WR)
        stages.append(Stage(0, PHASES.index(phase), none_WR, work_WR=work_WR, stream=stream, after=after))
        return len(stages) - 1

    ready = [add("dispatch", "gather_ns", INSIDE, add("dispatch", "a2a_ns", NETWORK)) for _ in range(degree)]
    if any(times.gradient_ns for times in times_W):
        add("gather", "gradient_ns", NETWORK)
    ready = [add("experts", "experts_ns", COMPUTE, before) for before in ready]
    for before in ready:
        add("combine", "a2a_ns", NETWORK, add("combine", "scatter_ns", INSIDE, before))
    return stages
