"""Sem-MoE's objective by hand, its program against brute force and the alternating heuristic, and the solver."""

import itertools

import numpy as np
import pytest
from exact_problems import make_cluster, make_problem, random_trace, rank_LE
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.check import check
from placer.core.errors import UsageError
from placer.pipeline import make_plan
from solvers.papers.sem_moe import co_cluster, score, solve_sem_moe
from solvers.papers.sem_moe_exact import co_cluster_exact, search_clusters


def hand_example() -> tuple[np.ndarray, np.ndarray]:
    """Four requests of 8 tokens; 0 and 2 use experts 0 and 2 seven times of eight, 1 and 3 experts 1 and 3."""
    even, odd = [7, 1, 7, 1], [1, 7, 1, 7]
    return np.array([[even, odd, even, odd]]) / 16, np.full(4, 8)


def random_case(seed: int, requests: int, experts: int, layers: int = 1) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    counts = rng.integers(0, 10, size=(layers, requests, experts)) * (rng.random((layers, requests, experts)) < 0.5)
    return counts / np.maximum(1, counts.sum(axis=2, keepdims=True)), rng.integers(1, 30, size=requests)


def best_by_brute_force(confidence_LJE: np.ndarray, frequency_J: np.ndarray, clusters: int, theta: float) -> float:
    layers, requests, experts = confidence_LJE.shape
    rows = [
        r for r in itertools.product(range(clusters), repeat=experts) if len(set(map(r.count, range(clusters)))) == 1
    ]
    return min(
        score(np.array(of), np.array(rows_L), confidence_LJE, frequency_J, clusters, theta).objective
        for of in itertools.product(range(clusters), repeat=requests)
        for rows_L in itertools.product(rows, repeat=layers)
    )


def test_the_printed_objective_by_hand() -> None:
    confidence, frequency = hand_example()
    contiguous = score(np.array([0, 0, 1, 1]), np.array([[0, 0, 1, 1]]), confidence, frequency, 2)
    assert (contiguous.imbalance, contiguous.remote, contiguous.objective) == (0.0, 16.0, 8.0)
    together = score(np.array([0, 1, 0, 1]), np.array([[0, 1, 0, 1]]), confidence, frequency, 2)
    assert (together.imbalance, together.remote, together.objective) == (0.0, 4.0, 2.0)
    lopsided = score(np.array([0, 0, 0, 1]), np.array([[0, 1, 0, 1]]), confidence, frequency, 2, theta=0.25)
    assert (lopsided.imbalance, lopsided.remote) == (16.0, 1 + 7 + 1 + 1)
    assert lopsided.objective == 0.25 * 16 + 0.75 * 10
    twice = score(np.array([0, 0, 1, 1]), np.array([[0, 0, 1, 1], [0, 1, 0, 1]]), confidence.repeat(2, 0), frequency, 2)
    assert twice.remote == (16 + 16) / 2
    with pytest.raises(UsageError, match=r"hold \[3, 1\] experts"):
        score(np.array([0, 0, 1, 1]), np.array([[0, 0, 0, 1]]), confidence, frequency, 2)


def test_both_methods_find_the_hand_example_s_clusters() -> None:
    confidence, frequency = hand_example()
    assert co_cluster(confidence, frequency, 2).objective == 2.0
    exact = co_cluster_exact(confidence, frequency, 2, time_limit_s=30)
    assert (exact.clusters.objective, exact.proven) == (2.0, True)
    assert exact.bound == pytest.approx(2.0, abs=1e-4)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(4, 4, 1), (3, 4, 2)]), st.sampled_from([0.0, 0.3, 0.5, 1.0]))
