"""Affinity search: optimum and bound on tiny chains, caps, exactness with one expert per rank, Ctrl-C, determinism."""

from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from chain_problems import chain_problem, least_cut
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import problem_of, random_trace

from placer.core.certificates import verify
from placer.core.errors import InfeasibleError, UsageError
from placer.core.evaluate_profile import evaluate_profile
from placer.core.problem import PlacementProblem
from placer.pipeline import make_plan
from solvers.affinity.affinity import solve_affinity
from solvers.affinity.anneal_chain import anneal_block, near_flow, rank_loads
from solvers.affinity.assign import assign
from solvers.affinity.chain import Chain
from solvers.affinity.chain_start import kept_flow
from solvers.balance.load import mean_par, rank_load_LR
from solvers.result import SolveResult


def par_of(problem: PlacementProblem, result: SolveResult) -> float:
    assert result.slot_expert_LP is not None
    return mean_par(rank_load_LR(problem.profile.load_LE, result.slot_expert_LP, problem.cluster.num_ranks))


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([(6, 2), (6, 3), (4, 2)]))
def test_tiny_chains_bound_optimum_objective_in_this_order(seed: int, shape: tuple[int, int]) -> None:
    experts, ranks = shape
    problem = chain_problem(seed, experts=experts, ranks=ranks)
    result = solve_affinity(problem)
    optimum = least_cut(problem)
    assert result.bound is not None
    assert result.objective is not None
    assert result.certificate is not None
    assert result.bound <= optimum + 1e-9
    assert optimum <= result.objective + 1e-9
    assert verify(problem, result.certificate) >= result.bound - 1e-9
    kept = evaluate_profile(make_plan(problem, result, 0), problem.profile).kept
    assert result.objective == pytest.approx(1 - kept, abs=1e-12)  # type: ignore[operator]


@pytest.mark.parametrize(("max_par", "above"), [(None, 1e-9), (1.15, 0.03)])
def test_tiny_chains_are_solved_to_the_optimum_or_near_it_under_a_cap(max_par: float | None, above: float) -> None:
    found, possible = 0, 0
    for seed in range(6):
        problem = chain_problem(seed, max_par=max_par)
        optimum = least_cut(problem)
        if np.isfinite(optimum):
            objective = solve_affinity(problem).objective
            assert optimum - 1e-9 <= objective <= optimum + above  # type: ignore[operator]
            found += objective <= optimum + 1e-9  # type: ignore[operator]
            possible += 1
    assert found >= possible - 1 >= 2


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10_000), st.floats(1.02, 1.5))
def test_the_cap_holds_where_load_alone_can_meet_it(seed: int, cap: float) -> None:
    free = chain_problem(seed, layers=4, experts=12, ranks=3)
    problem = replace(free, max_par=cap)
    try:
        result = solve_affinity(problem)
    except InfeasibleError:
        return
    chain = Chain.of(problem, 0.0, 0)
    if chain.excess(chain.balanced_LE) <= 0:
        assert par_of(problem, result) <= cap + 1e-8
    assert result.objective >= solve_affinity(free).bound - 1e-9  # type: ignore[operator]


