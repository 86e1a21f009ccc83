"""The arrow, station by station: what the command line and the examples call.

RoutingTrace -> Profile -> PlacementProblem -> SolveResult -> Plan -> check, simulate, run, export.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import numpy.typing as npt

from placer.config.settings import ProfileSettings, RunSettings, SolveSettings
from placer.core.check import Violation, assert_runnable, check
from placer.core.cluster import ClusterSpec
from placer.core.dispatch import source_ranks
from placer.core.errors import (
    InfeasibleError,
    InputFileError,
    MismatchError,
    RegressionError,
    SolverError,
    UsageError,
    ViolationError,
)
from placer.core.evaluate import Evaluation, evaluate
from placer.core.evaluate_profile import ProfileEvaluation, evaluate_profile
from placer.core.model import ModelSpec
from placer.core.modes import DispatchMode
from placer.core.plan import Plan
from placer.core.problem import PlacementProblem
from placer.core.profile import Profile
from placer.core.timeline import Timeline
from solvers.load import par_bound
from solvers.registry import SOLVERS, run_solver
from solvers.result import SolveResult
from traces.counts import LoadCounts, load_counts_profile
from traces.profile_store import PROFILE_FORMAT, load_profile
from traces.readers import read_any
from traces.summarize import summarize
from traces.tensorfile import looks_like_tensor_file, read_tensor_file
from traces.trace import RoutingTrace

__all__ = [
    "CheckReport",
    "Solved",
    "check_plan",
    "judge",
    "make_plan",
    "measure",
    "model_of_plan",
    "open_source",
    "open_trace",
    "predict",
    "profile_of",
    "solve",
    "sources_of",
    "warn_mismatch",
]

DEFAULT_CAP = 1.10
BASELINES = ("linear", "round_robin", "eplb", "eplb_hierarchical", "moetuner")
"""Solvers that stand for what others do: they may leave the load cap unmet, and EPLB may repeat an expert on a rank."""

Progress = Callable[[int, int], None]
Source = RoutingTrace | LoadCounts | Profile


@dataclass(frozen=True, slots=True, kw_only=True)
class Solved:
    """A plan, how it was found, and what it does to the requests it was planned on."""

    plan: Plan
    result: SolveResult
    problem: PlacementProblem
    evaluation: Evaluation | ProfileEvaluation
    warnings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """Broken rules, regressions against a baseline, and what the plan does."""

    violations: tuple[Violation, ...]
    regressions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    evaluation: Evaluation | ProfileEvaluation | None = field(default=None)

    def raise_for_status(self) -> None:
        """Raises ViolationError or RegressionError with one line per finding."""
        if self.violations:
            raise ViolationError("\nplacer: ".join(str(violation) for violation in self.violations))
        if self.regressions:
            raise RegressionError("\nplacer: ".join(self.regressions))


def open_source(path: Path, model: ModelSpec | None = None, progress: Progress | None = None) -> Source:
    """A trace, counts or a profile, recognised by content. Raises InputFileError."""
    path = Path(path)
    head = b""
    try:
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(16)
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror})") from error
    if looks_like_tensor_file(head) and read_tensor_file(path).metadata.get("format") == PROFILE_FORMAT:
        return load_profile(path)
    return read_any(path, None, model, progress)


def open_trace(path: Path, model: ModelSpec | None = None, progress: Progress | None = None) -> RoutingTrace:
    """A per-token trace. Raises InputFileError where the file holds counts only."""
    source = open_source(path, model, progress)
    if not isinstance(source, RoutingTrace):
        raise InputFileError(f"{path}: holds load counts only; this needs a trace of every token's experts")
    if source.num_tokens == 0:
        raise InputFileError(f"{path}: holds no tokens; record at least one request")
    return source


def profile_of(source: Source, settings: ProfileSettings, progress: Progress | None = None) -> Profile:
    """The profile of any source; counts and profiles are taken as they are."""
    if isinstance(source, Profile):
        return source
    if isinstance(source, LoadCounts):
        return load_counts_profile(source)
    return summarize(
        source,
        window_tokens=settings.window_tokens,
        folds=settings.folds,
        max_sets_per_layer=settings.max_sets_per_layer,
        progress=progress,
    )


def sources_of(trace: RoutingTrace, num_ranks: int) -> npt.NDArray[np.int64]:
    """Source rank of each token: the trace's own where it has them, else requests dealt to ranks in turn, (T,)."""
    if trace.source_rank_T is None:
        return source_ranks(trace.request_id_T, num_ranks)
    worst = int(trace.source_rank_T.max(initial=0))
    if worst >= num_ranks:
        raise MismatchError(
            f"the trace's source ranks go up to {worst}, the cluster has {num_ranks} ranks; "
            "use the cluster it was recorded on, or a trace without source ranks"
        )
    return trace.source_rank_T.astype(np.int64)


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
) -> Solved:
    """Plans on all the requests in `source` and judges on the same; judge on others with `judge`.

    `max_par` "auto" is 1.10, or 5 % above the proven least PAR where that is more; None or inf is no cap.
    Raises InfeasibleError, SolverError, UsageError. A plan that comes back is legal, but baseline solvers may leave the
    load cap unmet (then a warning says so) and EPLB's own rules may repeat an expert on a rank.
    """
    settings, counting = solve_settings or SolveSettings(), profile_settings or ProfileSettings()
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise UsageError(f"seed is {seed!r}; give a whole number, 0 or more")
    free = PlacementProblem(
        profile=profile_of(source, counting),
        cluster=cluster,
        mode=mode,
        redundant=redundant,
        replica_choice=settings.replica_choice,
        batch_tokens=settings.batch_tokens,
    )
    _refuse_empty_layers(free.profile)
    cap = max(DEFAULT_CAP, round(1.05 * par_bound(free), 4)) if max_par == "auto" else max_par
    problem = replace(free, max_par=None if cap is None or cap == float("inf") else cap)
    start, warnings = None, []
    if current is not None:
        warnings += warn_mismatch(current, problem.profile.model, cluster)
        if broken := check(replace(problem, max_par=None), current):
            raise MismatchError(f"the plan to start from is not legal here: {broken[0]}")
        start = current.slot_expert_LP
    if mode == "allgather":
        warnings.append("allgather sends every token to every rank: placement can gain balance only, not locality")
    result = run_solver(
        solver, problem, seed=seed, time_limit_s=time_limit_s, gap=gap, start_LP=start, progress=progress
    )
    if start is not None and "start_LP" not in SOLVERS[result.solver].takes:
        warnings.append(f"solver {result.solver} starts afresh; --from is not used")
    plan = make_plan(problem, result, seed)
    for violation in check(problem, plan):
        baseline = result.solver in BASELINES and violation.code in ("max-par", "same-rank-replicas")
        if violation.code == "max-par" and not baseline:
            raise InfeasibleError(f"{result.solver}: no placement found under the cap: {violation.message}")
        if not baseline:
            raise SolverError(f"{result.solver} returned an illegal plan: {violation}")
        warnings.append(str(violation))
    evaluation = judge(plan, source, cluster, settings, window_tokens=counting.window_tokens)
    return Solved(plan=plan, result=result, problem=problem, evaluation=evaluation, warnings=tuple(warnings))


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
        return evaluate_profile(plan, profile_of(source, ProfileSettings()))
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


