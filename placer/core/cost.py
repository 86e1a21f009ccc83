"""The closed form of one layer's time: the one definition that solvers, bounds and the simulator share.

Legend: W windows, R ranks, N nodes, P slots, I ports. Times are integer nanoseconds, bytes are int64.

time(layer) = attention + sum of dispatch legs + experts + sum of combine legs, where
    leg      = max over ports of (alpha * messages + bytes / beta), ports being every rank's port inside the node,
               every rank's network port and every node's uplink, each in both directions (full duplex)
    experts  = max over ranks of launch + sum over slots with tokens of max(weight read, tokens * flops / rate)
               / the rank's relative speed
A port that several messages share moves bytes / beta * tail. Where the cluster has `software` costs, attention,
dispatch and combine also last as long as the slowest rank's (docs/decisions/0011).
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.cluster import ClusterSpec, LinkClass
from placer.core.dispatch import LayerTraffic
from placer.core.model import ModelSpec
from placer.core.modes import DispatchMode

__all__ = [
    "LegTimes",
    "attention_ns",
    "closed_form_ns",
    "expert_ns",
    "gather_copies",
    "leg_times",
    "packing_ns",
    "port_ns",
    "rank_load",
]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class LegTimes:
    """How long each port is busy in one leg, per window; a rank's ports are its link inside the node and its NIC.

    out_WR, in_WR       the rank's slower port, sending and receiving
    uplink_out_WN, uplink_in_WN   the node's shared uplink (0 where the cluster has none)
    """

    out_WR: IntArray
    in_WR: IntArray
    uplink_out_WN: IntArray
    uplink_in_WN: IntArray

    @property
    def slowest_W(self) -> IntArray:
        """The leg's closed-form duration: its busiest port."""
        ports = (self.out_WR, self.in_WR, self.uplink_out_WN, self.uplink_in_WN)
        return np.max([port.max(axis=1) for port in ports], axis=0)


def port_ns(link: LinkClass, messages: IntArray, copies: IntArray, copy_bytes: int) -> npt.NDArray[np.int64]:
    """How long a port of this class is busy with so many messages of so many copies in all."""
    slope = copy_bytes / link.gbytes_per_s
    work = copies * np.where(messages > 1, slope * link.tail, slope)
    return np.rint(messages * link.alpha_ns + work).astype(np.int64)


def leg_times(cluster: ClusterSpec, copies_WRR: IntArray, token_bytes: int) -> LegTimes:
    """Port times of one all-to-all leg in which rank a sends copies_WRR[w, a, b] copies of `token_bytes` to rank b."""
    node_R = cluster.node_R
    same_RR = node_R[:, None] == node_R[None, :]
    out_WR, in_WR = (np.zeros(copies_WRR.shape[:2], dtype=np.int64) for _ in range(2))
    for link, pick_RR in ((cluster.intra, same_RR), (cluster.inter, ~same_RR)):
        copies = copies_WRR * pick_RR
        for axis, total in ((2, out_WR), (1, in_WR)):
            duration = port_ns(link, (copies > 0).sum(axis=axis), copies.sum(axis=axis), token_bytes)
            np.maximum(total, duration, out=total)
    windows, nodes = copies_WRR.shape[0], cluster.nodes
    uplink_out, uplink_in = (np.zeros((windows, nodes), dtype=np.int64) for _ in range(2))
    if cluster.uplink is not None and nodes > 1:
        away = (copies_WRR * ~same_RR).reshape(windows, nodes, cluster.ranks_per_node, nodes, cluster.ranks_per_node)
        between_WNN = away.sum(axis=(2, 4))
        for axis, target in ((2, uplink_out), (1, uplink_in)):
            target[:] = port_ns(
                cluster.uplink, (between_WNN > 0).sum(axis=axis), between_WNN.sum(axis=axis), token_bytes
            )
    return LegTimes(out_WR, in_WR, uplink_out, uplink_in)


