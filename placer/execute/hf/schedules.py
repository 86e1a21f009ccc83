"""How the all-to-alls of a generation run: the plan's schedule of either kind of step, without its pipelining.

Attention hands a layer all of a step's tokens at once and each layer is one call, so that every layer is one chunk.
"""

from dataclasses import replace

from placer.core.modes import DispatchMode
from placer.core.plan import Plan
from placer.core.schedule import KINDS, Kind, Schedule

__all__ = ["schedule_of", "unpipelined"]


def schedule_of(plan: Plan, kind: Kind, mode: DispatchMode) -> Schedule:
    """The plan's schedule for steps of this kind, of degree 1. Raises UsageError where it does not go with `mode`."""
    schedule = plan.schedule(kind)
    schedule = replace(schedule, degree_L=(1,) * len(schedule.degree_L))
    schedule.refuse_misfit(mode, len(plan.slot_expert_LP), plan.num_ranks)
    return schedule


def unpipelined(plan: Plan) -> list[str]:
    """Warnings for pipeline degrees of the plan that a generation does not use."""
    degrees = {kind: max(plan.schedule(kind).degree_L, default=1) for kind in KINDS}
    return [
        f"the plan's {kind} schedule cuts layers into up to {degree} chunks; generation sends each layer whole"
        for kind, degree in degrees.items()
        if degree > 1
    ]
