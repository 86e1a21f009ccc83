"""Certificate for affinity: multipliers that prove how few transitions between layers can change rank or node.

The pairs of layers separate but for the load cap, so one linear program holds them all (`transition_lp`). It is solved
on promising arcs, then judged on all of them (`transition_dual`); arcs that should have been in and biclique cuts that
its point breaks are added, and it goes on from there.

Legend: L layers, Q pairs of layers, E experts, R ranks, G groups (ranks or nodes), A arcs, N cuts.
"""

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from placer.core.certificates import Certificate, verify
from placer.core.errors import UsageError
from placer.core.problem import PlacementProblem
from solvers.affinity.assign import assign
from solvers.bounds.transition_search import TransitionSearch
from solvers.bounds.transition_spectrum import SplitSearch

__all__ = ["MOST_ROUNDS", "TransitionBound", "transition_certificate"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]

STEPS = 200
MOST_ROUNDS = 40
STALLED = 2e-5
"""A round that proves less than this more, of the kept flow, is the last but two."""

SPLIT_ROUNDS, SPLIT_STEPS = 8, 4
COARSE = 1e-3
"""The same where the spectrum follows, which forgets the last digits."""


class TransitionBound:
    """An anytime bound on cut + node_weight * cut_nodes, under problem.max_par where that is given.

    Guarantee: valid whenever it is looked at. Exact on ranks for one expert per rank, else it ends near the optimum of
    the programs' relaxation. Complexity O(L E^2 + STEPS * arcs) a round.
    Raises UsageError without transitions or with redundant or empty slots.
    """

    def __init__(self, problem: PlacementProblem, node_weight: float) -> None:
        profile, cluster = problem.profile, problem.cluster
        if profile.transition_LEE is None or not profile.transition_LEE.sum():
            raise UsageError("the profile has no transitions between layers; give a per-token trace")
        if problem.redundant or problem.allow_empty_slots:
            raise UsageError("the bound on affinity is for one copy of each expert and equal slots per rank")
        self.problem = problem
        self.node_weight = node_weight if cluster.nodes > 1 else 0.0
        flow_LEE = profile.transition_LEE.astype(np.float64)
        self.total = float(flow_LEE.sum())
        capped = problem.max_par is not None and cluster.num_ranks < problem.num_slots
        self.levels = [_Level(problem, flow_LEE, cluster.num_ranks, capped=capped, cuts=True)]
        if self.node_weight > 0:
            self.levels.append(_Level(problem, flow_LEE, cluster.nodes, capped=False, cuts=False))

    @property
    def bound(self) -> float:
        """What is proven by now."""
        cuts = [max(0.0, 1 - level.best_kept / self.total) for level in self.levels]
        return cuts[0] + sum(self.node_weight * cut for cut in cuts[1:])

    def step(self) -> bool:
        """One round on every level that still moves; False when none does."""
        for level in self.levels:
            level.step()
        return not all(level.done for level in self.levels)

    def certificate(self) -> Certificate:
        """The proof of `bound`, as verified."""
        ranks, *nodes = [level.best for level in self.levels]
        arrays = {f"rank_{name}": ranks[name] for name in ("u_LE", "v_LE", "tau_N", "biclique_N5")}
        numbers = {"price": float(ranks["price"][0]), "node_weight": self.node_weight}
        name, parts = "cut", ["b-matching"]
        if len(arrays["rank_tau_N"]):
            parts.append("biclique cuts")
        if numbers["price"] > 0:
            parts.append("load multipliers")
            arrays |= {name: ranks[name] for name in ("mu_LE", "nu_LE")}
        for level in nodes:
            arrays |= {f"node_{name}": level[name] for name in ("u_LE", "v_LE", "split_LEE") if name in level}
            parts += ["spectrum on nodes"] if "split_LEE" in level else []
            name = f"cut + {self.node_weight:.3g} * cut_nodes"
        proof = " + ".join(parts)
        draft = Certificate(
            kind="kept", objective_name=name, bound=-np.inf, proof=proof, arrays=arrays, numbers=numbers
        )
        return replace(draft, bound=verify(self.problem, draft))


def transition_certificate(
    problem: PlacementProblem,
    *,
    node_weight: float = 0.0,
    deadline: float = np.inf,
    enough: Callable[[float], bool] | None = None,
) -> Certificate:
    """Works on a TransitionBound until it stands still, `enough(bound)` or time.perf_counter() passes `deadline`."""
    finder = TransitionBound(problem, node_weight)
    while finder.step() and time.perf_counter() < deadline and not (enough is not None and enough(finder.bound)):
        pass
    return finder.certificate()


class _Level:
    """The bound for one size of groups (ranks, or nodes): the best multipliers found and the search for better."""

    def __init__(self, problem: PlacementProblem, flow_LEE: FloatArray, groups: int, *, capped: bool, cuts: bool):
        width = flow_LEE.shape[1] // groups
        self.flow_LEE, self.groups, self.cuts, self.with_spectrum = flow_LEE, groups, cuts, not cuts
        self.split: SplitSearch | None = None
        self.rounds = self.stalled = self.split_rounds = 0
        self.search: TransitionSearch | None = None
        if width == 1:
            self.best, self.best_kept = _one_partner(flow_LEE)
        else:
            self.search = TransitionSearch(problem, flow_LEE, width, capped=capped, cuts=cuts)
            self.best_kept = self.search.judge()
            self.best = self.search.multipliers()

    @property
    def done(self) -> bool:
        """Nothing more is to be expected."""
        matched = self.search is None or self.stalled >= 3 or self.rounds >= MOST_ROUNDS
        return matched and (self.search is None or not self.with_spectrum or self.split_rounds >= SPLIT_ROUNDS)

    def step(self) -> None:
        """One round: steps of the method, judgement, arcs and cuts for the next; then the spectrum, if it is wanted."""
        if self.search is None or self.done:
            return
        if self.stalled >= 3 or self.rounds >= MOST_ROUNDS:
            if self.split is None:
                self.split = SplitSearch(self.flow_LEE, self.groups, self.best["u_LE"], self.best["v_LE"])
            self.split.step(SPLIT_STEPS)
            self.split_rounds += 1
            if self.split.kept < self.best_kept:
                self.best, self.best_kept = self.split.multipliers(), self.split.kept
            return
        if self.rounds:
            self.search.extend()
        self.rounds += 1
        self.search.advance(STEPS)
        kept = self.search.judge()
        self.stalled = self.stalled + 1 if kept > self.best_kept * (1 - (STALLED if self.cuts else COARSE)) else 0
        if kept < self.best_kept:
            self.best, self.best_kept = self.search.multipliers(), kept


def _one_partner(flow_LEE: FloatArray) -> tuple[dict[str, FloatArray], float]:
    """Each pair of layers is a linear assignment; its prices prove the optimum exactly."""
    pairs, experts = flow_LEE.shape[:2]
    u_LE, v_LE = np.zeros((pairs, experts)), np.zeros((pairs, experts))
    for pair, flow_EE in enumerate(flow_LEE):
        assign(flow_EE, v_LE[pair])
        u_LE[pair] = (flow_EE - v_LE[pair]).max(axis=1)
    found = {
        "u_LE": u_LE, "v_LE": v_LE, "tau_N": np.zeros(0), "biclique_N5": np.zeros((0, 5)), "price": np.zeros(1)
    }  # fmt: skip
    return found, float(u_LE.sum() + v_LE.sum())
