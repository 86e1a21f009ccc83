"""Balance under drift: the risk against brute force, its special cases, and a hand example."""

import itertools
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import cluster, counts_problem, every_assignment

from placer.core.check import check
from placer.core.errors import UsageError
from placer.core.problem import PlacementProblem
from placer.pipeline import make_plan
from solvers.balance.load import mean_par, rank_load_LR
from solvers.balance.lpt import solve_lpt
from solvers.balance.risk import risk_LR, solve_risk
from traces.readers import read_any
from traces.summarize import summarize

TRACE = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "gptoss20b" / "mmlu.npz"


def windows_problem(load_WLE: np.ndarray, ranks: int, redundant: int = 0) -> PlacementProblem:
    problem = counts_problem(load_WLE.sum(axis=0), ranks, redundant)
    return replace(problem, profile=replace(problem.profile, load_WLE=load_WLE.astype(np.int64)))


def window_par(load_WLE: np.ndarray, slots_LP: np.ndarray, ranks: int) -> float:
    return float(np.mean([mean_par(rank_load_LR(load_LE, slots_LP, ranks)) for load_LE in load_WLE]))


def rank_risk(load_WE: np.ndarray, experts: list[int], z: float) -> float:
    """Of the rank's own summed load: nothing of covariances."""
    load_W = load_WE[:, experts].sum(axis=1)
    return float(load_W.mean() + z * load_W.std())


def test_experts_busy_in_different_windows_share_a_rank() -> None:
    # equal mean loads: LPT pairs experts 0 and 2, which are busy in the same window
    load_WLE = np.array([[[10, 0, 10, 0]], [[0, 10, 0, 10]]])
    problem = windows_problem(load_WLE, 2)
    lpt, risk = solve_lpt(problem), solve_risk(problem)
    assert lpt.objective == 1.0
    assert window_par(load_WLE, lpt.slot_expert_LP, 2) == 2.0
    assert window_par(load_WLE, risk.slot_expert_LP, 2) == 1.0
    assert (risk.objective, risk.bound, risk.stopped_by) == (1.0, 1.0, "optimal")


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([2, 3]), st.sampled_from([0.0, 1.0, 3.0]))
def test_no_swap_helps_and_brute_force_is_between_bound_and_answer(seed: int, ranks: int, z: float) -> None:
    rng = np.random.default_rng(seed)
    load_WLE = rng.integers(0, 60, size=(5, 1, 6))
    load_WE = load_WLE[:, 0]
    result = solve_risk(windows_problem(load_WLE, ranks), z=z)
    mean = load_WE.sum() / len(load_WE) / ranks
    groups = result.slot_expert_LP.reshape(ranks, -1).tolist()
    risk_R = [rank_risk(load_WE, group, z) for group in groups]
    np.testing.assert_allclose(risk_LR(load_WLE, result.slot_expert_LP, ranks, z)[0], risk_R)
    assert result.objective == pytest.approx(max(risk_R) / mean)
    best = min(
        max(rank_risk(load_WE, np.flatnonzero(rank_E == rank).tolist(), z) for rank in range(ranks))
        for rank_E in every_assignment(6, ranks)
    )
    assert result.bound <= best / mean + 1e-9 <= result.objective + 2e-9
    top = int(np.argmax(risk_R))
    for other in set(range(ranks)) - {top}:
        for mine, yours in itertools.product(groups[top], groups[other]):
            here = [expert for expert in groups[top] if expert != mine] + [yours]
            there = [expert for expert in groups[other] if expert != yours] + [mine]
            assert max(rank_risk(load_WE, here, z), rank_risk(load_WE, there, z)) >= max(risk_R) * (1 - 1e-9)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([0, 4, 12]))
def test_without_deviations_it_is_par_and_no_worse_than_lpt(seed: int, redundant: int) -> None:
    load_WLE = np.random.default_rng(seed).integers(0, 100, size=(3, 2, 8))
    load_WLE[:, :, 0] += 1
    problem = windows_problem(load_WLE, 4, redundant)
    lpt, risk = solve_lpt(problem), solve_risk(problem, z=0.0)
    assert risk.objective == pytest.approx(mean_par(rank_load_LR(problem.profile.load_LE, risk.slot_expert_LP, 4)))
    assert risk.objective <= lpt.objective * (1 + 1e-9)
    assert risk.bound == pytest.approx(lpt.bound)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([4, 8, 20]))
def test_with_replicas_the_plan_is_legal_and_the_risk_is_no_more_than_lpt_s(seed: int, redundant: int) -> None:
    load_WLE = np.random.default_rng(seed).lognormal(3, 1, size=(6, 2, 8)).astype(np.int64) + 1
    problem = windows_problem(load_WLE, 4, redundant)
    result = solve_risk(problem, z=1.0)
    assert check(problem, make_plan(problem, result, 0)) == []
    lpt = risk_LR(load_WLE, solve_lpt(problem).slot_expert_LP, 4, 1.0).max(axis=1)
    mean_L = load_WLE.sum(axis=(0, 2)) / 6 / 4
    assert result.bound <= result.objective <= (lpt / mean_L).mean() * (1 + 1e-9)
    again = solve_risk(problem, z=1.0)
    assert np.array_equal(again.slot_expert_LP, result.slot_expert_LP)


def test_layers_without_load_count_one_and_one_window_is_load_alone() -> None:
    load_WLE = np.zeros((1, 2, 4), dtype=np.int64)
    load_WLE[0, 1] = [4, 3, 2, 1]
    result = solve_risk(windows_problem(load_WLE, 2), z=2.0)
    assert result.objective == 1.0


@pytest.mark.parametrize("z", [-0.1, float("nan"), float("inf")])
def test_a_risk_that_is_none_is_refused(z: float) -> None:
    with pytest.raises(UsageError, match="z is"):
        solve_risk(windows_problem(np.ones((2, 1, 4)), 2), z=z)


@pytest.mark.data
@pytest.mark.skipif(not TRACE.exists(), reason="the developers' real traces are not here")
def test_windows_of_unseen_requests_are_better_balanced_than_by_mean_load() -> None:
    train, test = (summarize(half, window_tokens=2048) for half in read_any(TRACE).split_by_request(0.5, 0))
    problem = PlacementProblem(profile=train, cluster=cluster(8))
    lpt, risk = (solve(problem).slot_expert_LP for solve in (solve_lpt, solve_risk))
    assert window_par(test.load_WLE, risk, 8) < window_par(test.load_WLE, lpt, 8) - 0.05