def test_the_program_is_brute_force_s(seed: int, shape: tuple[int, int, int], theta: float) -> None:
    requests, experts, layers = shape
    confidence, frequency = random_case(seed, requests, experts, layers)
    exact = search_clusters(confidence, frequency, 2, theta, 30.0, 0)
    best = best_by_brute_force(confidence, frequency, 2, theta)
    assert exact.proven
    assert exact.clusters.objective == pytest.approx(best, abs=1e-4)
    assert exact.bound <= best + 1e-9
    assert exact.bound == pytest.approx(best, abs=1e-3)


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(12, 8, 2), (8, 6, 3)]), st.sampled_from([0.3, 0.5]))
def test_the_program_is_no_worse_than_the_heuristic(seed: int, shape: tuple[int, int, int], theta: float) -> None:
    requests, experts, clusters = shape
    confidence, frequency = random_case(seed, requests, experts)
    heuristic = co_cluster(confidence, frequency, clusters, theta=theta, seed=seed)
    exact = search_clusters(confidence, frequency, clusters, theta, 20.0, 0)
    assert exact.bound <= heuristic.objective + 1e-9
    assert exact.proven
    assert exact.clusters.objective <= heuristic.objective + 1e-4


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 3), st.sampled_from([(20, 16, 4), (5, 8, 8), (30, 12, 2)]))
def test_the_heuristic_is_no_worse_than_vanilla_and_its_clusters_are_equal(
    seed: int, layers: int, shape: tuple[int, int, int]
) -> None:
    requests, experts, clusters = shape
    confidence, frequency = random_case(seed, requests, experts, layers)
    found = co_cluster(confidence, frequency, clusters, seed=1)
    judged = score(found.cluster_J, found.cluster_LE, confidence, frequency, clusters)
    assert (found.imbalance, found.remote, found.objective) == (judged.imbalance, judged.remote, judged.objective)
    for row in found.cluster_LE:
        assert np.bincount(row, minlength=clusters).tolist() == [experts // clusters] * clusters
    contiguous_LE = np.tile(np.arange(experts) * clusters // experts, (layers, 1))
    dealt_LE = np.tile(np.arange(experts) % clusters, (layers, 1))
    for of_J, of_LE in (
        (np.arange(requests) * clusters // requests, contiguous_LE),
        (np.arange(requests) % clusters, dealt_LE),
    ):
        assert found.objective <= score(of_J, of_LE, confidence, frequency, clusters).objective
    again = co_cluster(confidence, frequency, clusters, seed=1)
    assert np.array_equal(again.cluster_LE, found.cluster_LE)


def test_planted_clusters_are_found() -> None:
    rng = np.random.default_rng(0)
    kind_J = np.arange(24) % 4
    group_LE = np.stack([rng.permutation(np.arange(16) % 4) for _ in range(3)])
    confidence = np.where(kind_J[None, :, None] == group_LE[:, None, :], 0.85 / 4, 0.15 / 12)
    found = co_cluster(confidence, np.full(24, 10), 4)
    assert found.imbalance == 0.0
    assert found.remote == pytest.approx(0.15 * 240)


def test_the_solver_places_experts_by_folds() -> None:
    problem = make_problem(random_trace(3, 200, 2, 8, 5), num_experts=8, cluster=make_cluster(4))
    result = solve_sem_moe(problem, seed=3)
    assert (result.status, result.objective_name) == ("solved", "remote_share")
    found_LE = rank_LE(result.slot_expert_LP, 8, 4)
    assert check(problem, make_plan(problem, result, 3)) == []
    # one fold: it lives on one rank, and only that rank's experts are not remote
    load_LE = problem.profile.load_LE
    share_R = [1 - load_LE[found_LE == rank].sum() / load_LE.sum() for rank in range(4)]
    assert np.isclose(share_R, result.objective).any()
    assert result.objective <= 0.75  # dealt anyhow, a quarter of the experts is at home
    assert result.bound <= result.objective
    best = sum(np.sort(row)[-2:].sum() for row in load_LE)
    assert result.bound == pytest.approx(1 - best / load_LE.sum())


def test_what_makes_no_sense_is_refused() -> None:
    confidence, frequency = hand_example()
    with pytest.raises(UsageError, match="do not divide"):
        co_cluster(confidence, frequency, 3)
    with pytest.raises(UsageError, match="do not divide"):
        search_clusters(confidence, frequency, 3, 0.5, 1.0, 0)
    with pytest.raises(UsageError, match=r"theta is 1\.5"):
        co_cluster(confidence, frequency, 2, theta=1.5)
    with pytest.raises(UsageError, match=r"frequency_J is \(3,\)"):
        co_cluster(confidence, frequency[:3], 2)
    with pytest.raises(UsageError, match="whole tokens"):
        search_clusters(confidence, frequency / 2, 2, 0.5, 1.0, 0)
    problem = make_problem(random_trace(1, 20, 1, 4, 0), num_experts=4, cluster=make_cluster(2), redundant=2)
    with pytest.raises(UsageError, match="redundant is 2"):
        solve_sem_moe(problem)
