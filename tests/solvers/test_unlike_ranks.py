"""Ranks that differ in speed or memory: bounds against brute force, hand examples, uneven slots, what is refused.

Legend: L layers, E experts, R ranks, P slots.
"""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import counts_problem, problem_of, random_trace, trace_of

from placer.config.settings import SolveSettings
from placer.core.certificates import Certificate, verify
from placer.core.check import check
from placer.core.errors import InfeasibleError, UsageError
from placer.core.evaluate import par
from placer.core.problem import PlacementProblem
from placer.pipeline import check_plan, judge, make_plan, solve
from solvers.balance.load import max_load_bound, par_bound, rank_load_LR
from solvers.balance.lpt import solve_lpt
from solvers.exact.cpsat import solve_cpsat
from solvers.registry import run_solver
from solvers.result import SolveResult
from solvers.score import score
from solvers.touch.anneal import touched
from solvers.touch.coactivation import solve_coactivation
from solvers.touch.replicated import solve_replicated

GIB = 2**30


def with_ranks(problem: PlacementProblem, **unlike: object) -> PlacementProblem:
    return replace(problem, cluster=replace(problem.cluster, **unlike))


def rank_loads(problem: PlacementProblem, result: SolveResult, layer: int = 0) -> np.ndarray:
    assert result.slot_expert_LP is not None
    row_RC = result.slot_expert_LP[layer].reshape(problem.cluster.num_ranks, -1)
    load_E = problem.profile.load_LE[layer]
    return np.array([load_E[row[row >= 0]].sum() for row in row_RC])


def test_par_counts_time_not_tokens() -> None:
    load, speed = np.array([[30.0, 10.0]]), np.array([3.0, 1.0])
    assert par(load, speed).tolist() == [1.0]
    assert par(load).tolist() == [1.5]
    # 20 on a rank of speed 1 takes 20; 40 on ranks of speed 4 in all should take 10
    assert par(np.array([20.0, 20.0]), speed) == pytest.approx(2.0)
    assert par(np.zeros((2, 2)), speed).tolist() == [1.0, 1.0]
    assert par(load, 7 * speed) == pytest.approx(par(load, speed))


