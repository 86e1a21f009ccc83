"""Is a plan legal for a trace and a cluster, and no worse than a baseline on it."""

from dataclasses import dataclass, field

from placer.config.settings import ProfileSettings, SolveSettings
from placer.core.check import Violation, check
from placer.core.cluster import ClusterSpec
from placer.core.errors import InfeasibleError, MismatchError, RegressionError, ViolationError
from placer.core.evaluate import Evaluation
from placer.core.evaluate_profile import ProfileEvaluation
from placer.core.plan import Plan
from placer.core.problem import PlacementProblem
from placer.core.profile import Profile
from placer.pipeline.planning import judge
from placer.pipeline.proving import Proof, prove
from placer.pipeline.sources import Source, profile_of, warn_mismatch
from traces.certificate_store import StoredCertificate

__all__ = ["CheckReport", "check_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckReport:
    """Broken rules, regressions against a baseline, what the plan does, and how near to the best it is proven."""

    violations: tuple[Violation, ...]
    regressions: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    evaluation: Evaluation | ProfileEvaluation | None = field(default=None)
    proof: Proof | None = None

    def raise_for_status(self) -> None:
        """Raises ViolationError or RegressionError with one line per finding."""
        if self.violations:
            raise ViolationError("\nplacer: ".join(str(violation) for violation in self.violations))
        if self.regressions:
            raise RegressionError("\nplacer: ".join(self.regressions))


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
    certificate: StoredCertificate | None = None,
) -> CheckReport:
    """Is the plan legal for this trace and cluster, no worse than `baseline` on it, and what `certificate` proves.

    A regression is PAR, ranks touched or predicted iteration time more than `max_regression` above the baseline's.
    Raises ViolationError for a certificate that does not prove what it claims, MismatchError for one that does not fit.
    """
    settings, counting = solve_settings or SolveSettings(), profile_settings or ProfileSettings()
    profile = profile_of(source, counting)
    violations = tuple(_violations(plan, profile, cluster, max_par, settings.allow_empty_slots))
    if violations:
        return CheckReport(violations=violations)
    warnings = warn_mismatch(plan, profile.model, cluster, profile.trace_sha256)
    judged = judge(plan, source, cluster, settings, window_tokens=counting.window_tokens)
    regressions: list[str] = []
    if baseline is not None:
        # EPLB, what people compare with, may repeat an expert on a rank
        broken = [
            v
            for v in _violations(baseline, profile, cluster, None, settings.allow_empty_slots)
            if v.code != "same-rank-replicas"
        ]
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
    proof = None if certificate is None else prove(certificate, plan, profile, cluster)
    return CheckReport(
        violations=(),
        regressions=tuple(regressions),
        warnings=(*warnings, *(() if proof is None else proof.warnings)),
        evaluation=judged,
        proof=proof,
    )


def _figure(evaluation: Evaluation | ProfileEvaluation, name: str, mode: str) -> float | None:
    value = getattr(evaluation, name, None)
    return value.get(mode) if isinstance(value, dict) else value


def _violations(
    plan: Plan, profile: Profile, cluster: ClusterSpec, max_par: float | None, allow_empty: bool
) -> list[Violation]:
    """The rules `plan` breaks, whatever number of slots it has."""
    experts, ranks = profile.model.num_experts, cluster.num_ranks
    possible = experts <= plan.num_slots <= experts * ranks and plan.num_slots % ranks == 0
    # a number of slots that no problem can have is for `check` to name, beside the fewest that there must be
    redundant = plan.num_slots - experts if possible and not allow_empty else -experts % ranks
    try:
        problem = PlacementProblem(
            profile=profile,
            cluster=cluster,
            mode=plan.mode,
            redundant=redundant,
            max_par=max_par,
            allow_empty_slots=allow_empty,
        )
    except InfeasibleError as error:
        if not profile.model.is_uniform:
            raise
        return [Violation("memory", "plan", str(error))]
    return check(problem, plan)