def test_unseen_requests_are_thought_of_where_there_are_folds() -> None:
    trace = random_trace(4, layers=3, experts=12, tokens=3000, top_k=2)
    problem = problem_of(trace, 4, mode="coherent", max_par=1.2)
    result = solve_affinity(problem)
    chain = Chain.of(problem, 0.0, 0)
    assert result.slot_expert_LP is not None
    seen, expected = chain.par(np.argsort(result.slot_expert_LP, axis=1) // 3)
    assert seen <= 1.2 + 1e-8
    assert seen < expected <= chain.cap_expected + 1e-8
    assert f"{expected:.3f}" in result.message


@pytest.mark.parametrize("seed", range(4))
def test_one_expert_per_rank_is_solved_exactly(seed: int) -> None:
    problem = chain_problem(seed, layers=5, experts=6, ranks=6)
    result = solve_affinity(problem)
    flow_LEE = problem.profile.transition_LEE
    assert flow_LEE is not None
    best = sum(
        max(sum(flow[i, j] for i, j in enumerate(order)) for order in permutations(range(6))) for flow in flow_LEE
    )
    assert result.stopped_by == "optimal"
    assert result.gap == pytest.approx(0.0, abs=1e-8)
    assert result.objective == pytest.approx(1 - best / flow_LEE.sum(), abs=1e-12)


def test_nodes_count_in_the_objective() -> None:
    for seed in range(3):
        problem = chain_problem(seed, experts=4, ranks=4, nodes=2)
        result = solve_affinity(problem)
        assert result.objective_name == "cut + 1 * cut_nodes"
        optimum = least_cut(problem, node_weight=1.0)
        assert result.bound <= optimum + 1e-9  # type: ignore[operator]
        assert optimum - 1e-9 <= result.objective <= optimum + 0.03  # type: ignore[operator]


def test_the_same_seed_gives_the_same_bytes() -> None:
    problem = chain_problem(1, layers=4, experts=12, ranks=4, max_par=1.2)
    first, second = solve_affinity(problem, seed=3), solve_affinity(problem, seed=3)
    assert make_plan(problem, first, 3).to_json() == make_plan(problem, second, 3).to_json()
    assert first.bound == second.bound


def test_a_start_plan_is_never_made_worse_and_no_time_is_enough_for_an_answer() -> None:
    problem = chain_problem(2, layers=4, experts=12, ranks=4, max_par=1.2)
    good = solve_affinity(problem)
    hurried = solve_affinity(problem, seed=1, time_limit_s=1e-6, start_LP=good.slot_expert_LP)
    assert hurried.stopped_by == "time_limit"
    assert hurried.objective <= good.objective + 1e-12  # type: ignore[operator]
    assert 0 <= hurried.bound <= good.objective + 1e-9  # type: ignore[operator]


def test_the_gap_asked_for_stops_it() -> None:
    problem = chain_problem(2, layers=4, experts=12, ranks=4)
    result = solve_affinity(problem, gap=0.5)
    assert result.stopped_by == "gap"
    assert result.gap <= 0.5  # type: ignore[operator]


@pytest.mark.parametrize("after", [1, 20, 405])
def test_ctrl_c_returns_the_best_so_far_with_its_bound(after: int) -> None:
    problem = chain_problem(5, layers=4, experts=12, ranks=4, max_par=1.2)
    ticks = 0

    def press(done: int, total: int) -> None:
        nonlocal ticks
        ticks += 1
        assert done <= total
        if ticks == after:
            raise KeyboardInterrupt

    result = solve_affinity(problem, progress=press)
    assert result.stopped_by == "interrupt"
    assert result.certificate is not None
    assert 0 <= result.bound <= result.objective  # type: ignore[operator]
    assert par_of(problem, result) <= 1.2 + 1e-8


def test_assignment_is_optimal_and_its_prices_prove_it() -> None:
    from ortools.graph.python import linear_sum_assignment

    rng = np.random.default_rng(0)
    for experts, ranks in ((12, 4), (24, 24), (32, 2)):
        gain_ER = rng.integers(0, 50, (experts, ranks)).astype(np.float64)
        price_R = rng.normal(0.0, 5.0, ranks)
        rank_E = assign(gain_ER, price_R)
        assert (np.bincount(rank_E, minlength=ranks) == experts // ranks).all()
        found = gain_ER[np.arange(experts), rank_E].sum()
        proof = (gain_ER - price_R).max(axis=1).sum() + experts // ranks * price_R.sum()
        assert found == pytest.approx(proof, abs=1e-6)
        solver = linear_sum_assignment.SimpleLinearSumAssignment()
        wide = np.repeat(gain_ER, experts // ranks, axis=1)
        one, two = np.indices(wide.shape)
        solver.add_arcs_with_cost(one.ravel(), two.ravel(), (50 - wide.ravel()).astype(np.int64))
        assert solver.solve() == solver.OPTIMAL
        assert found == 50 * experts - solver.optimal_cost()


def test_annealing_keeps_its_books() -> None:
    problem = chain_problem(0, layers=4, experts=12, ranks=4, nodes=2)
    chain = Chain.of(problem, 1.0, 0)
    rank_LE, node_R = chain.balanced_LE.copy(), chain.node_R
    near_LRE = near_flow(chain.flow_LEE, chain.back_LEE, rank_LE, 4)
    near_LNE = near_flow(chain.flow_LEE, chain.back_LEE, node_R[rank_LE], 2)
    load_LR = rank_loads(chain.share_LE, rank_LE, 4)
    before_LE = rank_LE.copy()
    anneal_block(
        chain.flow_LEE, chain.back_LEE, near_LRE, near_LNE, rank_LE, node_R, 1.0, chain.share_LE, load_LR,
        np.full(4, 1.2), 100.0, 500, 50.0, np.random.default_rng(0),
    )  # fmt: skip
    assert (rank_LE != before_LE).any()
    np.testing.assert_allclose(near_LRE, near_flow(chain.flow_LEE, chain.back_LEE, rank_LE, 4))
    np.testing.assert_allclose(near_LNE, near_flow(chain.flow_LEE, chain.back_LEE, node_R[rank_LE], 2))
    np.testing.assert_allclose(load_LR, rank_loads(chain.share_LE, rank_LE, 4))
    own = near_LRE[np.arange(4)[:, None], rank_LE, np.arange(12)].sum() / 2
    assert own == pytest.approx(kept_flow(chain.flow_LEE, rank_LE))


def test_an_infinite_price_lets_no_overload_grow() -> None:
    problem = chain_problem(0, layers=4, experts=12, ranks=4)
    chain = Chain.of(problem, 0.0, 0)
    rank_LE = chain.balanced_LE.copy()
    near_LRE = near_flow(chain.flow_LEE, chain.back_LEE, rank_LE, 4)
    load_LR = rank_loads(chain.share_LE, rank_LE, 4)
    cap_L = load_LR.max(axis=1) + 0.01
    anneal_block(
        chain.flow_LEE, chain.back_LEE, near_LRE, near_LRE, rank_LE, chain.node_R, 0.0, chain.share_LE, load_LR, cap_L,
        np.inf, 2000, 1e6, np.random.default_rng(0),
    )  # fmt: skip
    assert (rank_LE != chain.balanced_LE).any()
    assert (load_LR.max(axis=1) <= cap_L + 1e-9).all()


def test_renaming_ranks_never_costs() -> None:
    rng = np.random.default_rng(0)
    for nodes, weight in ((1, 0.0), (2, 1.0)):
        problem = chain_problem(1, layers=5, experts=12, ranks=4, nodes=nodes)
        chain = Chain.of(problem, weight, 0)
        for _ in range(5):
            rank_LE = rng.permuted(np.tile(np.repeat(np.arange(4), 3), (5, 1)), axis=1)
            assert chain.kept(chain.relabel(rank_LE)) >= chain.kept(rank_LE) - 1e-9


def test_what_cannot_be_solved_says_why() -> None:
    with pytest.raises(UsageError, match="--solver replicated"):
        solve_affinity(chain_problem(0, redundant=3))
    problem = chain_problem(0)
    with pytest.raises(UsageError, match="no transitions"):
        solve_affinity(replace(problem, profile=replace(problem.profile, transition_LEE=None)))
    load_LE = np.tile(np.array([1000, 1, 1, 1, 1, 1]), (3, 1))
    hot = replace(problem.profile, load_WLE=load_LE[None], load_FLE=load_LE[None])
    with pytest.raises(InfeasibleError, match="one expert alone"):
        solve_affinity(replace(problem, profile=hot, max_par=1.5))


def test_unequal_counts_allowed_means_no_certificate_but_a_plan() -> None:
    result = solve_affinity(chain_problem(0, allow_empty_slots=True))
    assert result.certificate is None
    assert result.bound == 0.0
    assert result.objective < 1.0  # type: ignore[operator]
