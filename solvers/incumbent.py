"""The best placement and the best bound so far, and who brought them: what the stages of the portfolio share.

Whose answer is kept. A placement under the load cap beats one above it. Else, where the goal is not PAR itself, the
answer of a search replaces any baseline's, even one that looks better: searches keep the cap on requests not seen yet
as well (they start from the incumbent, so they take it where it keeps that promise), baselines ignore it. After that
only searches can improve on it, and exact solvers, which ignore it too, where the PAR to be expected of unseen requests
and the PAR in windows are within their caps or no more than before. Else the lower objective wins, and the earlier
answer on a tie. A bound counts whoever's placement is kept: it is about all that keep the cap on the profile.

Legend: L layers, E experts, P slots, R ranks, B draws of the load.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.certificates import Certificate
from placer.core.errors import PlacerError
from placer.core.problem import PlacementProblem
from solvers.balance.load import mean_par, rank_load_LR
from solvers.result import SolveResult, StoppedBy
from solvers.score import Goal, Score, goal_of, repeats, score
from solvers.stages import Stage
from solvers.touch.caps import JUDGE_DRAWS, JUDGE_SPREAD, load_draws

__all__ = ["Answer", "Incumbent"]

IntArray = npt.NDArray[np.int64]
TIE = 1e-12


@dataclass(frozen=True, slots=True)
class Answer:
    """A placement that some stage returned, and what it is worth on the profile."""

    kind: str
    result: SolveResult
    score: Score

    @property
    def slots_LP(self) -> IntArray:
        """The placement."""
        assert self.result.slot_expert_LP is not None
        return self.result.slot_expert_LP


class Incumbent:
    """What is known so far: the incumbent, the bound and who proved it, and the trail of who did what."""

    def __init__(
        self, problem: PlacementProblem, given_LP: IntArray | None, seed: int, note: Callable[[str], None] | None
    ) -> None:
        self.seed = seed
        self.problem, self.given_LP, self.note = problem, given_LP, note
        self.started = time.perf_counter()
        self.goal: Goal = goal_of(problem)
        self.best: Answer | None = None
        self.trail: list[str] = []
        self.bound, self.bound_by = -np.inf, ""
        self.certificate: Certificate | None = None
        self.first_error: PlacerError | None = None
        self.out_of_time = False
        self.solved = False

    def say(self, line: str) -> None:
        """A line of the trail, with the time."""
        self.trail.append(f"{line} after {time.perf_counter() - self.started:.1f} s")
        if self.note:
            self.note(self.trail[-1])

    def left_s(self, time_limit_s: float) -> float:
        """Seconds until the limit."""
        return time_limit_s - (time.perf_counter() - self.started)

    @property
    def of_baseline(self) -> bool:
        """Whether the best so far is a baseline's."""
        return self.best is not None and self.best.kind == "baseline"

    def start_LP(self) -> IntArray | None:
        """Where a search starts: from the user's own placement rather than a baseline's, if there is one."""
        if self.best is None or (self.best.kind == "baseline" and self.given_LP is not None):
            return self.given_LP
        return self.best.slots_LP

    def take_answer(self, stage: Stage, result: SolveResult) -> None:
        """Scores what a stage returned and keeps it if it is the best so far."""
        if result.slot_expert_LP is None:
            self.say(f"{stage.solver}: no placement ({result.message or result.status})")
            return
        if repeats(result.slot_expert_LP, self.problem.cluster.num_ranks):
            self.say(f"{stage.solver}: not used, a rank holds an expert twice")
            return
        scored = score(self.problem, result.slot_expert_LP, result.replica_share_LP, self.goal)
        answer = Answer(stage.kind, result, scored)
        text = f"{stage.solver}: {scored.objective:.4g}"
        if not scored.feasible:
            text += f" (PAR {scored.par:.4g} is above the cap)"
        before = self.best
        if before is not None and not _wins(answer, before, self.goal):
            self.say(f"{text}, no better")
        elif before is not None and stage.kind == "exact" and self.breaks_promise(answer, before):
            self.say(f"{text}, not used: its PAR on unseen requests or in windows would be above the cap")
        else:
            self.best = answer
            start = "" if before is None else f"{before.result.solver}: {before.score.objective:.4g} -> "
            self.say(start + text)
        if result.bound is not None and result.objective_name == self.goal.name:
            self.take_bound(result.bound, result.bound_by or result.solver, result.certificate)

    def breaks_promise(self, answer: Answer, before: Answer) -> bool:
        """Whether unseen requests, or windows, are above their cap and further above it than with a search's."""
        cap = self.problem.max_par
        if cap is None or before.kind == "baseline" or not before.score.feasible or self.goal.kind == "par":
            return False
        draws_LEB = load_draws(self.problem.profile.load_FLE, JUDGE_DRAWS, self.seed + 1, spread=JUDGE_SPREAD)
        draws_BLE, cluster = draws_LEB.transpose(2, 0, 1), self.problem.cluster
        ranks, speed_R = cluster.num_ranks, cluster.speed_R

        def mean_of(loads: Iterable[npt.NDArray[Any]], one: Answer) -> float:
            return float(np.mean([mean_par(rank_load_LR(load_LE, one.slots_LP, ranks), speed_R) for load_LE in loads]))

        checks: list[tuple[Iterable[npt.NDArray[Any]], float]] = [(draws_BLE, cap)]
        if self.problem.max_window_par is not None:
            checks.append((self.problem.profile.load_WLE, self.problem.max_window_par))
        return any(mean_of(loads, answer) > max(limit, mean_of(loads, before)) + TIE for loads, limit in checks)

    def take_bound(self, bound: float, bound_by: str, certificate: Certificate | None) -> None:
        """Keeps the larger of two bounds."""
        if bound > self.bound + TIE:
            start = f"{self.bound:.4g} -> " if np.isfinite(self.bound) else ""
            self.bound, self.bound_by, self.certificate = bound, bound_by, certificate
            self.say(f"bound: {start}{bound:.4g} ({bound_by})")

    def within(self, gap: float) -> bool:
        """Whether the incumbent is proven to be within `gap` of the best."""
        if self.best is None or not self.best.score.feasible:
            return False
        objective = self.best.score.objective
        return objective - self.bound <= gap * abs(objective) + TIE

    def result(self, stopped_by: StoppedBy) -> SolveResult:
        """The incumbent under its finder's name."""
        assert self.best is not None
        found, objective = self.best.result, self.best.score.objective
        # a placement above the cap may be below a bound on those that keep it
        known = np.isfinite(self.bound) and (self.best.score.feasible or self.bound <= objective)
        return replace(
            found,
            status="solved",
            stopped_by=stopped_by,
            objective_name=self.goal.name,
            objective=objective,
            bound=min(self.bound, objective) if known else None,
            bound_by=self.bound_by if known else "",
            certificate=self.certificate if known else None,
            seconds=time.perf_counter() - self.started,
            trail=tuple(self.trail),
        )


def _wins(answer: Answer, best: Answer, goal: Goal) -> bool:
    """Whether `answer` replaces the incumbent; the rule is the module's docstring."""
    if answer.score.feasible != best.score.feasible:
        return answer.score.feasible
    if goal.kind != "par":
        if best.kind == "baseline" and answer.kind == "search":
            return True
        if answer.kind == "baseline" and best.kind != "baseline":
            return False
    return answer.score.objective < best.score.objective - TIE
