"""Affinity: experts that follow each other on one rank, under a load cap, with a certificate of how few could be cut.

For `coherent` dispatch, where a token stays where its expert was: the objective is the share of transitions between
consecutive layers whose two experts lie on different ranks, plus node_weight times the share on different nodes.

Legend: L layers, E experts, R ranks.
"""

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from placer.core.certificates import Certificate
from placer.core.errors import UsageError
from placer.core.problem import PlacementProblem
from solvers.affinity.chain import Chain
from solvers.affinity.search import BLOCKS, Incumbent, anneal_cycle, start_chain
from solvers.bounds.transition import MOST_ROUNDS, TransitionBound
from solvers.ranks import rank_of_expert, slots_of_ranks
from solvers.result import SolveResult, StoppedBy
from solvers.score import HOPS
from solvers.touch.caps import refuse_impossible_cap

__all__ = ["solve_affinity"]

IntArray = npt.NDArray[np.int64]

FIRST_ROUNDS = 2
SEARCH_SHARE = 0.55
"""Of the time limit; the bound gets the rest."""

CYCLES = ((0.1, 0.02), (1.0, 0.3))
"""First temperature and price: the first cycle bends the assignment, the second forgets it (better for few experts)."""

AGAIN = 4
"""The better of them is run again: with many experts this many times as long, with few so many times."""

MANY_EXPERTS = 64
TICKS = (len(CYCLES) + AGAIN) * BLOCKS + FIRST_ROUNDS + MOST_ROUNDS


def solve_affinity(
    problem: PlacementProblem,
    *,
    seed: int = 0,
    time_limit_s: float = 60.0,
    gap: float = 0.0,
    start_LP: IntArray | None = None,
    progress: Callable[[int, int], None] | None = None,
    node_weight: float = HOPS,
) -> SolveResult:
    """Least cut + node_weight * cut_nodes (nodes > 1) at mean PAR <= problem.max_par; one copy of each expert.

    Forward assignment, sweeps, annealing with a rising price of overload; then multipliers that bound the cut from
    below. The cap holds on the requests seen always, and on draws of unseen ones as `coactivation` has it.
    Guarantee: none beyond the certified bound; optimal with one expert per rank on one node. Deterministic for a seed
    unless the time limit or Ctrl-C stops it; then the best so far is returned.
    Complexity: O(L E^2) a sweep, O(1) a try of annealing; memory O(L E^2).
    Raises UsageError without transitions or with redundant slots, InfeasibleError for an impossible cap.
    Reference: the objective is ExFlow's (arXiv 2401.08383, equation 8) on counts of all k * k transitions.
    """
    started = time.perf_counter()
    transitions = problem.profile.transition_LEE
    if transitions is None or not transitions.sum():
        raise UsageError("the profile has no transitions between layers; use --solver lpt, or give a per-token trace")
    if problem.redundant:
        raise UsageError("affinity places one copy of each expert; use --solver replicated with --redundant")
    if problem.cluster.speed_R is not None:
        raise UsageError("affinity takes all ranks for equally fast; use lpt or coactivation with rank_speed")
    refuse_impossible_cap(problem)
    layers, ranks = problem.profile.model.num_sites, problem.cluster.num_ranks
    weight = node_weight if problem.cluster.nodes > 1 else 0.0
    chain = Chain.of(problem, weight, seed)
    best = Incumbent(chain, chain.relabel(chain.balanced_LE))
    if start_LP is not None and start_LP.shape == (layers, problem.num_slots):
        best.offer(rank_of_expert(start_LP, ranks, problem.profile.model.num_experts))
    run = _Run(problem, chain, best, seed, started, time_limit_s, gap, progress)
    stopped_by: StoppedBy
    try:
        stopped_by = run.work()
    except KeyboardInterrupt:
        stopped_by = "interrupt"
    certificate = run.certificate()
    bound = min(certificate.bound, best.cut) if certificate else 0.0
    if certificate is not None and best.excess == 0 and best.cut <= bound + 1e-9:
        stopped_by = "optimal"
    return SolveResult(
        solver="affinity",
        status="solved",
        stopped_by=stopped_by,
        slot_expert_LP=slots_of_ranks(best.rank_LE, ranks),
        objective_name="cut" if weight == 0 else f"cut + {weight:.3g} * cut_nodes",
        objective=best.cut,
        bound=bound,
        bound_by=certificate.proof if certificate else "nothing is cut less than never",
        seconds=time.perf_counter() - started,
        message=_promise(chain, best),
        certificate=certificate,
        trail=tuple(run.trail),
    )


