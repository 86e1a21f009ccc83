"""When each rank starts and ends each stage: what both fidelities return, and how it becomes a Timeline.

Legend: W windows (iterations), G stages of an iteration in order, R ranks, I spans.
A stage is one phase of one layer; the all-gather that ends a `coherent` iteration is a stage of no layer (-1).
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.timeline import PHASES, Timeline
from sim.traffic import Leg, Work

__all__ = ["Stage", "StageTimes", "stages_of", "timeline_of"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Stage:
    """One phase of one layer: either local work (`work_WR`, ns) or legs. `units_WR` is the Timeline's `tokens`."""

    layer: int
    phase: int
    units_WR: IntArray
    work_WR: IntArray | None = None
    legs: tuple[Leg, ...] = ()


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Nanoseconds since the iteration began, (W, G, R) each; `total_W` is when the iteration's last rank is done."""

    start_WGR: IntArray
    end_WGR: IntArray
    total_W: IntArray


def stages_of(work: Work) -> list[Stage]:
    """The iteration's stages in the order every rank passes them.

    Attention is left out where the model has none (no attention_params); every other stage is there even when empty.
    """
    has_attention = any(layer.attention_WR.any() for layer in work.layers)
    stages = []
    for index, layer in enumerate(work.layers):
        if has_attention:
            stages.append(Stage(index, PHASES.index("attention"), layer.home_WR, work_WR=layer.attention_WR))
        stages.append(_exchange(index, "dispatch", layer.dispatch))
        stages.append(Stage(index, PHASES.index("experts"), layer.pairs_WR, work_WR=layer.experts_WR))
        stages.append(_exchange(index, "combine", layer.combine))
    if work.gather is not None:
        stages.append(_exchange(-1, "gather", (work.gather,)))
    return stages


def _exchange(layer: int, phase: str, legs: tuple[Leg, ...]) -> Stage:
    sent_WR: IntArray = np.sum([leg.sent_WR for leg in legs], axis=0, dtype=np.int64)
    return Stage(layer, PHASES.index(phase), sent_WR, legs=legs)


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
