"""Schedule: how the all-to-alls of each layer run: algorithm, pipeline degree, and the order in which pairs send.

Legend: L routing sites, R ranks, G rounds, W windows, T tokens. Copies are token copies.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from placer.core.modes import DispatchMode

__all__ = [
    "ALGORITHMS",
    "KINDS",
    "SCHEDULED_MODES",
    "Algorithm",
    "Kind",
    "Rounds",
    "Schedule",
    "chunk_index",
    "expand_leg",
]

IntArray = npt.NDArray[np.int64]

Algorithm = Literal["linear", "2dh", "rounds"]
"""linear: every pair at once. 2dh: inside the node first, so that one message goes from node to node for each local
index (Tutel section 3.3). rounds: in each round a rank sends to one rank at most and receives from one at most."""

Kind = Literal["prefill", "decode"]
"""What an iteration does: many new tokens of each request, or one."""

ALGORITHMS: tuple[Algorithm, ...] = get_args(Algorithm)

KINDS: tuple[Kind, ...] = get_args(Kind)

SCHEDULED_MODES: tuple[DispatchMode, ...] = ("per_expert", "per_rank", "coherent")
"""Modes whose all-to-all may be 2dh or rounds; per_node has two levels of its own and allgather has none."""

MOST_CHUNKS = 64
SHARE_SLACK = 1e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class Rounds:
    """An all-to-all cut into rounds, from a bipartite decomposition of the byte matrix.

    to_GR      the rank that each rank sends to in each round, -1 for none; no rank is sent to twice in a round
    share_GR   share of that pair's copies that travels in this round; the shares of every pair of different ranks add
               up to 1 over the rounds
    """

    to_GR: IntArray
    share_GR: npt.NDArray[np.float64]

    def __post_init__(self) -> None:
        if self.to_GR.ndim != 2 or self.to_GR.shape != self.share_GR.shape:
            raise UsageError(f"rounds.to_GR is {self.to_GR.shape}, share_GR {self.share_GR.shape}; both are (G, R)")
        ranks = self.to_GR.shape[1]
        if self.to_GR.min(initial=0) < -1 or self.to_GR.max(initial=0) >= ranks:
            raise UsageError(f"rounds.to_GR has rank {self.to_GR.max(initial=0)}; there are {ranks}, and -1 for none")
        if (self.share_GR < 0).any():
            raise UsageError(f"rounds.share_GR has {self.share_GR.min()}; shares are 0 or more")
        for round_, to_R in enumerate(self.to_GR):
            sends = to_R[to_R >= 0]
            if len(np.unique(sends)) < len(sends) or (to_R == np.arange(ranks)).any():
                raise UsageError(f"rounds.to_GR round {round_}: a rank receives twice or sends to itself")
        short_RR = np.abs(self.cumulative_GRR[-1] - ~np.eye(ranks, dtype=bool)) if len(self.to_GR) else np.ones((1, 1))
        if ranks > 1 and short_RR.max() > SHARE_SLACK:
            sender, receiver = np.unravel_index(short_RR.argmax(), short_RR.shape)
            raise UsageError(f"rounds: the shares of pair {sender} -> {receiver} do not add up to 1 over the rounds")

    @property
    def cumulative_GRR(self) -> npt.NDArray[np.float64]:
        """Share of each pair's copies that has travelled after each round."""
        rounds, ranks = self.to_GR.shape
        share_GRR = np.zeros((rounds, ranks, ranks))
        at_G, sender = np.nonzero(self.to_GR >= 0)
        share_GRR[at_G, sender, self.to_GR[at_G, sender]] = self.share_GR[at_G, sender]
        return np.cumsum(share_GRR, axis=0)

    def bounds(self, copies_RR: IntArray) -> IntArray:
        """How many of each pair's copies have travelled after each round, int64 (G, ..., R, R) for (..., R, R)."""
        cumulative_GRR = self.cumulative_GRR
        shape = (len(cumulative_GRR), *(1,) * (copies_RR.ndim - 2), *cumulative_GRR.shape[1:])
        # shares are sums of rounded fractions: what is meant to be whole must not lose a copy
        done = np.floor(cumulative_GRR.reshape(shape) * copies_RR + SHARE_SLACK * np.maximum(1, copies_RR))
        return np.minimum(done.astype(np.int64), copies_RR)

    def transposed(self) -> "Rounds":
        """The rounds of the way back: who received, sends."""
        to_GR, share_GR = np.full_like(self.to_GR, -1), np.zeros_like(self.share_GR)
        at_G, sender = np.nonzero(self.to_GR >= 0)
        receiver = self.to_GR[at_G, sender]
        to_GR[at_G, receiver], share_GR[at_G, receiver] = sender, self.share_GR[at_G, sender]
        return Rounds(to_GR=to_GR, share_GR=share_GR)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Algorithm and pipeline degree of every layer; `rounds_L` has Rounds where the algorithm is rounds, else None.

    Degree d cuts a rank's tokens of a layer into d chunks (`chunk_index`): while one chunk is computed, others travel.
    On the streams that carry messages all dispatches go first, in order, then all combines (FSMoE figure 3).
    """

    algorithm_L: tuple[Algorithm, ...]
    degree_L: tuple[int, ...]
    rounds_L: tuple[Rounds | None, ...]

    def __post_init__(self) -> None:
        if not len(self.algorithm_L) == len(self.degree_L) == len(self.rounds_L):
            raise UsageError(
                f"schedule has {len(self.algorithm_L)} algorithms, {len(self.degree_L)} degrees and "
                f"{len(self.rounds_L)} rounds; give one of each for every layer"
            )
        for layer, (algorithm, degree, rounds) in enumerate(
            zip(self.algorithm_L, self.degree_L, self.rounds_L, strict=True)
        ):
            if algorithm not in ALGORITHMS:
                raise UsageError(f"schedule.algorithm_L[{layer}] is {algorithm!r}; use one of {', '.join(ALGORITHMS)}")
            if isinstance(degree, bool) or not isinstance(degree, int) or not 1 <= degree <= MOST_CHUNKS:
                raise UsageError(f"schedule.degree_L[{layer}] is {degree!r}; give 1 to {MOST_CHUNKS}")
            if (algorithm == "rounds") != (rounds is not None):
                raise UsageError(f"schedule.rounds_L[{layer}] does not fit algorithm {algorithm!r}; rounds need theirs")

    @classmethod
    def uniform(
        cls, layers: int, *, algorithm: Algorithm = "linear", degree: int = 1, rounds: Rounds | None = None
    ) -> "Schedule":
        """The same for every layer."""
        return cls(algorithm_L=(algorithm,) * layers, degree_L=(degree,) * layers, rounds_L=(rounds,) * layers)

    def refuse_misfit(self, mode: DispatchMode, layers: int, num_ranks: int) -> None:
        """Raises UsageError where this schedule cannot run under `mode` for that many layers and ranks."""
        if len(self.algorithm_L) != layers:
            raise UsageError(f"the schedule is for {len(self.algorithm_L)} layers, there are {layers}")
        if mode not in SCHEDULED_MODES and any(algorithm != "linear" for algorithm in self.algorithm_L):
            raise UsageError(f"mode {mode} has no 2dh or rounds; use linear, or one of {', '.join(SCHEDULED_MODES)}")
        if mode == "allgather" and any(degree > 1 for degree in self.degree_L):
            raise UsageError("mode allgather is not pipelined; use degree 1")
        for layer, rounds in enumerate(self.rounds_L):
            if rounds is not None and rounds.to_GR.shape[1] != num_ranks:
                raise UsageError(
                    f"schedule.rounds_L[{layer}] is for {rounds.to_GR.shape[1]} ranks, there are {num_ranks}"
                )

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` inverts it."""
        rounds_L = [
            None if one is None else {"to_GR": one.to_GR.tolist(), "share_GR": np.round(one.share_GR, 9).tolist()}
            for one in self.rounds_L
        ]
        return {"algorithm_L": list(self.algorithm_L), "degree_L": list(self.degree_L), "rounds_L": rounds_L}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Schedule":
        """Inverts `to_dict`. Raises UsageError, TypeError, KeyError or ValueError for anything else."""
        if unknown := sorted(set(data) - {"algorithm_L", "degree_L", "rounds_L"}):
            raise UsageError(f"schedule: unknown field {unknown[0]!r}; remove it or use a newer placer")
        rounds_L = tuple(
            None
            if one is None
            else Rounds(
                to_GR=np.array(one["to_GR"], dtype=np.int64), share_GR=np.array(one["share_GR"], dtype=np.float64)
            )
            for one in data["rounds_L"]
        )
        return cls(algorithm_L=tuple(data["algorithm_L"]), degree_L=tuple(data["degree_L"]), rounds_L=rounds_L)


