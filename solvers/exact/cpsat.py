"""Exact placement of small problems with CP-SAT: fewest ranks touched under equal slots and a load cap, no replicas.

The model is in `cpsat_model`; it runs in a process of its own.

Legend: L routing sites, E logical experts, P slots, R ranks.
"""

import time

from placer.core.errors import SolverError, UsageError
from placer.core.problem import PlacementProblem
from solvers.exact.cpsat_model import CpsatAnswer, LayerModel, search_layers
from solvers.exact.isolate import IsolationTimeoutError, run_isolated
from solvers.ranks import slots_of_ranks
from solvers.result import SolveResult, Status, StoppedBy

__all__ = ["solve_cpsat"]

NAME = "cpsat"


def solve_cpsat(problem: PlacementProblem, *, time_limit_s: float, seed: int = 0, workers: int = 1) -> SolveResult:
    """The placement with the fewest ranks touched, and the bound that CP-SAT proved.

    Parameters
    ----------
    problem
        equal slots and no replicas (`redundant` 0); `max_par` is a hard cap. With expert sets the objective is
        "ranks_touched" (mean over layers, and over the tokens that the sets stand for, of the distinct ranks of a
        token's experts), without them "par" (mean over layers of max / mean rank load)
    time_limit_s
        seconds for all layers, without the start of the process, which is killed at 1.5 times that plus 5 seconds
    seed, workers
        passed to CP-SAT; one worker that ends before its limit gives the same placement for the same seed

    Returns status "infeasible" when provably no placement meets the cap, "error" with stopped_by "time_limit" when none
    was found yet, else "solved", stopped_by "optimal" where no placement is better.

    Raises
    ------
    UsageError
        for replicas, ranks of unequal speed or slots, a limit that is no positive number, or workers below 1

    Notes
    -----
    Complexity: E R + E^2 + H R booleans and E^2 R + H K R clauses a layer; NP-hard. Proves top-2 routing of 16 experts
    on 4 ranks in a second; at 32 experts or top-4 it leaves a gap and a placement that a swap search may beat.
    Guarantee: bound <= optimum <= objective.
    """
    if problem.redundant:
        raise UsageError(f"cpsat places no replicas and redundant is {problem.redundant}; use --redundant 0")
    problem.refuse_unlike_ranks("cpsat")
    if workers < 1:
        raise UsageError(f"workers is {workers}; give 1 or more")
    started = time.perf_counter()
    arguments = (_layers(problem), problem.cluster.num_ranks, problem.max_par, time_limit_s, seed, workers)
    try:
        answer = run_isolated(search_layers, arguments, time_limit_s=time_limit_s)
    except IsolationTimeoutError as error:
        return _without_placement("error", "time_limit", str(error), started)
    except SolverError as error:
        return _without_placement("error", "error", str(error), started)
    return _result(problem, answer, started)


def _layers(problem: PlacementProblem) -> list[LayerModel]:
    profile = problem.profile
    if not profile.sets:
        return [LayerModel(load_E) for load_E in profile.load_LE]
    pairs = zip(profile.load_LE, profile.sets, strict=True)
    return [LayerModel(load_E, sets.expert_HK, sets.weight_H) for load_E, sets in pairs]


def _result(problem: PlacementProblem, answer: CpsatAnswer, started: float) -> SolveResult:
    if answer.state == "infeasible":
        message = f"no placement with equal slots has a mean PAR within {problem.max_par}; raise --max-par"
        return _without_placement("infeasible", "infeasible", message, started)
    if answer.state == "unknown":
        message = f"no placement found with a mean PAR within {problem.max_par}; give more --time or raise --max-par"
        return _without_placement("error", "time_limit", message, started)
    if answer.rank_LE is None:
        return _without_placement("error", "error", answer.state, started)
    return SolveResult(
        solver=NAME,
        status="solved",
        stopped_by="optimal" if answer.proven else "time_limit",
        slot_expert_LP=slots_of_ranks(answer.rank_LE, problem.cluster.num_ranks),
        objective_name="ranks_touched" if problem.profile.sets else "par",
        objective=answer.objective,
        bound=answer.bound,
        bound_by=NAME,
        seconds=time.perf_counter() - started,
        message=answer.note,
    )


def _without_placement(status: Status, stopped_by: StoppedBy, message: str, started: float) -> SolveResult:
    return SolveResult(
        solver=NAME, status=status, stopped_by=stopped_by, seconds=time.perf_counter() - started, message=message
    )
