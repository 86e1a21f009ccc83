"""The placements engines start with: experts by index.

Legend: L layers, P slots, E experts, R ranks.
"""

import numpy as np

from placer.core.plan import canonical_slots
from placer.core.problem import PlacementProblem
from solvers.balance.load import load_result
from solvers.result import SolveResult

__all__ = ["solve_linear", "solve_round_robin"]


def solve_linear(problem: PlacementProblem) -> SolveResult:
    """Contiguous blocks of experts; slots beyond E repeat the experts from 0 on (SGLang's and vLLM's start map).

    Where that would put two replicas of one expert on a rank, the repeated ids are shifted on until it does not.
    """
    experts, ranks = problem.profile.model.num_experts, problem.cluster.num_ranks
    row = np.arange(problem.num_slots) % experts
    per_rank = problem.slots_per_rank
    for slot in range(experts, problem.num_slots):
        held = row[slot // per_rank * per_rank : slot]
        held_more = row[slot + 1 : (slot // per_rank + 1) * per_rank] if slot // per_rank * per_rank < experts else held
        free = np.setdiff1d(np.arange(experts), np.concatenate((held, held_more)))
        row[slot] = free[np.searchsorted(free, row[slot]) % len(free)]
    return load_result(problem, "linear", _everywhere(problem, row, ranks), "effort")


def solve_round_robin(problem: PlacementProblem) -> SolveResult:
    """Expert e on rank e mod R (vLLM's round_robin strategy); redundant slots go on dealing from expert 0."""
    experts, ranks = problem.profile.model.num_experts, problem.cluster.num_ranks
    held: list[list[int]] = [[] for _ in range(ranks)]
    for expert in range(experts):
        held[expert % ranks].append(expert)
    for rank in sorted(range(ranks), key=lambda r: len(held[r])):
        expert = rank
        while len(held[rank]) < problem.slots_per_rank:
            expert = (expert + 1) % experts
            if expert not in held[rank]:
                held[rank].append(expert)
    if max(len(block) for block in held) > problem.slots_per_rank:
        return solve_linear(problem)
    return load_result(problem, "round_robin", _everywhere(problem, np.concatenate(held), ranks), "effort")


def _everywhere(problem: PlacementProblem, row: np.ndarray, ranks: int) -> np.ndarray:
    return canonical_slots(np.tile(row.astype(np.int64), (problem.profile.model.num_sites, 1)), ranks)
