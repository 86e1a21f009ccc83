"""The portfolio that `auto` stands for: several solvers in order of cost, one objective, one incumbent, one bound.

Which solvers run on which problems is the table in `solvers.stages`; what is minimised is `solvers.score.goal_of`.

Whose answer is kept. A placement under the load cap beats one above it. Else, where the goal is not PAR itself, the
answer of a search replaces any baseline's, even one that looks better: searches keep the cap on requests not seen yet
as well (they start from the incumbent, so they take it where it keeps that promise), baselines ignore it. After that
only searches and exact solvers can improve on it. Else the lower objective wins, and the earlier answer on a tie.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module

import numpy as np
import numpy.typing as npt

from placer.core.certificates import Certificate
from placer.core.errors import DependencyError, InfeasibleError, PlacerError, SolverError, UsageError
from placer.core.problem import PlacementProblem
from solvers import stages
from solvers.bounds.closed_form import closed_form
from solvers.interrupts import interruptible
from solvers.registry import run_solver
from solvers.result import SolveResult, StoppedBy
from solvers.score import Goal, Score, goal_of, repeats, score
from solvers.stages import Stage
from solvers.touch.caps import refuse_impossible_cap
from solvers.touch.coactivation import node_price

__all__ = ["solve_portfolio"]

IntArray = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]
TIE = 1e-12
STEPS = 1000


@dataclass(frozen=True, slots=True)
class _Answer:
    """A placement that some stage returned, and what it is worth on the profile."""

    kind: str
    result: SolveResult
    score: Score


class _Run:
    """What is known so far: the incumbent, the bound and who proved it, and the trail of who did what."""

    def __init__(
        self, problem: PlacementProblem, given_LP: IntArray | None, note: Callable[[str], None] | None
    ) -> None:
        self.problem, self.given_LP, self.note = problem, given_LP, note
        self.started = time.perf_counter()
        self.goal: Goal = goal_of(problem)
        self.best: _Answer | None = None
        self.trail: list[str] = []
        self.bound, self.bound_by = -np.inf, ""
        self.certificate: Certificate | None = None
        self.first_error: PlacerError | None = None
        self.out_of_time = False

    def say(self, line: str) -> None:
        """A line of the trail, with the time."""
        self.trail.append(f"{line} after {time.perf_counter() - self.started:.1f} s")
        if self.note:
            self.note(self.trail[-1])

    def left_s(self, time_limit_s: float) -> float:
        """Seconds until the limit."""
        return time_limit_s - (time.perf_counter() - self.started)

    def start_LP(self) -> IntArray | None:
        """Where a search starts: from the user's own placement rather than a baseline's, if there is one."""
        if self.best is None or (self.best.kind == "baseline" and self.given_LP is not None):
            return self.given_LP
        return self.best.result.slot_expert_LP

    def take_answer(self, stage: Stage, result: SolveResult) -> None:
        """Scores what a stage returned and keeps it if it is the best so far."""
        if result.slot_expert_LP is None:
            self.say(f"{stage.solver}: no placement ({result.message or result.status})")
            return
        if repeats(result.slot_expert_LP, self.problem.cluster.num_ranks):
            self.say(f"{stage.solver}: not used, a rank holds an expert twice")
            return
        scored = score(self.problem, result.slot_expert_LP, result.replica_share_LP, self.goal)
        answer = _Answer(stage.kind, result, scored)
        text = f"{stage.solver}: {scored.objective:.4g}"
        if not scored.feasible:
            text += f" (PAR {scored.par:.4g} is above the cap)"
        before = self.best
        if before is None or _wins(answer, before, self.goal):
            self.best = answer
            start = "" if before is None else f"{before.result.solver}: {before.score.objective:.4g} -> "
            self.say(start + text)
        else:
            self.say(f"{text}, no better")
        if result.bound is not None and result.objective_name == self.goal.name:
            self.take_bound(result.bound, result.bound_by or result.solver, result.certificate)

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


def solve_portfolio(
    problem: PlacementProblem,
    *,
    seed: int = 0,
    time_limit_s: float = 60.0,
    gap: float = 0.0,
    start_LP: IntArray | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> SolveResult:
    """The best placement that any applicable solver finds, with the best bound that any of them proves.

    Parameters
    ----------
    seed, time_limit_s, gap
        stops when all stages are done, when the incumbent is proven within `gap` of the best, or when time is up; a
        stage gets its share of the time that is left, and baselines run whatever the time
    start_LP
        a legal placement to start from, int64 (layers, slots), else ignored; a baseline's answer named "given"
    progress, note
        called with (steps done, all steps); and with every line of the trail as it happens

    Returns a result in its finder's name whose objective is the problem's one (`solvers.score`), whoever found it.
    Ctrl-C ends it with the incumbent and stopped_by "interrupt". A stage that fails is noted in the trail.

    Raises
    ------
    InfeasibleError
        where no placement can meet the cap
    PlacerError
        the first stage's own, where every stage failed
    KeyboardInterrupt
        where there is no incumbent yet

    Notes
    -----
    Deterministic for a seed unless the time limit stops it. Guarantee: bound <= optimum under the cap on the profile.
    Complexity: that of the stages, plus one scoring each.
    """
    if not problem.allow_empty_slots:
        refuse_impossible_cap(problem)
    if start_LP is not None and start_LP.shape != (problem.profile.model.num_sites, problem.num_slots):
        start_LP = None
    run = _Run(problem, start_LP, note)
    todo = stages.stages_for(problem, stages.STAGES)
    stopped_by: StoppedBy | None = None
    with interruptible() as interrupt:
        if (certificate := closed_form(problem, run.goal.name)) is not None:
            run.take_bound(certificate.bound, certificate.proof, certificate)
        if start_LP is not None:
            given = SolveResult(solver="given", status="solved", stopped_by="effort", slot_expert_LP=start_LP)
            run.take_answer(Stage(solver="given", kind="baseline"), given)
        long = [stage for stage in todo if stage.kind != "baseline"]
        for stage in todo:
            left_s = run.left_s(time_limit_s)
            if stage.kind != "baseline":
                # a baseline within the gap still has to be seen by the search that knows about unseen requests
                if run.within(gap) and not (stage.kind == "search" and _baseline(run)):
                    break
                if left_s <= 0:
                    run.out_of_time = True
                    break
            stopped = _run_stage(
                run,
                stage,
                seed=seed,
                time_limit_s=max(stage.share * left_s, 1e-3),
                gap=gap,
                progress=_part_of(progress, long.index(stage), len(long)) if stage in long else None,
            )
            if stopped == "interrupt":
                stopped_by = "interrupt"
                break
    if interrupt.error is not None:
        stopped_by = "interrupt"
        if run.best is None:
            raise interrupt.error
    if run.best is None:
        raise run.first_error or SolverError(f"no stage returned a placement: {'; '.join(run.trail)}")
    if stopped_by is None and run.within(gap):
        stopped_by = "optimal" if run.within(0.0) else "gap"
    if progress:
        progress(STEPS, STEPS)
    return run.result(stopped_by or ("time_limit" if run.out_of_time else "effort"))


def _run_stage(
    run: _Run, stage: Stage, *, seed: int, time_limit_s: float, gap: float, progress: Progress | None
) -> StoppedBy | None:
    """One stage's answer or bound, taken into `run`; why it stopped. Its own failures are noted."""
    try:
        if stage.kind == "bound":
            bound_touched = import_module(stage.solver).bound_touched
            certificate: Certificate = bound_touched(
                run.problem, node_weight=node_price(run.problem), time_limit_s=time_limit_s, progress=progress
            )
            run.take_bound(certificate.bound, certificate.proof, certificate)
            return None
        result = run_solver(
            stage.solver,
            _without_sets(run.problem) if run.goal.kind == "par" and stage.kind == "exact" else run.problem,
            seed=seed,
            time_limit_s=time_limit_s,
            gap=gap,
            start_LP=run.start_LP(),
            progress=progress,
        )
    except (SolverError, InfeasibleError, UsageError, DependencyError) as error:
        run.first_error = run.first_error or error
        run.say(f"{stage.solver}: failed ({error})")
        return None
    run.take_answer(stage, result)
    run.out_of_time |= result.stopped_by == "time_limit"
    return result.stopped_by


def _without_sets(problem: PlacementProblem) -> PlacementProblem:
    """The problem that knows loads only: an exact solver that sees sets would minimise ranks touched."""
    return replace(problem, profile=replace(problem.profile, sets=()))


def _wins(answer: _Answer, best: _Answer, goal: Goal) -> bool:
    """Whether `answer` replaces the incumbent; the rule is the module's docstring."""
    if answer.score.feasible != best.score.feasible:
        return answer.score.feasible
    if goal.kind != "par":
        if best.kind == "baseline" and answer.kind == "search":
            return True
        if answer.kind == "baseline" and best.kind != "baseline":
            return False
    return answer.score.objective < best.score.objective - TIE


def _baseline(run: _Run) -> bool:
    return run.best is not None and run.best.kind == "baseline"


def _part_of(progress: Progress | None, index: int, count: int) -> Progress | None:
    """Progress of one of `count` long stages as progress of the whole, which ends only when the whole does."""
    if progress is None:
        return None

    def show(done: int, total: int) -> None:
        whole = STEPS * (index + min(1.0, done / max(1, total))) / count
        progress(min(int(whole), STEPS - 1), STEPS)

    return show
