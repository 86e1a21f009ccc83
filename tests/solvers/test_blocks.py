"""Set partitioning: optimal on tiny problems, bounded under a cap, with certificates that nobody has to believe."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import every_assignment, problem_of, random_trace

from placer.core.certificates import verify
from placer.core.errors import InfeasibleError, UsageError, ViolationError
from placer.core.evaluate import par
from placer.core.problem import PlacementProblem
from solvers.exact.blocks import applies_to, solve_blocks
from solvers.exact.blocks_model import every_block, relax, visits
from solvers.exact.blocks_search import BlocksLayer, search_blocks
from solvers.touch.anneal import touched


def layer_choices(problem: PlacementProblem, layer: int) -> list[tuple[float, float]]:
    """(ranks touched, PAR) of every placement of one layer."""
    sets, load_E = problem.profile.sets[layer], problem.profile.load_LE[layer]
    ranks = problem.cluster.num_ranks
    found = []
    for rank_E in every_assignment(len(load_E), ranks):
        cost = touched(sets.expert_HK, sets.weight_H, rank_E, ranks) / sets.weight_H.sum()
        found.append((cost, float(par(np.bincount(rank_E, weights=load_E, minlength=ranks)))))
    return found


def optimum(problem: PlacementProblem) -> float:
    """Least mean ranks touched over all placements of two layers whose mean PAR meets the cap."""
    first, second = (layer_choices(problem, layer) for layer in range(2))
    cap = np.inf if problem.max_par is None else problem.max_par
    costs = [(a + c) / 2 for a, b in first for c, d in second if (b + d) / 2 <= cap + 1e-12]
    return min(costs, default=np.inf)


def solved_here(problem: PlacementProblem) -> tuple[float, float]:
    """Objective of `search_blocks` in this process, and the bound its certificate proves."""
    from solvers.exact import blocks

    layers = [
        BlocksLayer(sets.expert_HK, sets.weight_H, load_E)
        for sets, load_E in zip(problem.profile.sets, problem.profile.load_LE, strict=True)
    ]
    start_LE = blocks.lpt_slots(problem.profile.load_LE, problem.num_slots, problem.cluster.num_ranks)
    start_LE = np.argsort(start_LE, axis=1) // problem.slots_per_rank
    answer = search_blocks(layers, problem.cluster.num_ranks, problem.max_par, start_LE, 20.0, 0)
    result = blocks._result(problem, answer, 0.0)
    assert result.certificate is not None
    assert result.bound is not None
    assert result.certificate.bound <= result.bound <= answer.objective
    return answer.objective, verify(problem, result.certificate)


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 3]), st.sampled_from([2, 3]))
def test_without_a_cap_the_optimum_is_found_and_bounded(seed: int, ranks: int, top_k: int) -> None:
    problem = problem_of(random_trace(seed, top_k=top_k), ranks)
    objective, bound = solved_here(problem)
    best = optimum(problem)
    assert objective == pytest.approx(best, abs=1e-9)
    assert bound <= best + 1e-9


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000), st.floats(1.02, 1.5))
def test_with_a_cap_the_optimum_lies_between_bound_and_objective(seed: int, cap: float) -> None:
    problem = replace(problem_of(random_trace(seed, top_k=2), 3), max_par=cap)
    best = optimum(problem)
    if not np.isfinite(best):
        return
    objective, bound = solved_here(problem)
    assert bound <= best + 1e-9
    assert objective >= best - 1e-9 or best == np.inf


def test_the_solver_proves_the_optimum_in_its_own_process() -> None:
    problem = problem_of(random_trace(3), 3)
    result = solve_blocks(problem, time_limit_s=20)
    assert (result.status, result.stopped_by) == ("solved", "optimal")
    assert result.objective == pytest.approx(optimum(problem), abs=1e-9)
    again = solve_blocks(problem, time_limit_s=20)
    assert np.array_equal(result.slot_expert_LP, again.slot_expert_LP)  # type: ignore[arg-type]


def test_a_cap_that_binds_is_met() -> None:
    problem = problem_of(random_trace(11, experts=12, top_k=3), 4)
    free = solve_blocks(problem, time_limit_s=20)
    capped = solve_blocks(replace(problem, max_par=1.05), time_limit_s=20)
    load_LE, ranks = problem.profile.load_LE, 4

    def mean_par(slots_LP: np.ndarray) -> float:
        loads = [load_E[row].reshape(ranks, -1).sum(axis=1) for load_E, row in zip(load_LE, slots_LP, strict=True)]
        return float(par(np.array(loads)).mean())

    assert free.slot_expert_LP is not None
    assert capped.slot_expert_LP is not None
    assert mean_par(capped.slot_expert_LP) <= 1.05 + 1e-9 < mean_par(free.slot_expert_LP)
    assert free.bound <= free.objective <= capped.objective  # type: ignore[operator]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"numbers": {"price": -1.0}}, "price"),
        ({"bound": 9.0}, "claims"),
        ({"arrays": {}}, "block_price_LME"),
        ({"numbers": {"price": 1.0}}, "cap"),
    ],
)
def test_a_tampered_certificate_is_refused(change: dict[str, object], says: str) -> None:
    problem = problem_of(random_trace(3), 3)
    certificate = solve_blocks(problem, time_limit_s=20).certificate
    assert certificate is not None
    with pytest.raises(ViolationError, match=says):
        verify(problem, replace(certificate, **change))  # type: ignore[arg-type]


def test_prices_that_are_too_high_prove_less_not_more() -> None:
    problem = problem_of(random_trace(3), 3)
    certificate = solve_blocks(problem, time_limit_s=20).certificate
    assert certificate is not None
    for factor in (0.5, 1.5, 3.0):
        scaled = {**certificate.arrays, "block_price_LME": certificate.arrays["block_price_LME"] * factor}
        assert verify(problem, replace(certificate, arrays=scaled, bound=-99.0)) <= certificate.bound + 1e-9


def test_visits_count_the_tokens_of_a_block_by_hand() -> None:
    expert_HK = np.array([[0, 1, -1], [1, 2, 3], [3, -1, -1]], dtype=np.int16)
    block_ZC = every_block(4, 2)
    counted = dict(zip(map(tuple, block_ZC.tolist()), visits(block_ZC, expert_HK, np.array([5, 3, 2])), strict=True))
    assert counted[0, 1] == pytest.approx(0.8)
    assert counted[2, 3] == pytest.approx(0.5)
    assert counted[0, 3] == pytest.approx(1.0)


def test_blocks_that_cannot_cover_give_a_large_finite_bound() -> None:
    block_ZC = every_block(4, 2)
    cost_Z = np.where((block_ZC == 0).any(axis=1), np.inf, 1.0)
    assert 10 < relax(cost_Z, block_ZC, 4).bound < np.inf


def test_problems_it_cannot_list_and_caps_nobody_can_meet_are_refused() -> None:
    problem = problem_of(random_trace(3), 3)
    assert applies_to(problem)
    assert not applies_to(replace(problem, redundant=3))
    with pytest.raises(UsageError, match="no redundant slots"):
        solve_blocks(replace(problem, redundant=3))
    with pytest.raises(InfeasibleError, match="max_par"):
        solve_blocks(replace(problem_of(random_trace(5), 6), max_par=1.0001))
