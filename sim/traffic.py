"""What every layer of every iteration computes and moves under a plan: the simulator's only input.

Legend: L routing sites, T tokens, K top-k, W windows (one window is one iteration), R ranks, N nodes.
Times are integer nanoseconds; copies are token copies (bytes = copies * token_bytes).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.cluster import ClusterSpec
from placer.core.cost import (
    LegTimes,
    attention_ns,
    expert_ns,
    gather_copies,
    leg_times,
    packing_ns,
    rank_load,
)
from placer.core.dispatch import LayerTraffic, assign_layer, layer_traffic
from placer.core.model import ModelSpec
from placer.core.modes import DispatchMode
from placer.core.plan import Plan
from placer.core.schedule import Schedule, chunk_index, expand_leg

__all__ = ["ChunkWork", "LayerWork", "Leg", "Work", "work_of"]

INSIDE_LEG = {("per_node", "dispatch"): 1, ("per_node", "combine"): 0, ("2dh", "dispatch"): 0, ("2dh", "combine"): 0}
"""Which leg of a two-level exchange stays within nodes; told from the scheme and not from the copies, so that streams
do not depend on which iterations are simulated."""

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Leg:
    """One exchange: rank a sends copies_WRR[w, a, b] copies of `copy_bytes` to rank b; how long each port is busy.

    `inside` says that this leg of a two-level exchange stays within nodes while the other only crosses the network: the
    two share no port. `crosses_2WR` says whether each rank sends and receives over the network (None: not counted yet).
    """

    copies_WRR: npt.NDArray[np.int32]
    times: LegTimes
    copy_bytes: int
    inside: bool = False
    crosses_2WR: npt.NDArray[np.bool_] | None = None

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
        times = self.times
        busy_WR = np.maximum(times.out_WR, times.in_WR)
        if times.uplink_out_WN.any():
            crosses_2WR = _crossings(cluster, self.copies_WRR) if self.crosses_2WR is None else self.crosses_2WR
            for crosses_WR, uplink_WN in zip(crosses_2WR, (times.uplink_out_WN, times.uplink_in_WN), strict=True):
                np.maximum(busy_WR, uplink_WN[:, cluster.node_R], out=busy_WR, where=crosses_WR)
        return busy_WR


@dataclass(frozen=True, slots=True)
class ChunkWork:
    """One pipeline chunk of a layer: its legs in order, what packing them costs, and the experts' work between."""

    dispatch: tuple[Leg, ...]
    dispatch_packing_WR: IntArray
    pairs_WR: IntArray
    experts_WR: IntArray
    combine: tuple[Leg, ...]
    combine_packing_WR: IntArray


@dataclass(frozen=True, slots=True)
class LayerWork:
    """One layer: attention (with the software's fixed cost of a layer), then as many chunks as its pipeline degree."""

    home_WR: IntArray
    attention_WR: IntArray
    chunks: tuple[ChunkWork, ...]


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
    *,
    schedule: Schedule | None = None,
    metadata_bytes: int = 0,
) -> Work:
    """Replays the routed tokens through the plan, layer by layer. Cost O(L T (K + R)); memory O(L W R^2).

    `schedule` None: every all-to-all linear, nothing pipelined. `metadata_bytes` travel beside each dispatched copy.
    """
    token_T = np.arange(expert_LTK.shape[1])
    location_T = source_T
    layers_count = expert_LTK.shape[0]
    schedule = schedule or Schedule.uniform(layers_count)
    schedule.refuse_misfit(mode, layers_count, cluster.num_ranks)
    layers = []
    for layer in range(layers_count):
        home_T = location_T if mode == "coherent" else source_T
        slot_TK, slots = assign_layer(plan, layer, expert_LTK[layer], home_T, token_T)
        degree = schedule.degree_L[layer]
        chunk_T = window_T * degree + chunk_index(location_T, window_T, cluster.num_ranks, degree)
        traffic, after_T = layer_traffic(slots, mode, slot_TK, location_T, chunk_T, windows * degree)
        home_WR = traffic.home_WR.reshape(windows, degree, -1).sum(axis=1)
        layers.append(
            LayerWork(
                home_WR=home_WR,
                attention_WR=attention_ns(cluster, model, home_WR),
                chunks=tuple(
                    _chunk(cluster, model, mode, traffic, schedule, layer, chunk, metadata_bytes)
                    for chunk in range(degree)
                ),
            )
        )
        location_T = after_T
        if progress is not None:
            progress(layer + 1, layers_count)
    gather = None
    if mode == "coherent":
        home_WR = np.bincount(window_T * cluster.num_ranks + location_T, minlength=windows * cluster.num_ranks)
        copies_WRR = gather_copies(home_WR.reshape(windows, cluster.num_ranks).astype(np.int64))
        gather = _leg(cluster, copies_WRR, model.token_bytes)
    return Work(
        cluster=cluster,
        token_bytes=model.token_bytes,
        tokens_W=np.bincount(window_T, minlength=windows).astype(np.int64),
        layers=tuple(layers),
        gather=gather,
    )


def _chunk(
    cluster: ClusterSpec,
    model: ModelSpec,
    mode: DispatchMode,
    traffic: LayerTraffic,
    schedule: Schedule,
    layer: int,
    chunk: int,
    metadata_bytes: int,
) -> ChunkWork:
    """What chunk `chunk` of every window moves and computes; windows of `traffic` are (window, chunk) pairs."""
    algorithm, rounds = schedule.algorithm_L[layer], schedule.rounds_L[layer]
    step = slice(chunk, None, schedule.degree_L[layer])
    legs: dict[str, tuple[Leg, ...]] = {}
    packing: dict[str, IntArray] = {}
    ways = (
        ("dispatch", traffic.legs_WRR, model.token_bytes + metadata_bytes, rounds),
        ("combine", traffic.returns_WRR, model.token_bytes, None if rounds is None else rounds.transposed()),
    )
    for way, legs_WRR, copy_bytes, order in ways:
        packing[way] = packing_ns(cluster, mode, traffic.home_WR[step])
        parts = [part for leg in legs_WRR for part in expand_leg(leg[step], algorithm, cluster.ranks_per_node, order)]
        stays = INSIDE_LEG.get((mode if algorithm == "linear" else algorithm, way))
        legs[way] = tuple(_leg(cluster, part, copy_bytes, inside=at == stays) for at, part in enumerate(parts))
    tokens_WP = traffic.tokens_WP[step]
    return ChunkWork(
        dispatch=legs["dispatch"],
        dispatch_packing_WR=packing["dispatch"],
        pairs_WR=rank_load(tokens_WP, cluster.num_ranks),
        experts_WR=expert_ns(cluster, model, tokens_WP),
        combine=legs["combine"],
        combine_packing_WR=packing["combine"],
    )


def _leg(cluster: ClusterSpec, copies_WRR: IntArray, copy_bytes: int, *, inside: bool = False) -> Leg:
    crosses_2WR = None if cluster.uplink is None or cluster.nodes == 1 else _crossings(cluster, copies_WRR)
    times = leg_times(cluster, copies_WRR, copy_bytes)
    return Leg(copies_WRR.astype(np.int32), times, copy_bytes, inside and cluster.nodes > 1, crosses_2WR)


def _crossings(cluster: ClusterSpec, copies_WRR: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    away_WRR = copies_WRR != 0
    away_WRR &= cluster.node_R[:, None] != cluster.node_R[None, :]
    return np.stack([away_WRR.any(axis=2), away_WRR.any(axis=1)])
