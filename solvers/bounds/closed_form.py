"""Certificates that need no search: the load bound on PAR, and ceil(k / slots) groups touched by k experts."""

from placer.core.certificates import Certificate
from placer.core.problem import PlacementProblem
from solvers.balance.load import par_bound
from solvers.touch.objective import node_price, touch_objective

__all__ = ["closed_form"]


def closed_form(problem: PlacementProblem, objective_name: str) -> Certificate | None:
    """The certificate without multipliers for an objective, or None where there is none (a cut, a time, unlike speeds).

    With slopes of 0 the bound on ranks touched is that of capacity alone. Verified like any other; O(L (E log E + H)).
    """
    if problem.allow_empty_slots:
        return None
    if objective_name == "par" and problem.cluster.speed_R is not None:
        return None
    if objective_name == "par":
        proof = "load: mean, heaviest, company, pigeonhole"
        return Certificate(kind="par", objective_name="par", bound=par_bound(problem), proof=proof)
    if not problem.profile.sets or objective_name != touch_objective(problem)[0]:
        return None
    return Certificate(
        kind="touched",
        objective_name=objective_name,
        bound=touch_objective(problem)[1],
        proof="capacity: ceil(k / slots)",
        numbers={"node_weight": node_price(problem)},
    )
