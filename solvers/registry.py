"""Solvers by name; each module, and the back end it needs, is imported only when it is used."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import import_module
from typing import cast

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from placer.core.problem import PlacementProblem
from solvers.result import SolveResult

__all__ = ["SOLVERS", "SolverInfo", "run_solver"]


@dataclass(frozen=True, slots=True)
class SolverInfo:
    """Where a solver lives, one line about it, which of the optional arguments it takes, whether `coherent` mode may
    relabel its ranks, whether it places redundant slots, and whether it is a baseline.

    Baselines stand for what others do: they may leave the load cap unmet, and EPLB may repeat an expert on a rank.
    """

    module: str
    function: str
    about: str
    takes: tuple[str, ...] = ()
    align: bool = True
    replicas: bool = True
    baseline: bool = False


SOLVERS: dict[str, SolverInfo] = {
    "linear": SolverInfo(
        "solvers.balance.simple",
        "solve_linear",
        "experts by index, contiguous blocks (engines' default)",
        align=False,
        baseline=True,
    ),
    "round_robin": SolverInfo(
        "solvers.balance.simple", "solve_round_robin", "expert e on rank e mod R", align=False, baseline=True
    ),
    "eplb": SolverInfo(
        "solvers.balance.eplb", "solve_eplb", "DeepSeek's EPLB rules, global", align=False, baseline=True
    ),
    "eplb_hierarchical": SolverInfo(
        "solvers.balance.eplb",
        "solve_eplb_hierarchical",
        "DeepSeek's EPLB rules, nodes first",
        align=False,
        baseline=True,
    ),
    "lpt": SolverInfo("solvers.balance.lpt", "solve_lpt", "load only: LPT, swaps, re-replication", ("seed",)),
    "risk": SolverInfo(
        "solvers.balance.risk", "solve_risk", "load under drift: mean + z std over windows, LPT and swaps", ("seed",)
    ),
    "lplb": SolverInfo(
        "solvers.balance.split",
        "solve_lplb",
        "EPLB's placement, replica shares by LPLB's linear program",
        align=False,
        baseline=True,
    ),
    "coactivation": SolverInfo(
        "solvers.touch.coactivation",
        "solve_coactivation",
        "few ranks touched under a load cap, no replicas",
        ("seed", "time_limit_s", "gap", "start_LP", "progress"),
        replicas=False,
    ),
    "replicated": SolverInfo(
        "solvers.touch.replicated",
        "solve_replicated",
        "few ranks touched under a load cap, replicas placed jointly (at most 64 ranks)",
        ("seed", "time_limit_s", "start_LP", "progress"),
    ),
    "affinity": SolverInfo(
        "solvers.affinity.affinity",
        "solve_affinity",
        "most transitions kept on one rank under a load cap, with a certificate",
        ("seed", "time_limit_s", "gap", "start_LP", "progress"),
        align=False,
        replicas=False,
    ),
    "moetuner": SolverInfo(
        "solvers.papers.moetuner",
        "solve_moetuner",
        "MoETuner's two ILPs (small models)",
        ("time_limit_s",),
        replicas=False,
        baseline=True,
    ),
    "exflow": SolverInfo(
        "solvers.papers.exflow",
        "solve_exflow",
        "ExFlow's integer program with a mended bound (small models; ignores max_par)",
        ("seed", "time_limit_s", "start_LP"),
        align=False,
        replicas=False,
        baseline=True,
    ),
    "exflow_staged": SolverInfo(
        "solvers.papers.exflow",
        "solve_exflow_staged",
        "ExFlow as published: nodes, then ranks (ignores max_par)",
        ("seed", "time_limit_s", "start_LP"),
        align=False,
        replicas=False,
        baseline=True,
    ),
    "sem_moe": SolverInfo(
        "solvers.papers.sem_moe",
        "solve_sem_moe",
        "Sem-MoE's co-clustering, request folds as requests",
        ("seed",),
        align=False,
        replicas=False,
        baseline=True,
    ),
    "blocks": SolverInfo(
        "solvers.exact.blocks",
        "solve_blocks",
        "fewest ranks touched, exact where every block of experts can be listed",
        ("seed", "time_limit_s", "start_LP"),
        replicas=False,
    ),
    "chain": SolverInfo(
        "solvers.exact.chain",
        "solve_chain",
        "fewest transitions between ranks, exact under a load cap (few experts a layer)",
        ("progress",),
        align=False,
        replicas=False,
    ),
    "cpsat": SolverInfo(
        "solvers.exact.cpsat",
        "solve_cpsat",
        "exact ranks touched by CP-SAT (small models)",
        ("seed", "time_limit_s"),
        replicas=False,
    ),
}


def run_solver(
    name: str,
    problem: PlacementProblem,
    *,
    seed: int = 0,
    time_limit_s: float = 60.0,
    gap: float = 0.0,
    start_LP: npt.NDArray[np.int64] | None = None,
    progress: Callable[[int, int], None] | None = None,
    note: Callable[[str], None] | None = None,
) -> SolveResult:
    """Runs one solver from `start_LP` (a placement, or None) until it is done, within `gap` or out of time.

    "auto" is the portfolio (`solvers.portfolio`), which returns in the name of the solver that found the placement and
    tells `note` who improved what. In `coherent` mode a solver's ranks, unless it is a baseline, are then aligned over
    layers. Raises UsageError for a name that is not known.
    """
    given = {"seed": seed, "time_limit_s": time_limit_s, "gap": gap, "start_LP": start_LP, "progress": progress}
    if name == "auto":
        solve_all = import_module("solvers.portfolio").solve_portfolio
        return cast(SolveResult, solve_all(problem, **given, note=note))
    if name not in SOLVERS:
        raise UsageError(f"solver {name!r} is not known; use auto or one of {', '.join(SOLVERS)}")
    info = SOLVERS[name]
    solve = getattr(import_module(info.module), info.function)
    result: SolveResult = solve(problem, **{key: given[key] for key in info.takes})
    transitions = problem.profile.transition_LEE
    if problem.mode == "coherent" and info.align and result.slot_expert_LP is not None and transitions is not None:
        align_ranks = import_module("solvers.affinity.relabel").align_ranks
        relabel_ranks = import_module("solvers.ranks").relabel_ranks
        order_LR = align_ranks(result.slot_expert_LP, transitions, problem.cluster.num_ranks)
        share_LP = result.replica_share_LP
        result = replace(
            result,
            slot_expert_LP=relabel_ranks(result.slot_expert_LP, order_LR),
            replica_share_LP=None if share_LP is None else relabel_ranks(share_LP, order_LR),
        )
    return result
