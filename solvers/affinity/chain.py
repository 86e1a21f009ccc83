"""A chain of layers ready for search: flows, load shares, caps, and what a placement costs.

Legend: L layers, E experts, R ranks, B draws.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.problem import PlacementProblem
from solvers.affinity.assign import assign
from solvers.affinity.chain_start import gain_of_layer, kept_flow
from solvers.balance.lpt import lpt_slots
from solvers.ranks import rank_of_expert
from solvers.touch.caps import JUDGE_DRAWS, JUDGE_SPREAD, NEAR_FLOOR, load_draws

__all__ = ["Chain"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Chain:
    """flow_LEE and its transpose back_LEE; share_LE: load of an expert over the mean rank load; judge_LEB: the same on
    draws of what unseen requests may load; balanced_LE: ranks by load alone, and floor_L its PAR; cap_seen and
    cap_expected: caps on the mean PAR of the requests seen and of the draws (inf: none)."""

    flow_LEE: FloatArray
    back_LEE: FloatArray
    share_LE: FloatArray
    judge_LEB: FloatArray
    node_R: IntArray
    node_weight: float
    balanced_LE: IntArray
    floor_L: FloatArray
    cap_seen: float
    cap_expected: float

    @classmethod
    def of(cls, problem: PlacementProblem, node_weight: float, seed: int) -> "Chain":
        """The chain of a problem whose profile has transitions and that has no redundant slots."""
        profile, ranks = problem.profile, problem.cluster.num_ranks
        assert profile.transition_LEE is not None
        flow_LEE = profile.transition_LEE.astype(np.float64)
        slots_LP = lpt_slots(profile.load_LE, problem.num_slots, ranks, seed=seed)
        balanced_LE = rank_of_expert(slots_LP, ranks, profile.model.num_experts)
        capped = problem.max_par is not None and problem.slots_per_rank > 1
        draws_LEB = load_draws(profile.load_FLE, JUDGE_DRAWS if capped else 1, seed + 1, spread=JUDGE_SPREAD)
        share_LE = _shares(profile.load_LE.astype(np.float64)[:, :, None], ranks)[:, :, 0]
        judge_LEB = _shares(draws_LEB, ranks)
        floor_L = _par(share_LE[:, :, None], balanced_LE, ranks)[:, 0]
        cap_seen = cap_expected = np.inf
        if capped and problem.max_par is not None:
            cap_seen = problem.max_par
            cap_expected = max(cap_seen, float(_par(judge_LEB, balanced_LE, ranks).mean()) + NEAR_FLOOR)
        return cls(
            flow_LEE, np.ascontiguousarray(flow_LEE.transpose(0, 2, 1)), np.ascontiguousarray(share_LE), judge_LEB,
            problem.cluster.node_R, node_weight, balanced_LE, floor_L, cap_seen, cap_expected,
        )  # fmt: skip

    @property
    def ranks(self) -> int:
        """R."""
        return len(self.node_R)

    def kept(self, rank_LE: IntArray) -> float:
        """Flow kept on ranks + node_weight * flow kept on nodes."""
        kept = kept_flow(self.flow_LEE, rank_LE)
        return kept + (self.node_weight * kept_flow(self.flow_LEE, self.node_R[rank_LE]) if self.node_weight else 0.0)

    def cut(self, rank_LE: IntArray) -> float:
        """The objective: share of flow cut between ranks + node_weight * share cut between nodes."""
        total = max(1.0, float(self.flow_LEE.sum()))
        return max(0.0, 1 + self.node_weight - self.kept(rank_LE) / total)

    def par(self, rank_LE: IntArray) -> tuple[float, float]:
        """Mean over layers of PAR: of the requests seen, and as expected of unseen ones."""
        seen = float(_par(self.share_LE[:, :, None], rank_LE, self.ranks).mean())
        return seen, float(_par(self.judge_LEB, rank_LE, self.ranks).mean())

    def excess(self, rank_LE: IntArray) -> float:
        """By how much the caps are missed; not above 0 where both are met."""
        if not np.isfinite(self.cap_seen):
            return 0.0
        seen, expected = self.par(rank_LE)
        return max(seen - self.cap_seen, expected - self.cap_expected) - 1e-9

    def caps(self, mean: float) -> FloatArray:
        """A cap for each layer with the given mean: the same for all but those whose balanced PAR is above it."""
        low, high = 0.0, max(mean, float(self.floor_L.max()))
        for _ in range(50):
            middle = (low + high) / 2
            low, high = (middle, high) if np.maximum(self.floor_L, middle).mean() <= mean else (low, middle)
        return np.maximum(self.floor_L, low)

    def relabel(self, rank_LE: IntArray) -> IntArray:
        """The same groups of experts with ranks renamed so that more flow stays; load does not change. Never worse.

        On one node the renaming of each layer carries all later layers with it, which is exact for the groups; with
        nodes each layer is renamed between its neighbours.
        """
        rank_LE, ranks = rank_LE.copy(), self.ranks
        with_nodes = self.node_weight > 0
        for layer in range(1, len(rank_LE)):
            after = with_nodes and layer + 1 < len(rank_LE)
            gain_ER = gain_of_layer(
                self.flow_LEE, rank_LE, layer, ranks, self.node_R, self.node_weight, True, after
            )  # fmt: skip
            gain_RR = np.zeros((ranks, ranks))
            np.add.at(gain_RR, rank_LE[layer], gain_ER)
            name_R = assign(gain_RR, np.zeros(ranks))
            if gain_RR[np.arange(ranks), name_R].sum() > np.trace(gain_RR) * (1 + 1e-12):
                if with_nodes:
                    rank_LE[layer] = name_R[rank_LE[layer]]
                else:
                    rank_LE[layer:] = name_R[rank_LE[layer:]]
        return rank_LE


def _shares(load_LEB: FloatArray, ranks: int) -> FloatArray:
    """Loads over the mean rank load of their layer (and draw)."""
    result: FloatArray = load_LEB * ranks / np.maximum(1e-300, load_LEB.sum(axis=1, keepdims=True))
    return result


def _par(share_LEB: FloatArray, rank_LE: IntArray, ranks: int) -> FloatArray:
    """PAR of each layer and draw, (L, B); 1 where nothing is loaded."""
    layers, experts, draws = share_LEB.shape
    load_LRB = np.zeros((layers, ranks, draws))
    order_LE = np.argsort(rank_LE, axis=1, kind="stable")
    grouped = np.take_along_axis(share_LEB, order_LE[:, :, None], axis=1)
    load_LRB = grouped.reshape(layers, ranks, experts // ranks, draws).sum(axis=2)
    result: FloatArray = np.maximum(load_LRB.max(axis=1), 1.0)
    return result