def expand_leg(
    copies_WRR: IntArray, algorithm: Algorithm, ranks_per_node: int, rounds: Rounds | None = None
) -> tuple[IntArray, ...]:
    """The legs, in order, that carry an all-to-all of copies_WRR[w, a, b] from a to b, (W, R, R) each.

    2dh: rank (n, i) hands what is meant for local index j of any node to (n, j); then (n, j) sends to (m, j).
    Every copy for another node travels once over the network, as in linear.
    """
    if algorithm == "linear":
        return (copies_WRR,)
    if algorithm == "rounds":
        assert rounds is not None
        done_GWRR = rounds.bounds(copies_WRR)
        return tuple(np.diff(done_GWRR, axis=0, prepend=0))
    windows, ranks, _ = copies_WRR.shape
    nodes = ranks // ranks_per_node
    by_node = copies_WRR.reshape(windows, nodes, ranks_per_node, nodes, ranks_per_node)
    inside, across = np.zeros_like(by_node), np.zeros_like(by_node)
    node, local = np.arange(nodes), np.arange(ranks_per_node)
    # advanced indices put their axis first: (N, W, i, j) and (j, W, n, m)
    inside[:, node, :, node, :] = by_node.sum(axis=3).transpose(1, 0, 2, 3)
    across[:, :, local, :, local] = by_node.sum(axis=2).transpose(3, 0, 1, 2)
    inside[:, :, local, :, local] = 0
    across[:, node, :, node, :] = 0
    return inside.reshape(copies_WRR.shape), across.reshape(copies_WRR.shape)


def chunk_index(location_T: IntArray, window_T: IntArray, num_ranks: int, degree: int) -> IntArray:
    """The chunk (0 .. degree - 1) in which each token travels, (T,): the i-th of a rank's n tokens of an iteration, in
    the order of the trace, is in chunk i * degree // n. The executor cuts by the same rule."""
    if degree == 1:
        return np.zeros(len(location_T), dtype=np.int64)
    key = window_T * num_ranks + location_T
    order = np.argsort(key, kind="stable")
    count = np.bincount(key)
    first = np.cumsum(count) - count
    place = np.empty(len(key), dtype=np.int64)
    place[order] = np.arange(len(key)) - first[key[order]]
    return place * degree // count[key]
