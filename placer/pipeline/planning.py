"""From a source to a plan: the problem, the solver, the check, and the judgement on the same requests or others."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from placer.config.settings import ProfileSettings, SolveSettings
from placer.core.check import assert_runnable, check
from placer.core.cluster import ClusterSpec
from placer.core.errors import InfeasibleError, MismatchError, SolverError, UsageError
from placer.core.evaluate import Evaluation, evaluate
from placer.core.evaluate_profile import ProfileEvaluation, evaluate_profile
from placer.core.modes import DispatchMode
from placer.core.plan import Plan
from placer.core.problem import PlacementProblem
from placer.core.profile import Profile
from placer.pipeline.migrating import refuse_budget_without_plan, towards
from placer.pipeline.sources import Progress, Source, profile_of, sources_of, warn_mismatch
from solvers.balance.load import par_bound
from solvers.registry import SOLVERS, run_solver
from solvers.result import SolveResult
from solvers.touch.caps import balanced_window_par
from traces.trace import RoutingTrace

__all__ = ["BASELINES", "DEFAULT_CAP", "Solved", "judge", "make_plan", "solve"]

DEFAULT_CAP = 1.10
BASELINES = tuple(name for name, info in SOLVERS.items() if info.baseline)
"""Solvers whose plans are shown as they are, even where they break a rule that they do not know."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A plan, how it was found, and what it does to the requests it was planned on.

    moved_experts, moved_bytes, moved_layers   what is sent to get there from the plan that was given; None without one
    """

    plan: Plan
    result: SolveResult
    problem: PlacementProblem
    evaluation: Evaluation | ProfileEvaluation
    warnings: tuple[str, ...] = ()
    moved_experts: int | None = None
    moved_bytes: int | None = None
    moved_layers: int | None = None


def make_plan(problem: PlacementProblem, result: SolveResult, seed: int) -> Plan:
    """The plan of a solved result. Raises InfeasibleError or SolverError where there is none."""
    if result.slot_expert_LP is None:
        error = InfeasibleError if result.status == "infeasible" else SolverError
        raise error(f"{result.solver}: {result.message or 'no placement found'}")
    model, cluster = problem.profile.model, problem.cluster
    return Plan(
        model=model.name,
        num_experts=model.num_experts,
        num_ranks=cluster.num_ranks,
        ranks_per_node=cluster.ranks_per_node,
        moe_layers=model.moe_layers,
        slot_expert_LP=result.slot_expert_LP,
        mode=problem.mode,
        replica_choice=problem.replica_choice,
        replica_share_LP=result.replica_share_LP,
        solver=result.solver,
        status=result.status,
        stopped_by=result.stopped_by,
        objective_name=result.objective_name,
        objective=result.objective,
        bound=result.bound,
        bound_by=result.bound_by,
        seed=seed,
        num_hidden_layers=model.num_hidden_layers,
        hashes=problem.hashes(),
    )


def solve(
    source: Source,
    cluster: ClusterSpec,
    *,
    mode: DispatchMode = "per_rank",
    redundant: int = 0,
    max_par: float | Literal["auto"] | None = "auto",
    solver: str = "auto",
    time_limit_s: float = 60.0,
    gap: float = 0.0,
    seed: int = 0,
    current: Plan | None = None,
    profile_settings: ProfileSettings | None = None,
    solve_settings: SolveSettings | None = None,
    progress: Progress | None = None,
    note: Callable[[str], None] | None = None,
) -> Solved:
    """Plans on all the requests in `source` and judges on the same; judge on others with `judge`.

    `note` is told who improved the plan, and by how much, while solver "auto" runs.

    `max_par` "auto" is 1.10, or 5 % above the proven least PAR where that is more; None or inf is no cap.
    Raises InfeasibleError, SolverError, UsageError. A plan that comes back is legal, but baseline solvers may leave the
    load cap unmet (then a warning says so) and EPLB's own rules may repeat an expert on a rank.
    """
    settings, counting = solve_settings or SolveSettings(), profile_settings or ProfileSettings()
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"seed is {seed!r}; give a whole number, 0 or more")
    if not 0 <= gap < 1:
        raise UsageError(f"gap is {gap!r}; give a share of the objective, at least 0 and below 1")
    free = PlacementProblem(
        profile=profile_of(source, counting),
        cluster=cluster,
        mode=mode,
        redundant=redundant,
        replica_choice=settings.replica_choice,
        batch_tokens=settings.batch_tokens,
        allow_empty_slots=settings.allow_empty_slots,
    )
    _refuse_empty_layers(free.profile)
    if current is None:
        refuse_budget_without_plan(settings)
    cap = max(DEFAULT_CAP, round(1.05 * par_bound(free), 4)) if max_par == "auto" else max_par
    problem = _capped(free, cap, settings)
    start, warnings = None, []
    if current is not None:
        warnings += warn_mismatch(current, problem.profile.model, cluster)
        if broken := check(replace(problem, max_par=None), current):
            raise MismatchError(f"the plan to start from is not legal here: {broken[0]}")
        start = current.slot_expert_LP
    if mode == "allgather":
        warnings.append("allgather sends every token to every rank: placement can gain balance only, not locality")
    result = run_solver(
        solver, problem, seed=seed, time_limit_s=time_limit_s, gap=gap, start_LP=start, progress=progress, note=note
    )
    if result.stopped_by == "interrupt":
        warnings.append("interrupted: this is the best plan found so far")
    if start is not None and solver != "auto" and "start_LP" not in SOLVERS[solver].takes:
        warnings.append(f"solver {result.solver} starts afresh; --from is not used")
    moved = {}
    if current is not None and result.slot_expert_LP is not None:
        migrated = towards(problem, current, result, settings, seed)
        result, warnings = migrated.result, [*warnings, *migrated.warnings]
        moved = {
            "moved_experts": len(migrated.moves),
            "moved_bytes": migrated.moves.moved_bytes(problem.profile.model.expert_bytes),
            "moved_layers": len(migrated.moves.layers),
        }
    plan = make_plan(problem, result, seed)
    for violation in check(problem, plan):
        baseline = solver in BASELINES
        if violation.code == "max-par" and max_par == "auto":
            # nobody asked for this cap: a baseline is shown as it is, a solver did what it could
            warnings += [] if baseline else [f"the default load cap is not met: {violation.message}"]
        elif violation.code == "max-par" and not baseline:
            budget = moved and (settings.max_moved_gib, settings.max_moved_layers) != (None, None)
            mend = " or solve.max_moved_gib, solve.max_moved_layers" if budget else ""
            raise InfeasibleError(f"{result.solver}: no placement found under the cap: {violation.message}{mend}")
        elif baseline and violation.code == "memory":
            raise InfeasibleError(f"{result.solver} gives every rank equal slots: {violation}")
        elif baseline and violation.code in ("max-par", "same-rank-replicas"):
            warnings.append(f"{violation} ({result.solver} does not know this rule; export refuses repeats)")
        else:
            raise SolverError(f"{result.solver} returned an illegal plan: {violation}")
    evaluation = judge(plan, source, cluster, settings, window_tokens=counting.window_tokens)
    return Solved(plan=plan, result=result, problem=problem, evaluation=evaluation, warnings=tuple(warnings), **moved)


def _capped(free: PlacementProblem, max_par: float | None, settings: SolveSettings) -> PlacementProblem:
    """The problem with its caps; windows are capped where pooled PAR is and the profile has more than one of them."""
    if max_par is None or max_par == float("inf"):
        return free
    given = settings.max_window_par
    if given != "balanced":
        return replace(free, max_par=max_par, max_window_par=given)
    several = len(free.profile.load_WLE) > 1
    return replace(free, max_par=max_par, max_window_par=round(balanced_window_par(free), 4) if several else None)


def judge(
    plan: Plan,
    source: Source,
    cluster: ClusterSpec,
    settings: SolveSettings | None = None,
    *,
    window_tokens: int = 2048,
    modes: tuple[DispatchMode, ...] = (),
) -> Evaluation | ProfileEvaluation:
    """What `plan` does to `source`: exact replay of a trace, counts otherwise.

    Raises ViolationError for a plan that cannot be run, MismatchError for one of another shape.
    """
    settings = settings or SolveSettings()
    assert_runnable(plan)
    if not isinstance(source, RoutingTrace):
        warn_mismatch(plan, source.model, cluster)
        return evaluate_profile(plan, profile_of(source, ProfileSettings()), cluster.speed_R)
    return evaluate(
        plan,
        source.model,
        cluster,
        source.expert_LTK,
        sources_of(source, cluster.num_ranks),
        window_tokens=window_tokens,
        batch_tokens=settings.batch_tokens,
        modes=modes,
    )


def _refuse_empty_layers(profile: Profile) -> None:
    empty = np.flatnonzero(profile.load_LE.sum(axis=1) == 0)
    if len(empty):
        layers = [profile.model.moe_layers[row] for row in empty[:6]]
        raise UsageError(
            f"no token chose any expert in layer(s) {layers}: dense layers recorded as MoE layers, or a recorder that "
            "missed them; import the recording again without --model, which drops them, or with the model whose dense "
            "layers they are"
        )
