"""What every layer of every iteration computes and moves under a plan: the simulator's only input.

Legend: L routing sites, T tokens, K top-k, W windows (one window is one iteration), R ranks, N nodes.
Times are integer nanoseconds; copies are token copies (bytes = copies * token_bytes).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.cluster import ClusterSpec
from placer.core.cost import LegTimes, attention_ns, expert_ns, gather_copies, leg_times, rank_load
from placer.core.dispatch import assign_layer, layer_traffic
from placer.core.model import ModelSpec
from placer.core.modes import DispatchMode
from placer.core.plan import Plan

__all__ = ["LayerWork", "Leg", "Work", "work_of"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Leg:
    """One all-to-all: rank a sends copies_WRR[w, a, b] token copies to rank b, and how long each port is busy."""

    copies_WRR: npt.NDArray[np.int32]
    times: LegTimes

    @property
    def sent_WR(self) -> IntArray:
        """Copies each rank sends."""
        return self.copies_WRR.sum(axis=2, dtype=np.int64)

    @property
    def received_WR(self) -> IntArray:
        """Copies each rank receives."""
        return self.copies_WRR.sum(axis=1, dtype=np.int64)

    def busy_WR(self, cluster: ClusterSpec) -> IntArray:
        """How long the leg keeps each rank when all start together: its own ports, and its node's uplink if it uses it.

        The maximum over ranks is the leg's closed-form duration.
        """
        busy_WR = np.maximum(self.times.out_WR, self.times.in_WR)
        node_R = cluster.node_R
        away_RR = node_R[:, None] != node_R[None, :]
        for axis, uplink_WN in ((2, self.times.uplink_out_WN), (1, self.times.uplink_in_WN)):
            if uplink_WN.any():
                crosses_WR = (self.copies_WRR * away_RR).any(axis=axis)
                busy_WR = np.maximum(busy_WR, np.where(crosses_WR, uplink_WN[:, node_R], 0))
        return busy_WR


@dataclass(frozen=True, slots=True)
class LayerWork:
    """One layer: how long each rank computes, how many pairs it computes, and the legs between, in order."""

    home_WR: IntArray
    attention_WR: IntArray
    dispatch: tuple[Leg, ...]
    pairs_WR: IntArray
    experts_WR: IntArray
    combine: tuple[Leg, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """All layers in order; `gather` is the all-gather that ends an iteration (`coherent` mode only)."""

    cluster: ClusterSpec
    token_bytes: int
    tokens_W: IntArray
    layers: tuple[LayerWork, ...]
    gather: Leg | None

    @property
    def windows(self) -> int:
        """W, iterations."""
        return len(self.tokens_W)


def work_of(
    plan: Plan,
    model: ModelSpec,
    cluster: ClusterSpec,
    mode: DispatchMode,
    expert_LTK: npt.NDArray[np.integer],
    source_T: IntArray,
    window_T: IntArray,
    windows: int,
    progress: Callable[[int, int], None] | None = None,
) -> Work:
    """Replays the routed tokens through the plan, layer by layer. Cost O(L T (K + R)); memory O(L W R^2)."""
    token_T = np.arange(expert_LTK.shape[1])
    location_T = source_T
    layers = []
    for layer in range(expert_LTK.shape[0]):
        home_T = location_T if mode == "coherent" else source_T
        slot_TK, slots = assign_layer(plan, layer, expert_LTK[layer], home_T, token_T)
        traffic, location_T = layer_traffic(slots, mode, slot_TK, location_T, window_T, windows)
        layers.append(
            LayerWork(
                home_WR=traffic.home_WR,
                attention_WR=attention_ns(cluster, model, traffic.home_WR),
                dispatch=tuple(_leg(cluster, model, copies) for copies in traffic.legs_WRR),
                pairs_WR=rank_load(traffic.tokens_WP, cluster.num_ranks),
                experts_WR=expert_ns(cluster, model, traffic.tokens_WP),
                combine=tuple(_leg(cluster, model, copies) for copies in traffic.returns_WRR),
            )
        )
        if progress is not None:
            progress(layer + 1, expert_LTK.shape[0])
    gather = None
    if mode == "coherent":
        home_WR = np.bincount(window_T * cluster.num_ranks + location_T, minlength=windows * cluster.num_ranks)
        gather = _leg(cluster, model, gather_copies(home_WR.reshape(windows, cluster.num_ranks).astype(np.int64)))
    return Work(
        cluster=cluster,
        token_bytes=model.token_bytes,
        tokens_W=np.bincount(window_T, minlength=windows).astype(np.int64),
        layers=tuple(layers),
        gather=gather,
    )


def _leg(cluster: ClusterSpec, model: ModelSpec, copies_WRR: IntArray) -> Leg:
    return Leg(copies_WRR.astype(np.int32), leg_times(cluster, copies_WRR, model.token_bytes))
