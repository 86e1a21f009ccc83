"""When each rank starts and ends each stage: what every fidelity returns, and how it becomes a Timeline.

Legend: W windows (iterations), G stages of an iteration in order, R ranks, I spans.
A stage is one phase of one layer, or of one of its pipeline chunks; the all-gather that ends a `coherent` iteration is
a stage of no layer (-1).
"""

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.timeline import PHASES, Timeline
from sim.traffic import Leg, Work

__all__ = ["COMPUTE", "INSIDE", "NETWORK", "Stage", "StageTimes", "needs_of", "stages_of", "timeline_of"]

IntArray = npt.NDArray[np.int64]


COMPUTE, NETWORK, INSIDE = range(3)
"""Streams of a rank; each carries its stages one after the other. Exchanges use NETWORK, but those legs of a pipelined
two-level exchange that stay within nodes use INSIDE, so that they may run beside the others."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One span of every rank: local work first (`work_WR`, ns), then legs, in order. `units_WR`: Timeline's `tokens`.

    A rank begins when its stages `after` (indices of earlier stages) and the stage before on `stream` are done.
    """

    layer: int
    phase: int
    units_WR: IntArray
    work_WR: IntArray | None = None
    legs: tuple[Leg, ...] = ()
    stream: int = COMPUTE
    after: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Nanoseconds since the iteration began, (W, G, R) each; `total_W` is when the iteration's last rank is done."""

    start_WGR: IntArray
    end_WGR: IntArray
    total_W: IntArray


def stages_of(work: Work) -> list[Stage]:
    """The iteration's stages in an order that every stream keeps: all dispatches of a layer, then all its combines.

    Attention is left out where it takes no time (no attention_params, no software costs); all else is there even when
    empty. A layer of degree 1 is a chain: attention, dispatch, experts, combine.
    """
    has_attention = any(layer.attention_WR.any() for layer in work.layers)
    stages: list[Stage] = []
    before: tuple[int, ...] = ()
    for index, layer in enumerate(work.layers):
        if has_attention:
            work_WR = layer.attention_WR
            stages.append(Stage(index, PHASES.index("attention"), layer.home_WR, work_WR=work_WR, after=before))
            before = (len(stages) - 1,)
        piped = len(layer.chunks) > 1
        ready = []
        for chunk in layer.chunks:
            _exchange(stages, index, "dispatch", chunk.dispatch, chunk.dispatch_packing_WR, before, split=piped)
            ready.append((len(stages) - 1,))
        for at, chunk in enumerate(layer.chunks):
            phase = PHASES.index("experts")
            stages.append(Stage(index, phase, chunk.pairs_WR, work_WR=chunk.experts_WR, after=ready[at]))
            ready[at] = (len(stages) - 1,)
        before = ()
        for at, chunk in enumerate(layer.chunks):
            _exchange(stages, index, "combine", chunk.combine, chunk.combine_packing_WR, ready[at], split=piped)
            before += (len(stages) - 1,)
    if work.gather is not None:
        _exchange(stages, -1, "gather", (work.gather,), None, before, split=False)
    return stages


def _exchange(
    stages: list[Stage],
    layer: int,
    phase: str,
    legs: tuple[Leg, ...],
    packing_WR: IntArray | None,
    after: tuple[int, ...],
    *,
    split: bool,
) -> None:
    """Appends the stages of one exchange: one, or one for each change of stream where it is `split`."""
    packing = packing_WR if packing_WR is not None and packing_WR.any() else None
    groups = [legs]
    if split and len({leg.inside for leg in legs}) > 1:
        groups = [tuple(run) for _, run in groupby(legs, key=lambda leg: leg.inside)]
    for group in groups:
        sent_WR: IntArray = np.sum([leg.sent_WR for leg in group], axis=0, dtype=np.int64)
        stream = INSIDE if len(groups) > 1 and group[0].inside else NETWORK
        stages.append(Stage(layer, PHASES.index(phase), sent_WR, packing, group, stream, after))
        packing, after = None, (len(stages) - 1,)


def needs_of(stages: list[Stage]) -> list[tuple[int, ...]]:
    """The stages that each waits for: those it names, and the one before on its stream."""
    last: dict[int, int] = {}
    needs_G = []
    for index, stage in enumerate(stages):
        assert all(before < index for before in stage.after), "a stage waits for a later one"
        before = last.get(stage.stream)
        needs_G.append(tuple(sorted(set(stage.after) | ({before} if before is not None else set()))))
        last[stage.stream] = index
    return needs_G


def timeline_of(work: Work, stages: list[Stage], times: StageTimes, about: dict[str, Any]) -> Timeline:
    """One span per iteration, stage and rank, iterations end to end; the columns' order is Timeline's."""
    shape = times.start_WGR.shape
    offset_W = np.cumsum(times.total_W) - times.total_W
    start = (times.start_WGR + offset_W[:, None, None]).reshape(-1)
    iteration = np.broadcast_to(np.arange(shape[0])[:, None, None], shape).reshape(-1)
    rank = np.broadcast_to(np.arange(shape[2]), shape).reshape(-1)
    layer = np.broadcast_to(np.array([stage.layer for stage in stages])[:, None], shape).reshape(-1)
    phase = np.broadcast_to(np.array([stage.phase for stage in stages])[:, None], shape).reshape(-1)
    sent, received, units = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    for index, stage in enumerate(stages):
        units[:, index] = stage.units_WR
        for leg in stage.legs:
            sent[:, index] += leg.sent_WR * work.token_bytes
            received[:, index] += leg.received_WR * work.token_bytes
    order = np.lexsort((rank, start, iteration))
    return Timeline(
        about=about,
        iteration=iteration[order].astype(np.int32),
        layer=layer[order].astype(np.int32),
        phase=phase[order].astype(np.int8),
        rank=rank[order].astype(np.int32),
        start_ns=start[order],
        duration_ns=(times.end_WGR - times.start_WGR).reshape(-1)[order],
        sent_bytes=sent.reshape(-1)[order],
        received_bytes=received.reshape(-1)[order],
        tokens=units.reshape(-1)[order],
    )