class _Run:
    """The order of work: a first placement, a first bound, cycles of search, and the bound until it stands still."""

    def __init__(
        self,
        problem: PlacementProblem,
        chain: Chain,
        best: Incumbent,
        seed: int,
        started: float,
        time_limit_s: float,
        gap: float,
        progress: Callable[[int, int], None] | None,
    ) -> None:
        self.problem, self.chain, self.best, self.seed = problem, chain, best, seed
        self.started, self.time_limit_s, self.gap, self.progress = started, time_limit_s, gap, progress
        self.finder: TransitionBound | None = None
        self.ticks = 0
        self.cut_short = False
        self.trail: list[str] = [f"lpt, ranks renamed: {best.cut:.6f}"]

    def certificate(self) -> Certificate | None:
        """What is proven by now; None before the first multipliers or where empty slots are allowed."""
        return self.finder.certificate() if self.finder is not None else None

    def work(self) -> StoppedBy:
        """Why it stopped."""
        chain, best = self.chain, self.best
        first_LE = start_chain(chain, self._until(SEARCH_SHARE))
        self._note("assignment and sweeps", best.offer(first_LE))
        if not self.problem.allow_empty_slots:
            self.finder = TransitionBound(self.problem, chain.node_weight)
        self._prove(FIRST_ROUNDS, SEARCH_SHARE)
        self._search(first_LE)
        self._prove(MOST_ROUNDS, 1.0)
        if self.progress:
            self.progress(TICKS, TICKS)
        if self._near_enough():
            return "gap"
        return "time_limit" if self.cut_short else "effort"

    def _search(self, first_LE: IntArray) -> None:
        cuts: list[float] = []
        repeats, length = (1, AGAIN) if self.chain.flow_LEE.shape[1] > MANY_EXPERTS else (AGAIN, 1)
        for cycle in range(len(CYCLES) + repeats):
            if self._late(SEARCH_SHARE) or self._near_enough():
                break
            again = cycle >= len(CYCLES)
            hot, price = CYCLES[int(np.argmin(cuts[: len(CYCLES)])) if again else cycle]
            mine = Incumbent(self.chain, self.chain.balanced_LE)
            rng = np.random.default_rng([self.seed, cycle])
            blocks = BLOCKS * (length if again else 1)
            try:
                anneal_cycle(self.chain, first_LE, mine, hot, price, blocks, rng, self._until(SEARCH_SHARE), self._tick)
            finally:
                cuts.append(mine.cut if mine.excess == 0 else np.inf)
                self._note(f"annealing from {hot:g}" + " again" * again, self.best.offer(mine.rank_LE))
            self.cut_short |= self._late(SEARCH_SHARE)

    def _prove(self, rounds: int, share: float) -> None:
        """Some rounds of the bound."""
        for _ in range(rounds if self.finder is not None else 0):
            if self._near_enough():
                return
            if self._late(share):
                self.cut_short = True
                return
            assert self.finder is not None
            moving = self.finder.step()
            self._tick()
            if not moving:
                return

    def _near_enough(self) -> bool:
        """The gap asked for is reached."""
        if self.finder is None or self.best.excess > 0:
            return False
        return self.finder.bound >= self.best.cut * (1 - self.gap) - 1e-9

    def _until(self, share: float) -> float:
        return self.started + share * self.time_limit_s

    def _late(self, share: float) -> bool:
        return time.perf_counter() > self._until(share)

    def _note(self, what: str, better: bool) -> None:
        if better:
            self.trail.append(f"{what}: {self.best.cut:.6f}")

    def _tick(self) -> None:
        self.ticks += 1
        if self.progress:
            self.progress(min(self.ticks, TICKS - 1), TICKS)


def _promise(chain: Chain, best: Incumbent) -> str:
    """One line for the user about the load of requests that were not seen."""
    if not np.isfinite(chain.cap_seen):
        return ""
    if chain.judge_LEB.shape[2] == 1:
        return "too few requests to say anything about unseen ones"
    text = f"PAR on unseen requests is estimated at {chain.par(best.rank_LE)[1]:.3f}"
    if chain.cap_expected > chain.cap_seen:
        text += f", above the cap {chain.cap_seen:g} that those planned on meet: requests differ too much"
    return text
