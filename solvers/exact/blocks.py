"""Ranks touched to proven optimality where every block of experts that a rank could hold can be listed.

Ranks touched of a placement is a sum over its ranks of the tokens that visit them, so one layer is a set partitioning
problem with comb(E, C) columns: 35,960 for 32 experts on 8 ranks. Its LP bound is nearly tight on real routing. The
model is in `blocks_model`, the search over layers in `blocks_search`; both run in a process of their own.
"""

import time
from math import comb

import numpy as np
import numpy.typing as npt

from placer.core.certificates import Certificate, verify
from placer.core.errors import SolverError, UsageError
from placer.core.problem import PlacementProblem
from solvers.balance.lpt import lpt_slots
from solvers.exact.blocks_model import MOST_EXPERTS
from solvers.exact.blocks_search import BlocksAnswer, BlocksLayer, search_blocks
from solvers.exact.isolate import IsolationTimeoutError, run_isolated
from solvers.ranks import rank_of_expert, slots_of_ranks
from solvers.result import SolveResult, StoppedBy
from solvers.touch.caps import refuse_impossible_cap

__all__ = ["MOST_COLUMNS", "applies_to", "solve_blocks"]

NAME = "blocks"
MOST_COLUMNS = 300_000
"""Blocks of one layer; beyond it listing their costs takes longer than the search."""

IntArray = npt.NDArray[np.int64]


def applies_to(problem: PlacementProblem) -> bool:
    """Whether the blocks can be listed: expert sets, no replicas, ranks alone in the objective, few enough blocks."""
    experts = problem.profile.model.num_experts
    small = experts <= MOST_EXPERTS and comb(experts, problem.slots_per_rank) <= MOST_COLUMNS
    plain = not problem.redundant and not problem.allow_empty_slots and problem.cluster.speed_R is None
    return (
        bool(problem.profile.sets)
        and plain
        and small
        and not (problem.mode == "per_node" and problem.cluster.nodes > 1)
    )


def solve_blocks(
    problem: PlacementProblem, *, seed: int = 0, time_limit_s: float = 60.0, start_LP: IntArray | None = None
) -> SolveResult:
    """Fewest ranks touched at mean PAR <= problem.max_par on the profile's own counts, with a certificate.

    Unlike the co-activation search it promises nothing for unseen requests: it answers the problem as it is stated.
    Without a cap stopped_by is "optimal" when every layer's integer program was solved; with one, when the gap closes.
    Guarantee: bound <= optimum <= objective. Complexity: O(L comb(E, C) H) for the costs; the integer programs are
    NP-hard, but reduced costs leave a few hundred of the columns. Raises UsageError where the blocks cannot be listed,
    InfeasibleError for an impossible cap. Reference: column generation for set partitioning (Balas and Padberg, 1976).
    """
    if not applies_to(problem):
        raise UsageError(
            "blocks lists every way to fill a rank: it needs expert sets, no redundant slots, one node or per_rank "
            f"mode and at most {MOST_COLUMNS:,} ways to choose {problem.slots_per_rank} of "
            f"{problem.profile.model.num_experts} experts; use coactivation"
        )
    refuse_impossible_cap(problem)
    started = time.perf_counter()
    ranks, profile = problem.cluster.num_ranks, problem.profile
    start = lpt_slots(profile.load_LE, problem.num_slots, ranks, seed=seed)
    if start_LP is not None and start_LP.shape == start.shape:
        start = start_LP
    start_LE = rank_of_expert(start, ranks, profile.model.num_experts)
    pairs = zip(profile.sets, profile.load_LE, strict=True)
    layers = [BlocksLayer(sets.expert_HK, sets.weight_H, load_E) for sets, load_E in pairs]
    arguments = (layers, ranks, problem.max_par, start_LE, time_limit_s, seed)
    try:
        answer = run_isolated(search_blocks, arguments, time_limit_s=time_limit_s)
    except (IsolationTimeoutError, SolverError) as error:
        stopped: StoppedBy = "time_limit" if isinstance(error, IsolationTimeoutError) else "error"
        seconds = time.perf_counter() - started
        return SolveResult(solver=NAME, status="error", stopped_by=stopped, seconds=seconds, message=str(error))
    return _result(problem, answer, started)


def _result(problem: PlacementProblem, answer: BlocksAnswer, started: float) -> SolveResult:
    arrays = {"block_price_LME": answer.price_LME, "block_threshold_LM": answer.threshold_LM}
    draft = Certificate(
        kind="blocks",
        objective_name="ranks_touched",
        bound=-np.inf,
        proof="set partitioning LP over all blocks of experts",
        arrays=arrays,
        numbers={"price": answer.price},
    )
    # the verifier's own figure: rounding of the LP is its business
    bound = min(verify(problem, draft), answer.objective)
    layers = len(answer.rank_LE)
    optimal = answer.proven_layers == layers or answer.objective <= bound * (1 + 1e-9)
    return SolveResult(
        solver=NAME,
        status="solved",
        stopped_by="optimal" if optimal else "time_limit" if answer.stopped_by_time else "effort",
        slot_expert_LP=slots_of_ranks(answer.rank_LE, problem.cluster.num_ranks),
        objective_name="ranks_touched",
        objective=answer.objective,
        # integer programs prove more than the LP, but leave nothing that could be verified without a solver
        bound=answer.objective if optimal else bound,
        bound_by="set partitioning, integer programs" if optimal else "set partitioning LP",
        seconds=time.perf_counter() - started,
        message=f"{answer.proven_layers} of {layers} layers proven optimal by integer programs; "
        f"the certificate alone proves {bound:.4f}",
        certificate=Certificate(
            kind="blocks",
            objective_name="ranks_touched",
            bound=bound,
            proof=draft.proof,
            arrays=arrays,
            numbers=draft.numbers,
        ),
    )