def test_the_faster_rank_gets_the_heavier_experts() -> None:
    problem = with_ranks(counts_problem(np.array([[40, 20, 10, 10]]), 2), rank_speed=(1.0, 3.0))
    result = solve_lpt(problem)
    # total 80 over speed 4: 20 a unit of speed; 60 and 20 meet it exactly
    assert rank_loads(problem, result).tolist() == [20, 60]
    assert (result.objective, result.bound, result.stopped_by) == (1.0, 1.0, "optimal")
    plan = make_plan(problem, result, 0)
    assert check(replace(problem, max_par=1.0), plan) == []
    # the same plan on equal ranks breaks the cap
    assert check(replace(counts_problem(np.array([[40, 20, 10, 10]]), 2), max_par=1.0), plan)[0].code == "max-par"


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([2, 3]), st.booleans())
def test_bounds_and_lpt_against_brute_force(seed: int, ranks: int, uneven: bool) -> None:
    rng = np.random.default_rng(seed)
    load_E = rng.integers(1, 60, 6)
    speed_R = rng.uniform(0.5, 3.0, ranks)
    problem = with_ranks(counts_problem(load_E[None], ranks), rank_speed=tuple(speed_R.tolist()))
    problem = replace(problem, allow_empty_slots=uneven)
    room_R = problem.room_LR[0]
    best = np.inf
    for rank_E in itertools.product(range(ranks), repeat=6):
        counts = np.bincount(rank_E, minlength=ranks)
        if (counts <= room_R).all() and (uneven or (counts == 6 // ranks).all()):
            load_R = np.bincount(rank_E, weights=load_E, minlength=ranks)
            best = min(best, float(par(load_R, speed_R)))
    assert par_bound(problem) <= best + 1e-9
    result = solve_lpt(problem)
    assert result.objective is not None
    assert best - 1e-9 <= result.objective <= 1.35 * best
    assert check(problem, make_plan(problem, result, 0)) == []
    peak = max_load_bound(load_E, ranks, 6 // ranks, speed_R, uneven=uneven)
    assert peak / (load_E.sum() / ranks) == pytest.approx(par_bound(problem))


def test_equal_speeds_are_no_speeds() -> None:
    trace = random_trace(4, experts=8, top_k=3)
    plain = replace(problem_of(trace, 4), max_par=1.3)
    alike = with_ranks(plain, rank_speed=(2.0,) * 4)
    assert alike.cluster.speed_R is None
    for solver in (solve_lpt, solve_coactivation):
        one, two = solver(plain, seed=1), solver(alike, seed=1)
        assert (one.slot_expert_LP == two.slot_expert_LP).all()
        assert (one.objective, one.bound) == (two.objective, two.bound)


@settings(max_examples=4, deadline=None)
@given(st.integers(0, 10_000))
def test_coactivation_meets_the_cap_at_unequal_speeds(seed: int) -> None:
    trace = random_trace(seed, experts=12, top_k=2, tokens=300)
    cluster = replace(problem_of(trace, 4).cluster, rank_speed=(1.0, 1.0, 1.0, 1.3))
    balanced = solve(trace, cluster, solver="lpt", max_par=None)
    solved = solve(trace, cluster, solver="coactivation", max_par=balanced.evaluation.par + 0.02, time_limit_s=600)
    assert solved.problem.max_par is not None
    assert solved.evaluation.par <= solved.problem.max_par + 1e-9
    assert solved.evaluation.par == pytest.approx(judge(solved.plan, solved.problem.profile, cluster).par)
    assert solved.evaluation.ranks_touched <= balanced.evaluation.ranks_touched


def pairs_problem(**limits: object) -> PlacementProblem:
    """Four experts chosen together by everybody, four alone by few: 4 + 1 a rank beats 2 + 2."""
    rows = (
        [[0, 1, 2]] * 40
        + [[1, 2, 3]] * 40
        + [[0, 2, 3]] * 40
        + [[0, 1, 3]] * 40
        + [[4, 5, 6]] * 100
        + [[5, 6, 7]] * 100
    )
    return problem_of(trace_of(np.array([rows]), 8), 3 + 1, **limits)


def test_uneven_slots_beat_equal_slots() -> None:
    equal = pairs_problem()
    uneven = replace(equal, allow_empty_slots=True)
    assert uneven.room_LR.tolist() == [[4, 4, 4, 4]]
    one, two = solve_coactivation(equal), solve_coactivation(uneven)
    # two slots a rank: every token of three experts touches two ranks; four slots: one
    assert (one.objective, two.objective, two.bound) == (2.0, 1.0, 1.0)
    plan = make_plan(uneven, two, 0)
    assert plan.slots_per_rank == 4
    assert check(uneven, plan) == []
    assert {violation.code for violation in check(equal, plan)} >= {"slots"}
    trace = trace_of(np.array([[[0, 1, 2]]]), 8)
    assert judge(plan, trace, equal.cluster).ranks_touched == 1.0


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 10_000))
def test_uneven_slots_against_brute_force(seed: int) -> None:
    trace = random_trace(seed, layers=1, experts=6, top_k=3, tokens=200)
    problem = problem_of(trace, 3)
    size = problem.profile.model.expert_bytes
    memory = (1.5 * size / GIB, 2.5 * size / GIB, 3.5 * size / GIB)
    problem = with_ranks(replace(problem, allow_empty_slots=True), rank_memory_gib=memory)
    assert problem.room_LR.tolist() == [[1, 2, 3]]
    sets = problem.profile.sets[0]
    best = min(
        touched(sets.expert_HK, sets.weight_H, np.array(rank_E), 3)
        for rank_E in itertools.product(range(3), repeat=6)
        if (np.bincount(rank_E, minlength=3) <= [1, 2, 3]).all()
    )
    result = solve_coactivation(problem)
    assert result.objective == pytest.approx(best / sets.weight_H.sum())
    assert result.bound is not None
    assert result.bound <= result.objective
    assert check(problem, make_plan(problem, result, 0)) == []
    assert check(problem, make_plan(problem, solve_lpt(problem), 0)) == []


def test_memory_is_for_all_layers_together() -> None:
    problem = problem_of(random_trace(0, layers=3, experts=6), 2)
    size = problem.profile.model.expert_bytes / GIB
    # 8 experts in three layers: 3, 3 and 2; the other rank holds what is left
    problem = with_ranks(replace(problem, allow_empty_slots=True), rank_memory_gib=(8.5 * size, 20 * size))
    assert problem.room_LR[:, 0].tolist() == [3, 3, 2]
    assert (problem.room_LR.sum(axis=1) >= 6).all()
    assert check(problem, make_plan(problem, solve_coactivation(problem), 0)) == []


def test_too_little_memory_names_the_rank() -> None:
    problem = problem_of(random_trace(0, layers=2, experts=6), 2)
    size = problem.profile.model.expert_bytes / GIB
    cluster = replace(problem.cluster, rank_memory_gib=(80.0, 5.5 * size))
    with pytest.raises(InfeasibleError, match=r"rank 1 of test has .* allow_empty_slots"):
        replace(problem, cluster=cluster)
    assert replace(problem, cluster=cluster, allow_empty_slots=True).room_LR[:, 1].tolist() == [3, 2]
    small = replace(problem.cluster, rank_memory_gib=(6.5 * size, 5.2 * size))
    with pytest.raises(InfeasibleError, match=r"hold 5 experts a layer together and the model has 6; rank 1 has least"):
        replace(problem, cluster=small, allow_empty_slots=True)


def test_a_plan_over_one_ranks_memory_is_refused() -> None:
    problem = problem_of(random_trace(0, layers=2, experts=6), 2)
    plan = make_plan(problem, solve_lpt(problem), 0)
    size = problem.profile.model.expert_bytes / GIB
    small = with_ranks(replace(problem, allow_empty_slots=True), rank_memory_gib=(80.0, 5.5 * size))
    found = check(small, plan)
    assert [(violation.code, violation.where) for violation in found] == [("memory", "rank 1")]
    # empty slots weigh nothing
    emptied = plan.slot_expert_LP.reshape(2, 2, 3)
    wide = np.full((2, 2, 5), -1, dtype=np.int64)
    wide[:, :, :3] = emptied
    wide[0, 0, 3], wide[0, 1, 0] = wide[0, 1, 0], -1
    assert check(small, replace(plan, slot_expert_LP=wide.reshape(2, 10))) == []


def test_the_pipeline_takes_memory_and_empty_slots() -> None:
    trace = random_trace(3, layers=2, experts=8, top_k=3)
    size = trace.model.expert_bytes / GIB
    cluster = replace(problem_of(trace, 2).cluster, rank_memory_gib=(7.5 * size, 11 * size))
    uneven = SolveSettings(allow_empty_slots=True)
    solved = solve(trace, cluster, max_par=None, solve_settings=uneven)
    held_R = (solved.plan.slot_expert_LP >= 0).reshape(2, 2, -1).sum(axis=(0, 2))
    assert held_R[0] <= 7
    assert check_plan(solved.plan, trace, cluster, solve_settings=uneven).violations == ()
    assert check_plan(solved.plan, trace, cluster).violations != ()
    again = solve(trace, cluster, max_par=None, current=solved.plan, solve_settings=uneven)
    assert again.evaluation.ranks_touched <= solved.evaluation.ranks_touched + 1e-9
    with pytest.raises(InfeasibleError, match="linear gives every rank equal slots: memory at rank 0"):
        solve(trace, cluster, max_par=None, solver="linear", solve_settings=uneven)


def test_solvers_and_proofs_for_equal_ranks_refuse_others() -> None:
    problem = problem_of(random_trace(1, experts=8), 4)
    fast = with_ranks(problem, rank_speed=(1.0, 1.0, 1.0, 2.0))
    for name, run in (("replicated", solve_replicated), ("cpsat", lambda p: solve_cpsat(p, time_limit_s=1))):
        with pytest.raises(UsageError, match=f"{name} takes all ranks for equally fast"):
            run(fast)
        with pytest.raises(UsageError, match=f"{name} gives every rank equal slots"):
            run(replace(problem, allow_empty_slots=True))
    proof = Certificate(kind="par", objective_name="par", bound=1.0, proof="")
    assert verify(problem, proof) >= 1.0
    with pytest.raises(UsageError, match="ranks of equal speed"):
        verify(fast, proof)
    q_LE = np.zeros((2, 8))
    q_LE[0, 0] = 0.1
    arrays, numbers = {"load_q_LE": q_LE}, {"price": 0.2}
    loaded = Certificate(kind="touched", objective_name="", bound=-9.0, proof="", arrays=arrays, numbers=numbers)
    verify(replace(problem, max_par=1.5), loaded)
    with pytest.raises(UsageError, match="ranks of equal speed"):
        verify(replace(fast, max_par=1.5), loaded)
    # without load multipliers nothing depends on speeds
    verify(fast, Certificate(kind="touched", objective_name="", bound=-9.0, proof=""))


@pytest.mark.parametrize("mode", ["per_rank", "coherent", "per_expert"])
def test_auto_counts_load_over_speed(mode: str) -> None:
    """A plan that is even in tokens is not even in time: the portfolio scores, promises and stops by speeds."""
    alike = problem_of(random_trace(2, experts=12, top_k=2, tokens=800), 4, mode=mode, max_par=1.3)
    problem = with_ranks(alike, rank_speed=(1.0, 1.0, 2.0, 2.0))
    result = run_solver("auto", problem, time_limit_s=20)
    assert result.slot_expert_LP is not None
    speed_R = problem.cluster.speed_R
    load_LR = rank_load_LR(problem.profile.load_LE, result.slot_expert_LP, 4)
    assert score(problem, result.slot_expert_LP).par == pytest.approx(float(par(load_LR, speed_R).mean()))
    assert score(alike, result.slot_expert_LP).par == pytest.approx(float(par(load_LR).mean()))
    assert check(problem, make_plan(problem, result, 0)) == []
    if result.certificate is not None:
        assert verify(problem, result.certificate) >= result.certificate.bound - 1e-9


def test_affinity_refuses_speeds_it_does_not_know() -> None:
    problem = with_ranks(problem_of(random_trace(2), 3, mode="coherent"), rank_speed=(1.0, 2.0, 2.0))
    with pytest.raises(UsageError, match="affinity takes all ranks for equally fast"):
        run_solver("affinity", problem)
