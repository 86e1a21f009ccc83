"""What `auto` runs on which problems: a table with one row per solver or bound, cheapest first.

A row applies where the problem has one of its goals (solvers.score), its kind of slots, and is no larger than it can
do. Measured on one core: the baselines and LPT take under a second at 58 layers of 256 experts on 64 ranks; the
searches seconds to minutes; CP-SAT proves 16 experts and top-2 in a second and little beyond.
"""

import importlib.util
import math
from dataclasses import dataclass
from math import comb
from typing import Literal

from placer.core.problem import PlacementProblem
from solvers.registry import SOLVERS
from solvers.score import GoalKind, goal_of

__all__ = ["STAGES", "Stage", "stages_for"]

ALL: tuple[GoalKind, ...] = ("ranks", "nodes", "cut", "hops", "par")
ANY_SIZE = math.inf


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One row: `solver` names one of the registry, or for kind "bound" a module whose `bound_touched` proves one.

    share    of the time left when it starts
    goals    kinds of objective it is good for
    slots    "single": only without redundant slots; "redundant": only with; "any"
    speeds   whether it knows ranks of unlike speed, or is a baseline that is scored with them
    most_*   largest problem it can do: experts, ranks, comb(experts, experts per rank)
    """

    solver: str
    kind: Literal["baseline", "search", "exact", "bound"]
    share: float = 1.0
    goals: tuple[GoalKind, ...] = ALL
    slots: Literal["single", "redundant", "any"] = "any"
    speeds: bool = False
    most_experts: float = ANY_SIZE
    most_ranks: float = ANY_SIZE
    most_groups: float = ANY_SIZE


TOUCH: tuple[GoalKind, ...] = ("ranks", "nodes")
CUT: tuple[GoalKind, ...] = ("cut", "hops")

STAGES: tuple[Stage, ...] = (
    Stage(solver="linear", kind="baseline", speeds=True),
    Stage(solver="eplb", kind="baseline", speeds=True),
    Stage(solver="lpt", kind="baseline", speeds=True),
    Stage(solver="affinity", kind="search", share=0.8, goals=CUT, slots="single"),
    Stage(solver="coactivation", kind="search", share=0.7, goals=(*TOUCH, *CUT), slots="single", speeds=True),
    Stage(solver="replicated", kind="search", share=0.8, goals=(*TOUCH, *CUT), slots="redundant", most_ranks=64),
    Stage(solver="blocks", kind="exact", goals=("ranks",), slots="single", most_experts=64, most_groups=300_000),
    Stage(solver="chain", kind="exact", share=0.6, goals=("cut",), slots="single", most_experts=10),
    Stage(solver="cpsat", kind="exact", share=0.6, goals=("ranks", "par"), slots="single", most_experts=12),
    Stage(solver="solvers.bounds.touched", kind="bound", goals=TOUCH),
)


def stages_for(problem: PlacementProblem, stages: tuple[Stage, ...] = STAGES) -> tuple[Stage, ...]:
    """The rows that apply to the problem and are installed, in order.

    Co-activation, whose groups merely get aligned for a cut, stands in where no solver of affinity does.
    """
    goal = goal_of(problem).kind
    experts, ranks = problem.profile.model.num_experts, problem.cluster.num_ranks
    slots = "redundant" if problem.redundant else "single"
    groups = comb(experts, problem.slots_per_rank) if problem.redundant == 0 else 0
    fitting = [
        stage
        for stage in stages
        if goal in stage.goals
        and stage.slots in ("any", slots)
        and (stage.speeds or problem.cluster.speed_R is None)
        and (experts <= stage.most_experts and ranks <= stage.most_ranks and groups <= stage.most_groups)
        and _installed(stage)
    ]
    if goal in CUT and any(stage.solver == "affinity" for stage in fitting):
        fitting = [stage for stage in fitting if stage.solver != "coactivation"]
    # without expert sets there is no touching to search; a cut may come with transitions alone
    if not problem.profile.sets:
        fitting = [stage for stage in fitting if stage.solver not in ("coactivation", "replicated", "blocks")]
    # set partitioning proves more than any relaxation of it
    if any(stage.solver == "blocks" for stage in fitting):
        fitting = [stage for stage in fitting if stage.kind != "bound"]
    return tuple(fitting)


def _installed(stage: Stage) -> bool:
    if stage.kind == "bound":
        return importlib.util.find_spec(stage.solver) is not None
    return stage.solver in SOLVERS