def warn_mismatch(plan: Plan, model: ModelSpec, cluster: ClusterSpec, trace_sha256: str = "") -> list[str]:
    """Warnings where the plan was solved for another trace or cluster of the same shape.

    Raises MismatchError where the shapes differ, so that the plan cannot be used at all.
    """
    if len(plan.slot_expert_LP) != model.num_sites or plan.num_experts != model.num_experts:
        raise MismatchError(
            f"the plan has {len(plan.slot_expert_LP)} MoE layers of {plan.num_experts} experts, the trace "
            f"{model.num_sites} of {model.num_experts}; use the trace's own plan or solve again"
        )
    if (plan.num_ranks, plan.ranks_per_node) != (cluster.num_ranks, cluster.ranks_per_node):
        raise MismatchError(
            f"the plan is for {plan.num_ranks} ranks, {plan.ranks_per_node} a node; cluster {cluster.name!r} has "
            f"{cluster.num_ranks}, {cluster.ranks_per_node} a node; use the plan's cluster or solve again"
        )
    warnings = []
    for name, now in (("trace", trace_sha256), ("model", model.sha256), ("cluster", cluster.sha256)):
        if now and plan.hashes.get(name, now) != now:
            warnings.append(f"the plan was solved for another {name} (hash {plan.hashes[name][:12]}, here {now[:12]})")
    return warnings


