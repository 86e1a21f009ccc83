"""From a solver's placement to one that is reached from the plan that runs: fewest moves, within a budget."""

from dataclasses import dataclass, replace

import numpy as np

from placer.config.settings import SolveSettings
from placer.core.errors import UsageError
from placer.core.migration import Moves, moves
from placer.core.plan import Plan
from placer.core.problem import PlacementProblem
from solvers.migration.budget import objective_name, solve_under_budget
from solvers.migration.judge import judges_of
from solvers.migration.relabel import relabel
from solvers.registry import SOLVERS
from solvers.result import SolveResult

__all__ = ["Migrated", "refuse_budget_without_plan", "towards"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Migrated:
    """The result as it is reached from the current plan, the moves, and what the user should be told."""

    result: SolveResult
    moves: Moves
    warnings: tuple[str, ...] = ()


def refuse_budget_without_plan(settings: SolveSettings) -> None:
    """Raises UsageError where the settings limit a migration although there is no plan to move from."""
    for key in ("max_moved_gib", "max_moved_layers"):
        if (value := getattr(settings, key)) is not None:
            raise UsageError(f"solve.{key} is {value} but there is no plan to move from; give --from PLAN or drop it")


def towards(
    problem: PlacementProblem, current: Plan, result: SolveResult, settings: SolveSettings, seed: int
) -> Migrated:
    """`result` with the rank labels nearest to `current`, and no more moved than the settings allow.

    Ranks are relabelled layer by layer, in `coherent` mode all layers alike, and not at all for baselines, which are
    shown as they are, nor where other labels would break the load cap (replicas are drawn by rank).
    """
    assert result.slot_expert_LP is not None
    cluster = problem.cluster
    if problem.allow_empty_slots:
        current, result = _one_width(current, result)
        assert result.slot_expert_LP is not None
    # the plan given may itself be the answer
    ours = result.solver in SOLVERS and not SOLVERS[result.solver].baseline
    changed = _relabelled(problem, current, result, seed) if ours else result
    limited = settings.max_moved_gib is not None or settings.max_moved_layers is not None
    target_LP = changed.slot_expert_LP
    assert target_LP is not None
    needed = moves(current.slot_expert_LP, target_LP, cluster.num_ranks, cluster.ranks_per_node)
    if not limited:
        return Migrated(result=changed, moves=needed)
    load_only = result.objective_name.endswith("par")
    gib = settings.max_moved_gib
    found_LP, fewer, objective = solve_under_budget(
        problem,
        current.slot_expert_LP,
        target_LP,
        max_moved_bytes=None if gib is None else int(gib * 2**30),
        max_layers=settings.max_moved_layers,
        seed=seed,
        load_only=load_only,
    )
    if len(fewer) == len(needed) and len(moves(target_LP, found_LP, cluster.num_ranks)) == 0:
        return Migrated(result=changed, moves=needed)
    name = objective_name(problem, load_only=load_only)
    same = name == changed.objective_name
    bound = min(changed.bound, objective) if same and changed.bound is not None else None
    warnings = () if changed.replica_share_LP is None else ("shares of replicas are equal again under a budget",)
    told = f"the budget stopped the migration at {len(fewer)} of {len(needed)} moves"
    return Migrated(
        result=replace(
            changed,
            slot_expert_LP=found_LP,
            replica_share_LP=None,
            objective_name=name,
            objective=objective,
            bound=bound,
            bound_by=changed.bound_by if bound is not None else "",
            stopped_by="optimal" if bound is not None and objective <= bound + 1e-12 else "effort",
            message=f"{changed.message}; {told}" if changed.message else told,
        ),
        moves=fewer,
        warnings=warnings,
    )


def _relabelled(problem: PlacementProblem, current: Plan, result: SolveResult, seed: int) -> SolveResult:
    cluster = problem.cluster
    assert result.slot_expert_LP is not None
    if result.replica_share_LP is not None:
        return result
    kinds = cluster.kind_R
    slots_LP, _ = relabel(
        current.slot_expert_LP,
        result.slot_expert_LP,
        cluster.num_ranks,
        ranks_per_node=cluster.ranks_per_node,
        common=problem.mode == "coherent",
        kind_R=kinds if len(np.unique(kinds)) > 1 else None,
    )
    renamed = replace(result, slot_expert_LP=slots_LP)
    if problem.uneven and cluster.rank_memory_gib:
        # equal ranks may hold unequal numbers in a layer: other labels must not add up to more than their memory
        held_R = (slots_LP >= 0).reshape(len(slots_LP), cluster.num_ranks, -1).sum(axis=(0, 2))
        if (held_R * problem.profile.model.expert_bytes > cluster.memory_bytes_R).any():
            return result
    if problem.redundant == 0:
        return renamed
    # replicas are drawn in the order of ranks, so loads and ranks touched move by a hair
    judges, name = judges_of(problem, seed)
    verdicts = [judge.judge(row_P) for judge, row_P in zip(judges, slots_LP, strict=True)]
    if problem.max_par is not None and np.mean([verdict.par_seen for verdict in verdicts]) > problem.max_par:
        return result
    if name != "par" and name == result.objective_name:
        renamed = replace(renamed, objective=float(np.mean([verdict.cost for verdict in verdicts])))
    return renamed


def _one_width(current: Plan, result: SolveResult) -> tuple[Plan, SolveResult]:
    """Both with the larger number of slots per rank, the new slots empty."""
    assert result.slot_expert_LP is not None
    width = max(current.num_slots, result.slot_expert_LP.shape[1]) // current.num_ranks
    padded = []
    for slots_LP in (current.slot_expert_LP, result.slot_expert_LP):
        blocks = slots_LP.reshape(len(slots_LP), current.num_ranks, -1)
        room = ((0, 0), (0, 0), (0, width - blocks.shape[2]))
        padded.append(np.pad(blocks, room, constant_values=-1).reshape(len(slots_LP), -1))
    if result.replica_share_LP is not None and padded[1].shape != result.slot_expert_LP.shape:
        return current, result
    # shares of the current plan play no part in what is moved
    return replace(current, slot_expert_LP=padded[0], replica_share_LP=None), replace(result, slot_expert_LP=padded[1])
