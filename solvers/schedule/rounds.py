"""An all-to-all cut into rounds in which no port is hot: bipartite decompositions of the byte matrix, priced.

Legend: W windows, R ranks, N nodes, G rounds. Copies are token copies, times nanoseconds.
Two families. birkhoff: pairs split over rounds, so that the rounds' longest messages add up to the busiest port; but
each round costs its messages' alpha. one_factor: each pair whole, in R - 1 rounds. Which wins is for the cost model.
"""

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from placer.core.cluster import ClusterSpec
from placer.core.cost import leg_times
from placer.core.plan import relative_gap
from placer.core.schedule import Rounds, expand_leg
from solvers.schedule.birkhoff import birkhoff, complete
from solvers.schedule.one_factor import one_factor_rounds

__all__ = [
    "FAMILIES",
    "Family",
    "RoundsResult",
    "plan_rounds",
    "rounds_bound_ns",
    "rounds_families",
    "rounds_price_ns",
]

IntArray = npt.NDArray[np.int64]

Family = Literal["one_factor", "birkhoff"]

FAMILIES: tuple[Family, ...] = get_args(Family)

CAPS = (0, 1, 1.5, 2, 3, 4)
"""Most rounds that split pairs, in multiples of R - 1; what they leave is placed whole."""
RESTARTS = 4
UNITS = 1 << 40


@dataclass(frozen=True, slots=True, kw_only=True)
class RoundsResult:
    """Rounds, how they were made, and their time over the windows they were planned on (mean; a bound for any)."""

    rounds: Rounds
    family: Family
    objective_ns: float
    bound_ns: float

    @property
    def gap(self) -> float:
        """(objective - bound) / objective."""
        gap = relative_gap(self.objective_ns, self.bound_ns)
        assert gap is not None
        return gap


def plan_rounds(
    copies_WRR: IntArray, cluster: ClusterSpec, copy_bytes: int, *, rng: np.random.Generator
) -> RoundsResult:
    """The better of the two families. Two ranks at least; no copies on the diagonal."""
    return min(
        rounds_families(copies_WRR, cluster, copy_bytes, rng=rng).values(), key=lambda result: result.objective_ns
    )


def rounds_families(
    copies_WRR: IntArray, cluster: ClusterSpec, copy_bytes: int, *, rng: np.random.Generator
) -> dict[Family, RoundsResult]:
    """The best rounds of each family for the mean of `copies_WRR`, priced on every window by the cost model.

    Guarantee: one_factor has R - 1 rounds; the objective is exact (`placer.core.cost.leg_times` of every round).
    Complexity: O(R^4 log R) and O(W G R^2) to price, G <= 4 R.
    """
    ranks = cluster.num_ranks
    assert ranks > 1
    mean_RR = copies_WRR.mean(axis=0)
    time_RR, alpha_RR, uplink_RR, uplink_alpha = _times(cluster, copy_bytes)
    message_RR = mean_RR > 0
    bound = rounds_bound_ns(copies_WRR, cluster, copy_bytes)

    def result(family: Family, to_GR: IntArray, share_GR: npt.NDArray[np.float64]) -> RoundsResult:
        rounds = Rounds(to_GR=to_GR, share_GR=share_GR)
        price = rounds_price_ns(copies_WRR, rounds, cluster, copy_bytes)
        return RoundsResult(rounds=rounds, family=family, objective_ns=price, bound_ns=min(bound, price))

    whole_GR = one_factor_rounds(
        mean_RR * time_RR + alpha_RR * message_RR,
        mean_RR * uplink_RR + uplink_alpha * message_RR * (uplink_RR > 0),
        cluster.node_R,
        restarts=RESTARTS,
        rng=rng,
    )
    load_RR = mean_RR * time_RR
    most = float(load_RR.max())
    load = np.rint(load_RR * (UNITS / most if most > 0 else 0.0)).astype(np.int64)
    caps = sorted({round(cap * (ranks - 1)) for cap in CAPS})
    to_GR, amount_GR = birkhoff(load, caps[-1])
    split = [complete(load, to_GR[:cap], amount_GR[:cap]) for cap in caps if cap <= len(to_GR) or cap == caps[0]]
    if len(to_GR) not in caps:
        split.append(complete(load, to_GR, amount_GR))
    return {
        "one_factor": result("one_factor", whole_GR, np.ones(whole_GR.shape)),
        "birkhoff": min((result("birkhoff", *one) for one in split), key=lambda found: found.objective_ns),
    }


def rounds_price_ns(copies_WRR: IntArray, rounds: Rounds, cluster: ClusterSpec, copy_bytes: int) -> float:
    """Mean over windows of the rounds' time one after the other, every rank waiting for the slowest of a round."""
    legs = expand_leg(copies_WRR, "rounds", cluster.ranks_per_node, rounds)
    return float(np.sum([leg_times(cluster, leg, copy_bytes).slowest_W for leg in legs], axis=0).mean())


def rounds_bound_ns(copies_WRR: IntArray, cluster: ClusterSpec, copy_bytes: int) -> float:
    """What no rounds can beat, mean over windows: the busiest port, one message at a time.

    A rank sends one message a round, so all that it sends, over either link class, comes one after the other; likewise
    what it receives, and what a node's uplink carries (one message at least for each node it talks to).
    Up to half a nanosecond a round may be lost to rounding.
    """
    time_RR, alpha_RR, _, _ = _times(cluster, copy_bytes)
    load_WRR = copies_WRR * time_RR + alpha_RR * (copies_WRR > 0)
    ports = [load_WRR.sum(axis=axis).max(axis=1) for axis in (1, 2)]
    if cluster.uplink is not None and cluster.nodes > 1:
        node_R = cluster.node_R
        away = copies_WRR * (node_R[:, None] != node_R)
        shape = (len(away), cluster.nodes, cluster.ranks_per_node, cluster.nodes, cluster.ranks_per_node)
        between_WNN = away.reshape(shape).sum(axis=(2, 4))
        slope = copy_bytes / cluster.uplink.gbytes_per_s
        load_WNN = between_WNN * slope + cluster.uplink.alpha_ns * (between_WNN > 0)
        ports += [load_WNN.sum(axis=axis).max(axis=1) for axis in (1, 2)]
    return float(np.max(ports, axis=0).mean())


def _times(
    cluster: ClusterSpec, copy_bytes: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], npt.NDArray[np.float64], float]:
    """What a copy and a message of every pair cost on the ports, and a copy and a message on the uplinks."""
    node_R = cluster.node_R
    same_RR = node_R[:, None] == node_R
    slope_RR = copy_bytes / np.where(same_RR, cluster.intra.gbytes_per_s, cluster.inter.gbytes_per_s)
    alpha_RR = np.where(same_RR, cluster.intra.alpha_ns, cluster.inter.alpha_ns)
    if cluster.uplink is None:
        return slope_RR, alpha_RR, np.zeros(same_RR.shape), 0.0
    uplink_RR = np.where(same_RR, 0.0, copy_bytes / cluster.uplink.gbytes_per_s)
    return slope_RR, alpha_RR, uplink_RR, cluster.uplink.alpha_ns