def _refuse_empty_layers(profile: Profile) -> None:
    empty = np.flatnonzero(profile.load_LE.sum(axis=1) == 0)
    if len(empty):
        layers = [profile.model.moe_layers[row] for row in empty[:6]]
        raise UsageError(
            f"no token chose any expert in layer(s) {layers}: dense layers recorded as MoE layers, or a recorder that "
            "missed them; import the trace again with its model given, which drops them"
        )


def check_plan(
    plan: Plan,
    source: Source,
    cluster: ClusterSpec,
    *,
    max_par: float | None = None,
    baseline: Plan | None = None,
    max_regression: float = 0.02,
    profile_settings: ProfileSettings | None = None,
    solve_settings: SolveSettings | None = None,
) -> CheckReport:
    """Is the plan legal for this trace and cluster, and no worse than `baseline` on it.

    A regression is PAR, ranks touched or predicted iteration time more than `max_regression` above the baseline's.
    """
    settings, counting = solve_settings or SolveSettings(), profile_settings or ProfileSettings()
    profile = profile_of(source, counting)
    violations = tuple(_violations(plan, profile, cluster, max_par))
    if violations:
        return CheckReport(violations=violations)
    warnings = warn_mismatch(plan, profile.model, cluster, profile.trace_sha256)
    judged = judge(plan, source, cluster, settings, window_tokens=counting.window_tokens)
    regressions: list[str] = []
    if baseline is not None:
        # EPLB, what people compare with, may repeat an expert on a rank
        broken = [v for v in _violations(baseline, profile, cluster, None) if v.code != "same-rank-replicas"]
        if broken:
            raise MismatchError(f"the baseline plan is not legal here: {broken[0]}")
        before = judge(baseline, source, cluster, settings, window_tokens=counting.window_tokens)
        for name in ("par", "ranks_touched", "iteration_us"):
            old, new = _figure(before, name, baseline.mode), _figure(judged, name, plan.mode)
            if old is not None and new is not None and new > old * (1 + max_regression) + 1e-12:
                regressions.append(
                    f"{name} is {new:.4g}, the baseline has {old:.4g}: {100 * (new / old - 1):.1f} % worse, "
                    f"at most {100 * max_regression:g} % is allowed"
                )
    return CheckReport(violations=(), regressions=tuple(regressions), warnings=tuple(warnings), evaluation=judged)


def _violations(plan: Plan, profile: Profile, cluster: ClusterSpec, max_par: float | None) -> list[Violation]:
    """The rules `plan` breaks, whatever number of slots it has."""
    experts, ranks = profile.model.num_experts, cluster.num_ranks
    possible = experts <= plan.num_slots <= experts * ranks and plan.num_slots % ranks == 0
    # a number of slots that no problem can have is for `check` to name, beside the fewest that there must be
    redundant = plan.num_slots - experts if possible else -experts % ranks
    try:
        problem = PlacementProblem(
            profile=profile, cluster=cluster, mode=plan.mode, redundant=redundant, max_par=max_par
        )
    except InfeasibleError as error:
        if not profile.model.is_uniform:
            raise
        return [Violation("memory", "plan", str(error))]
    return check(problem, plan)


def _figure(evaluation: Evaluation | ProfileEvaluation, name: str, mode: str) -> float | None:
    value = getattr(evaluation, name, None)
    return value.get(mode) if isinstance(value, dict) else value


