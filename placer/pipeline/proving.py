"""Proofs that travel with a plan: which certificate a solve leaves, and what one proves about a plan."""

from dataclasses import dataclass, replace

import numpy as np

from placer.core.certificates import Certificate, verify
from placer.core.cluster import ClusterSpec
from placer.core.errors import MismatchError, ViolationError
from placer.core.plan import Plan, relative_gap
from placer.core.problem import PlacementProblem
from placer.core.profile import Profile
from solvers.bounds.closed_form import closed_form
from solvers.result import SolveResult
from solvers.score import Goal, GoalKind, goal_name, score
from traces.certificate_store import StoredCertificate

__all__ = ["Proof", "certificate_of", "prove", "stored_certificate"]

KINDS: dict[str, tuple[GoalKind, GoalKind]] = {
    "par": ("par", "par"),
    "kept": ("cut", "hops"),
    "touched": ("ranks", "nodes"),
    "blocks": ("ranks", "nodes"),
}
"""The goal that each kind of certificate bounds, without and with a weight of nodes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """What a certificate proves about a plan: no plan with PAR <= max_par has an objective below `bound`."""

    kind: str
    objective_name: str
    proof: str
    bound: float
    max_par: float | None
    objective: float
    gap: float | None
    warnings: tuple[str, ...] = ()


def certificate_of(problem: PlacementProblem, result: SolveResult) -> tuple[Certificate | None, list[str]]:
    """The certificate of a result's bound, else the closed form for its objective, and warnings where it is weaker."""
    certificate = result.certificate or closed_form(problem, result.objective_name)
    if certificate is None:
        return None, [f"{result.solver} leaves no certificate for {result.objective_name!r}; nothing was written"]
    if result.bound is not None and certificate.bound < result.bound - 1e-9 * max(1.0, abs(result.bound)):
        proven = f"the certificate proves {certificate.bound:.6g}; the bound {result.bound:.6g} was proven inside"
        return certificate, [f"{proven} {result.bound_by}, which leaves none"]
    return certificate, []


def prove(stored: StoredCertificate, plan: Plan, profile: Profile, cluster: ClusterSpec) -> Proof:
    """Recomputes the bound on the profile's own counts and sets the plan's objective beside it.

    A certificate made for another trace proves what its multipliers prove on this one, if they fit it at all.
    Raises ViolationError for a certificate that proves less than it claims, MismatchError for one of another trace
    that does not fit, UsageError for a profile without the counts it speaks about.
    """
    problem = PlacementProblem(
        profile=profile,
        cluster=cluster,
        mode=plan.mode,
        redundant=plan.num_slots - plan.num_experts,
        max_par=stored.max_par,
        replica_choice=plan.replica_choice,
    )
    certificate, warnings = stored.certificate, []
    other = stored.trace_sha256 != profile.trace_sha256
    try:
        # what was claimed of another trace is no claim about this one
        bound = verify(problem, replace(certificate, bound=-np.inf) if other else certificate)
    except ViolationError as error:
        if not other:
            raise
        raise MismatchError(
            f"the certificate was made for another trace (hash {stored.trace_sha256[:12]}, here "
            f"{profile.trace_sha256[:12]}) and does not fit this one: {error}"
        ) from error
    if other:
        warnings.append("the certificate was made for another trace; its bound was computed anew for this one")
    goal = _goal(certificate)
    scored = score(problem, plan.slot_expert_LP, plan.replica_share_LP, goal)
    if not scored.feasible:
        warnings.append(
            f"the plan's PAR {scored.par:.4f} is above {stored.max_par:g}: the bound is about plans that keep that cap"
        )
    return Proof(
        kind=certificate.kind,
        objective_name=goal.name,
        proof=certificate.proof,
        bound=bound,
        max_par=stored.max_par,
        objective=scored.objective,
        gap=relative_gap(scored.objective, bound) if scored.feasible else None,
        warnings=tuple(warnings),
    )


def stored_certificate(problem: PlacementProblem, certificate: Certificate) -> StoredCertificate:
    """The certificate with what it takes to verify it later: the trace, and the cap where its bound needs one."""
    return StoredCertificate(
        certificate=certificate,
        # a price on PAR is the only way in which the cap enters
        max_par=problem.max_par if certificate.numbers.get("price", 0.0) > 0 else None,
        trace_sha256=problem.profile.trace_sha256,
    )


def _goal(certificate: Certificate) -> Goal:
    """The objective that a certificate bounds: from its kind and numbers, whatever its texts say."""
    weight = float(certificate.numbers.get("node_weight", 0.0))
    flat, weighted = KINDS[certificate.kind]
    kind = weighted if weight > 0 else flat
    return Goal(kind, goal_name(kind, weight), weight)
