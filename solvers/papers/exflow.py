"""ExFlow's placement (arXiv 2401.08383, IPDPS 2024): fewest token transitions between ranks, by integer programming.

The program is in `exflow_model`, the order of solving in `exflow_stages`. It sees flows only, so load may be as uneven
as affinity makes it. Form "aggregated" with stages "staged" or "bipartition" is the paper's method; form "colocation"
has its bound mended. Both are for models of a few layers: a baseline and an oracle, not the method to use.

Legend: L routing sites, E logical experts, P slots, R ranks.
"""

import time
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt

from placer.core.errors import SolverError, UsageError
from placer.core.problem import PlacementProblem
from solvers.exact.isolate import IsolationTimeoutError, run_isolated
from solvers.papers.exflow_model import Backend, Form, Settings, Terms, cut_of
from solvers.papers.exflow_stages import StagesAnswer, increments_of, largest_program, mean_hops, search_stages
from solvers.ranks import rank_of_expert, slots_of_ranks
from solvers.result import SolveResult, StoppedBy

__all__ = ["solve_exflow", "solve_exflow_staged"]

IntArray = npt.NDArray[np.int64]
Stages = Literal["joint", "staged", "bipartition"]

NAME = "exflow"
MOST_ROWS = 1_000_000
FORMS: tuple[Form, ...] = ("colocation", "aggregated")


def solve_exflow(
    problem: PlacementProblem,
    *,
    time_limit_s: float,
    seed: int = 0,
    backend: Backend = "cpsat",
    form: Form = "colocation",
    stages: Stages = "joint",
    start_LP: IntArray | None = None,
    increments: int = 1,
) -> SolveResult:
    """A placement with a small "cut": share of the transitions between consecutive layers that change rank.

    Parameters
    ----------
    problem
        no replicas. `max_par` is no part of the paper and is not looked at: the placement may break it
    time_limit_s
        for all sub-problems and increments together; the process is killed at 1.5 times that plus 5 seconds
    seed
        for CP-SAT and for the increments
    backend
        "cpsat", or "highs" or "cbc" through PuLP; one thread each
    form
        "aggregated": the paper's program on counts of transitions. "colocation": with the rows that give it a bound
    stages
        "joint": all ranks at once. "staged": nodes, then the ranks of each node. "bipartition": halves of halves
    start_LP
        a placement (L, P) to start from, or None for experts by index; what comes back is never worse
    increments
        solve on this many growing shares of the transitions, each run started from the one before. The paper adds 5,000
        tokens a time; a profile has counts, which are dealt into lots at random (each layer step by itself, as the
        objective does not tell tokens apart)

    Returns stopped_by "optimal" where bound = objective, "effort" when every stage was proven but they are not optimal
    together, else "time_limit". `bound` is proven by the joint program, or by the first stage's, whose parts the ranks
    refine; nothing else bounds a staged answer. `message` has the paper's mean hops (1: other rank of the node,
    2: other node). Status "error" when a back end failed; equal counts always exist, so never "infeasible".

    Raises
    ------
    UsageError
        for replicas, missing transitions, unknown options, ranks that are no power of two with "bipartition", a start
        that is no placement, or a program of more than MOST_ROWS rows
    DependencyError
        when CBC is not installed

    Notes
    -----
    Complexity: L E R + L E^2 binaries and 2 L E^2 R rows; NP-hard. With one thread "colocation" proves 4 layers of 8
    experts on 4 ranks in seconds to minutes and "aggregated" does not; at Mixtral's 32 layers give both a good start.
    Guarantee: bound <= optimum <= objective.
    Reference: equations 8 to 12; the stages and increments are of the authors' code.
    """
    started = time.perf_counter()
    factors = _factors(problem, stages)
    _check(problem, backend, form, increments)
    profile, ranks = problem.profile, problem.cluster.num_ranks
    layers, experts = profile.model.num_sites, profile.model.num_experts
    weight_LEE = profile.transition_LEE
    if weight_LEE is None:
        weight_LEE = np.zeros((0, experts, experts), dtype=np.int64)
    weight_LEE = weight_LEE.astype(np.int64)
    terms = Terms.of_weights(weight_LEE)
    if (rows := largest_program(terms, layers, experts, factors, form)) > MOST_ROWS:
        raise UsageError(
            f"exflow's program has {rows:,} rows and at most {MOST_ROWS:,} are built; use stages 'staged' or "
            "'bipartition', or another solver"
        )
    by_index_LP = np.tile(np.arange(experts), (layers, 1))
    start_LE = _rank_LE(by_index_LP if start_LP is None else start_LP, by_index_LP, ranks)
    chunks = [terms] if increments == 1 else increments_of(weight_LEE, increments, seed)
    settings = Settings(backend=backend, form=form, seed=seed)
    arguments = (chunks, layers, experts, factors, settings, time_limit_s, start_LE)
    try:
        answer = run_isolated(search_stages, arguments, time_limit_s=time_limit_s)
    except IsolationTimeoutError:
        answer = StagesAnswer(start_LE, 0, 0, 1)
    except SolverError as error:
        return SolveResult(
            solver=NAME,
            status="error",
            stopped_by="error",
            seconds=time.perf_counter() - started,
            message=str(error),
        )
    rank_LE = min(answer.rank_LE, start_LE, key=lambda rank_LE: cut_of(terms, rank_LE))
    total, cost = max(1, int(weight_LEE.sum())), cut_of(terms, rank_LE)
    ended: StoppedBy = "effort" if answer.proven == answer.subproblems else "time_limit"
    first = "joint program" if len(factors) <= 1 else f"first stage, {factors[0]} parts"
    return SolveResult(
        solver=NAME,
        status="solved",
        stopped_by="optimal" if cost == answer.bound else ended,
        slot_expert_LP=slots_of_ranks(rank_LE, ranks),
        objective_name="cut",
        objective=cost / total,
        bound=min(answer.bound, cost) / total,
        bound_by=f"{NAME}: {backend}, {form}, {first}",
        seconds=time.perf_counter() - started,
        message=f"{answer.proven} of {answer.subproblems} sub-problems proven; "
        f"{mean_hops(weight_LEE, rank_LE, problem.cluster.node_R):.4f} hops a transition",
    )