def model_of_plan(plan: Plan, model: ModelSpec | None = None) -> ModelSpec:
    """The model an exporter needs: `model` if it fits the plan, else what the plan remembers of its own.

    Raises MismatchError where `model` is another, UsageError where the plan does not say how many layers there are.
    """
    if model is not None:
        if (model.num_experts, model.moe_layers) != (plan.num_experts, tuple(plan.moe_layers)):
            raise MismatchError(
                f"model {model.name!r} has {model.num_experts} experts in {model.num_sites} MoE layers, the plan "
                f"{plan.num_experts} in {len(plan.moe_layers)}; give the plan's model or leave it out"
            )
        return model
    if plan.num_hidden_layers is None:
        raise UsageError("the plan does not say how many layers its model has; give --model")
    return ModelSpec.uniform(
        plan.model,
        num_experts=plan.num_experts,
        top_k=1,
        moe_layers=tuple(plan.moe_layers),
        num_hidden_layers=plan.num_hidden_layers,
    )


def predict(
    plan: Plan,
    trace: RoutingTrace,
    cluster: ClusterSpec,
    *,
    fidelity: str = "phase",
    mode: str | None = None,
    batch_tokens: int = 2048,
    iterations: int | None = None,
    progress: Progress | None = None,
) -> tuple[Timeline, list[str]]:
    """The simulated Timeline of `trace` under `plan`, and warnings.

    Raises ViolationError for a plan that cannot be run, MismatchError for one of another shape, UsageError.
    """
    from sim import simulate

    warnings = warn_mismatch(plan, trace.model, cluster)
    assert_runnable(plan)
    timeline = simulate(
        plan,
        trace.model,
        cluster,
        trace.expert_LTK,
        sources_of(trace, cluster.num_ranks),
        fidelity=fidelity,  # type: ignore[arg-type]  # simulate refuses unknown names
        mode=mode,  # type: ignore[arg-type]
        batch_tokens=batch_tokens,
        iterations=iterations,
        trace_sha256=trace.sha256,
        progress=progress,
    )
    return timeline, warnings


def measure(
    plan: Plan,
    trace: RoutingTrace,
    *,
    checkpoint: Path | None = None,
    ranks: int | None = None,
    mode: str | None = None,
    settings: RunSettings | None = None,
    cluster: ClusterSpec | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[Timeline], list[str]]:
    """The measured Timeline of `plan` on this machine's ranks and, given a cluster, the prediction of the same job.

    Raises DependencyError without torch, ExecutionError for a rank that failed, MismatchError for other ranks.
    """
    from placer.execute.measure import replay, replayed_model

    settings = settings or RunSettings()
    assert_runnable(plan)
    used = settings.iterations * settings.tokens_per_iteration
    if used > trace.num_tokens:
        raise UsageError(
            f"the trace has {trace.num_tokens} tokens; run.iterations x run.tokens_per_iteration is {used}; lower them"
        )
    source_T = sources_of(trace, plan.num_ranks)
    measured = replay(
        plan,
        trace.expert_LTK,
        trace.weight_LTK,
        model=trace.model,
        mode=mode,  # type: ignore[arg-type]  # ReplayJob refuses unknown names
        source_T=source_T,
        experts_path=checkpoint,
        tokens_per_iteration=settings.tokens_per_iteration,
        iterations=settings.iterations,
        warmup=settings.warmup,
        dtype=settings.dtype,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.moe_intermediate_size,
        num_ranks=ranks,
        timeout_s=settings.timeout_s,
        trace_sha256=trace.sha256,
        progress=progress,
    )
    timelines, names = [measured], ["measured"]
    if cluster is not None:
        model = replayed_model(trace.model, measured.about)
        same = replace(trace.select_tokens(slice(0, used)), model=model, checked=True, known_sha256=trace.sha256)
        predicted, _ = predict(plan, same, cluster, mode=mode, batch_tokens=settings.tokens_per_iteration)
        timelines.append(predicted)
        names.append("predicted")
    return timelines, names