def expert_ns(cluster: ClusterSpec, model: ModelSpec, tokens_WP: IntArray) -> IntArray:
    """Time of each rank's grouped expert FFN, (W, R). Experts without tokens are not read (memory-bound decode)."""
    compute = cluster.compute
    read_ns = model.expert_bytes / compute.weight_read_gbytes_per_s
    work_WP = np.where(
        tokens_WP > 0, np.maximum(read_ns, tokens_WP * (2 * model.expert_params / compute.flops_per_ns)), 0
    )
    per_rank = work_WP.reshape(len(tokens_WP), cluster.num_ranks, -1).sum(axis=2)
    if cluster.rank_speed:
        per_rank = per_rank / np.array(cluster.rank_speed)
    per_rank = np.where(per_rank > 0, per_rank + compute.launch_us * 1e3, 0)
    cores = None if cluster.software is None else cluster.software.shared_cores
    if cores is not None and cores < cluster.num_ranks:
        # ranks that share cores are done no earlier than the cores with everybody's work
        together = per_rank.sum(axis=1, keepdims=True) / cores
        per_rank = np.where(per_rank > 0, np.maximum(per_rank, together), 0)
    return np.rint(per_rank).astype(np.int64)


def attention_ns(cluster: ClusterSpec, model: ModelSpec, home_WR: IntArray) -> IntArray:
    """Time of each rank's non-expert part of a layer (attention, shared experts) for its own tokens, (W, R).

    A weight-read / GEMM estimate; the KV cache is not priced. Where the model gives no attention_params, the software's
    fixed cost of a layer is all.
    """
    params = model.attention_params + 3 * model.hidden_size * model.shared_intermediate_size
    compute = cluster.compute
    read_ns = params * model.weight_bytes / compute.weight_read_gbytes_per_s
    work = np.maximum(read_ns, home_WR * (2 * params / compute.flops_per_ns))
    if cluster.rank_speed:
        work = work / np.array(cluster.rank_speed)
    work = np.where((home_WR > 0) & (params > 0), work + compute.launch_us * 1e3, 0)
    fixed = 0.0 if cluster.software is None else cluster.software.layer_us * 1e3
    return np.rint(work + fixed).astype(np.int64)


def packing_ns(cluster: ClusterSpec, mode: DispatchMode, home_WR: IntArray) -> IntArray:
    """What each rank's software adds to one dispatch, or to one combine, of its own tokens, (W, R)."""
    cost = None if cluster.software is None else cluster.software.exchanges.get(mode)
    if cost is None:
        return np.zeros_like(home_WR)
    return np.rint((cost.fixed_us + home_WR * cost.token_us) * 1e3).astype(np.int64)


def gather_copies(home_WR: IntArray) -> IntArray:
    """Copies (W, R, R) of the all-gather that ends a `coherent` iteration: every rank's new tokens to every other rank.

    ExFlow section 4: contexts live on every rank, so each token is made known everywhere once, by the rank of its last
    layer's first expert.
    `home_WR` counts the tokens that end on each rank.
    """
    ranks = home_WR.shape[1]
    copies = np.repeat(home_WR[:, :, None], ranks, axis=2)
    copies[:, np.arange(ranks), np.arange(ranks)] = 0
    return copies


def rank_load(tokens_WP: IntArray, num_ranks: int) -> IntArray:
    """(token, expert) pairs per rank, (W, R)."""
    return tokens_WP.reshape(len(tokens_WP), num_ranks, -1).sum(axis=2)


def closed_form_ns(cluster: ClusterSpec, model: ModelSpec, traffic: LayerTraffic) -> dict[str, IntArray]:
    """Duration of each phase of one layer when ranks start every phase together, {phase: (W,)}."""
    token_bytes = model.token_bytes
    dispatch, combine = (
        [packing_ns(cluster, traffic.mode, traffic.home_WR).max(axis=1)]
        + [leg_times(cluster, leg, token_bytes).slowest_W for leg in legs]
        for legs in (traffic.legs_WRR, traffic.returns_WRR)
    )
    return {
        "attention": attention_ns(cluster, model, traffic.home_WR).max(axis=1),
        "dispatch": np.sum(dispatch, axis=0, dtype=np.int64),
        "experts": expert_ns(cluster, model, traffic.tokens_WP).max(axis=1),
        "combine": np.sum(combine, axis=0, dtype=np.int64),
    }