def solve_exflow_staged(
    problem: PlacementProblem, *, time_limit_s: float, seed: int = 0, start_LP: IntArray | None = None
) -> SolveResult:
    """The paper's own method: counts of transitions on HiGHS, nodes first and then the ranks of each node.

    Everything else as in `solve_exflow`; where the cluster has one node this is the joint program.
    """
    result = solve_exflow(
        problem,
        time_limit_s=time_limit_s,
        seed=seed,
        backend="highs",
        form="aggregated",
        stages="staged",
        start_LP=start_LP,
    )
    return replace(result, solver="exflow_staged")


def _factors(problem: PlacementProblem, stages: Stages) -> tuple[int, ...]:
    cluster = problem.cluster
    if stages == "joint":
        factors = [cluster.num_ranks]
    elif stages == "staged":
        factors = [cluster.nodes, cluster.ranks_per_node]
    elif stages == "bipartition":
        if cluster.num_ranks & (cluster.num_ranks - 1):
            raise UsageError(f"bipartition halves the ranks and {cluster.num_ranks} is no power of two; use 'staged'")
        factors = [2] * (cluster.num_ranks.bit_length() - 1)
    else:
        raise UsageError(f"stages is {stages!r}; use one of {', '.join(get_args(Stages))}")
    return tuple(factor for factor in factors if factor > 1)


def _check(problem: PlacementProblem, backend: Backend, form: Form, increments: int) -> None:
    if backend not in get_args(Backend):
        raise UsageError(f"backend is {backend!r}; use one of {', '.join(get_args(Backend))}")
    if form not in FORMS:
        raise UsageError(f"form is {form!r}; use one of {', '.join(FORMS)} (a profile has no tokens)")
    if increments < 1:
        raise UsageError(f"increments is {increments}; give 1 or more")
    if problem.redundant:
        raise UsageError(f"exflow places no replicas and redundant is {problem.redundant}; use --redundant 0")
    if problem.profile.model.num_sites > 1 and problem.profile.transition_LEE is None:
        raise UsageError("the profile has no transitions between layers, which exflow keeps on one rank")


def _rank_LE(start_LP: IntArray, by_index_LP: IntArray, ranks: int) -> IntArray:
    if not np.array_equal(np.sort(start_LP, axis=1), by_index_LP):
        raise UsageError("start_LP does not hold every expert once in each layer; give a placement without replicas")
    return rank_of_expert(start_LP, ranks, by_index_LP.shape[1])
