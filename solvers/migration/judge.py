"""What a placement of one layer costs: ranks touched or load alone, and PAR on the requests seen and on fresh draws.

Legend: H expert sets, E experts, R ranks, C slots per rank, P = R C slots, B draws of the load.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.evaluate import par
from placer.core.evaluate_profile import serve_layer
from placer.core.problem import PlacementProblem
from placer.core.profile import ExpertSets
from placer.core.replicas import layer_slots
from solvers.touch.anneal import touched
from solvers.touch.caps import JUDGE_DRAWS, JUDGE_SPREAD, load_draws
from solvers.touch.objective import node_price, touch_objective

__all__ = ["LayerJudge", "Verdict", "judges_of", "rewards_locality"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Verdict:
    """Cost of one layer's placement, PAR expected on unseen requests, PAR on those seen; lower is better."""

    cost: float
    par: float
    par_seen: float


class LayerJudge:
    """Judges rows of one layer exactly: expert sets as the replica choice serves them, as `check` and `evaluate` do.

    `locality`: cost is ranks touched (+ nodes at the links' price) per token; otherwise PAR with equal shares.
    """

    def __init__(self, problem: PlacementProblem, layer: int, judge_EB: FloatArray, locality: bool) -> None:
        self.problem, self.judge_EB, self.locality = problem, judge_EB, locality
        profile = problem.profile
        self.sets = profile.sets[layer] if profile.sets else None
        self.light_sets: ExpertSets | None = None
        self.load_E = profile.load_LE[layer].astype(np.float64)
        self.node_weight = node_price(problem)

    def judge(self, row_P: IntArray) -> Verdict:
        """The verdict on one row of slots; -1 is an empty slot."""
        cluster, experts = self.problem.cluster, self.problem.profile.model.num_experts
        slots = layer_slots(row_P, experts, cluster.num_ranks, cluster.ranks_per_node)
        replicated = bool((slots.count_E > 1).any())
        used = row_P >= 0
        equal_ER = np.zeros((experts, cluster.num_ranks))
        np.add.at(equal_ER, (row_P[used], slots.rank_P[used]), slots.share_P[used])
        cost, share_ER = 0.0, equal_ER
        if self.sets is not None and replicated:
            if self.light_sets is None:
                self.light_sets = self.sets.split_heavy()
            served = serve_layer(slots, self.problem.replica_choice, self.light_sets)
            share_ER = np.zeros_like(equal_ER)
            np.add.at(share_ER, (row_P[used], slots.rank_P[used]), served.share_P[used])
            cost = served.ranks + self.node_weight * served.nodes
        elif self.sets is not None and self.locality:
            rank_E = slots.rank_P[slots.slot_EN[:, 0]]
            cost = touched(self.sets.expert_HK, self.sets.weight_H, rank_E, cluster.num_ranks)
            if self.node_weight > 0:
                node_E = slots.node_R[rank_E]
                cost += self.node_weight * touched(self.sets.expert_HK, self.sets.weight_H, node_E, cluster.nodes)
        speed_R = cluster.speed_R
        if self.locality and self.sets is not None:
            cost /= max(1, int(self.sets.weight_H.sum()))
        else:
            cost = float(par(self.load_E @ equal_ER, speed_R))
        return Verdict(
            cost=cost,
            par=float(par(self.judge_EB.T @ share_ER, speed_R).mean()),
            par_seen=float(par(self.load_E @ share_ER, speed_R)),
        )


def rewards_locality(problem: PlacementProblem) -> bool:
    """Whether the mode sends fewer copies to fewer ranks, and the profile knows which experts go together."""
    return bool(problem.profile.sets) and problem.mode in ("per_rank", "per_node", "coherent")


def judges_of(problem: PlacementProblem, seed: int, *, load_only: bool = False) -> tuple[list[LayerJudge], str]:
    """A judge for every layer, and the name of the objective, the mean of their costs: PAR where `load_only`."""
    profile = problem.profile
    locality = not load_only and rewards_locality(problem)
    draws_LEB = load_draws(profile.load_FLE, JUDGE_DRAWS, seed + 1, spread=JUDGE_SPREAD)
    judges = [LayerJudge(problem, layer, draws_EB, locality) for layer, draws_EB in enumerate(draws_LEB)]
    return judges, touch_objective(problem)[0] if locality else "par"
