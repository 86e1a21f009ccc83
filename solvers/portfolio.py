"""The portfolio that `auto` stands for: several solvers in order of cost, one objective, one incumbent, one bound.

Which solvers run on which problems is the table in `solvers.stages`, what is minimised `solvers.score.goal_of`, and
whose answer is kept the rule of `solvers.incumbent`.
"""

from collections.abc import Callable
from dataclasses import replace
from importlib import import_module

import numpy as np
import numpy.typing as npt

from placer.core.certificates import Certificate
from placer.core.errors import DependencyError, InfeasibleError, SolverError, UsageError
from placer.core.problem import PlacementProblem
from solvers import stages
from solvers.bounds.closed_form import closed_form
from solvers.incumbent import Incumbent
from solvers.interrupts import interruptible
from solvers.registry import run_solver
from solvers.result import SolveResult, StoppedBy
from solvers.stages import Stage
from solvers.touch.caps import refuse_impossible_cap
from solvers.touch.objective import node_price

__all__ = ["solve_portfolio"]

IntArray = npt.NDArray[np.int64]
Progress = Callable[[int, int], None]
STEPS = 1000


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
    run = Incumbent(problem, start_LP, seed, note)
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
                if run.within(gap) and not (stage.kind == "search" and run.of_baseline):
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
            if stopped == "interrupt" or run.solved:
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
    run: Incumbent, stage: Stage, *, seed: int, time_limit_s: float, gap: float, progress: Progress | None
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
    # the optimum is known, used or not: there is nothing left to find or to prove
    run.solved |= stage.kind == "exact" and result.stopped_by == "optimal" and result.objective_name == run.goal.name
    return result.stopped_by


def _without_sets(problem: PlacementProblem) -> PlacementProblem:
    """The problem that knows loads only: an exact solver that sees sets would minimise ranks touched."""
    return replace(problem, profile=replace(problem.profile, sets=()))


def _part_of(progress: Progress | None, index: int, count: int) -> Progress | None:
    """Progress of one of `count` long stages as progress of the whole, which ends only when the whole does."""
    if progress is None:
        return None

    def show(done: int, total: int) -> None:
        whole = STEPS * (index + min(1.0, done / max(1, total))) / count
        progress(min(int(whole), STEPS - 1), STEPS)

    return show
