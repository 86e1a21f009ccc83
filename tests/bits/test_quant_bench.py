"""QuantMoE-Bench's allocation: brute force, monotone in the weights, the outlier score and the average bits."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import UsageError
from solvers.bits.knapsack import Knapsack
from solvers.bits.knapsack_cpsat import search_knapsack
from solvers.bits.quant_bench import allocate_bits, average_bits, importance_LE, outlier_score

BITS_K = (2, 3, 4, 8)
LOSS_K = np.array([60.0, 25.0, 10.0, 0.0])
BYTES_K = (20, 30, 40, 80)


def least_loss(weight_LE: np.ndarray, most_bytes: int) -> float:
    weights = weight_LE.reshape(-1)
    return min(
        float(sum(weight * LOSS_K[at] for weight, at in zip(weights, choice, strict=True)))
        for choice in itertools.product(range(4), repeat=len(weights))
        if sum(BYTES_K[at] for at in choice) <= most_bytes
    )


@given(seed=st.integers(0, 2**32 - 1), most_bytes=st.integers(120, 480))
@settings(max_examples=30, deadline=None)
def test_bound_optimum_and_answer(seed: int, most_bytes: int) -> None:
    weight_LE = np.random.default_rng(seed).integers(0, 9, (2, 3)).astype(float)
    result = allocate_bits(weight_LE, LOSS_K, BYTES_K, most_bytes)
    optimum = least_loss(weight_LE, most_bytes)
    assert result.bound is not None
    assert result.objective is not None
    assert result.bound - 1e-9 <= optimum <= result.objective + 1e-9


@given(seed=st.integers(0, 2**32 - 1), most_bytes=st.integers(120, 480), more=st.integers(1, 20))
@settings(max_examples=30, deadline=None)
def test_a_more_frequent_expert_never_gets_fewer_bits(seed: int, most_bytes: int, more: int) -> None:
    rng = np.random.default_rng(seed)
    weight_C = rng.integers(0, 9, 6).astype(float)
    raised = int(rng.integers(6))
    choices = []
    for weights in (weight_C, weight_C + more * (np.arange(6) == raised)):
        problem = Knapsack(
            bytes_CO=np.tile(np.array(BYTES_K), (6, 1)), cost_CO=weights[:, None] * LOSS_K, most_bytes=most_bytes
        )
        state, choice_C, _ = search_knapsack(problem, None, 10.0, 0, 1)
        assert state == "optimal"
        assert choice_C is not None
        choices.append(choice_C[raised])
    assert choices[1] >= choices[0]


def test_cpsat_is_no_worse_than_greedy() -> None:
    weight_LE = np.random.default_rng(5).random((3, 4))
    exact = allocate_bits(weight_LE, LOSS_K, BYTES_K, 400, solver="cpsat")
    greedy = allocate_bits(weight_LE, LOSS_K, BYTES_K, 400)
    assert exact.objective is not None
    assert greedy.objective is not None
    assert exact.objective <= greedy.objective + 1e-9
    assert exact.stopped_by == "optimal"


def test_importance_has_its_four_reasons() -> None:
    uses_LE = np.array([[1.0, 3.0, 0.0], [2.0, 2.0, 0.0]])
    np.testing.assert_allclose(importance_LE(uses_LE), [[0.25, 0.75, 0], [0.5, 0.5, 0]])
    shared_LE = np.array([[False, False, True]] * 2)
    found = importance_LE(uses_LE, first_layers=1, first_factor=3.0, shared_LE=shared_LE, shared_factor=2.0)
    np.testing.assert_allclose(found, [[0.75, 2.25, 6.0], [0.5, 0.5, 2.0]])
    outlier_LE = np.array([[1.0, 1.0, 1.0], [1.0, 2.0, 6.0]])
    np.testing.assert_allclose(importance_LE(uses_LE, outlier_LE=outlier_LE)[1], [0.25, 0.5, 0])


def test_the_outlier_score_by_hand() -> None:
    """Columns: magnitudes 1, 1 (ratio 1), 1, 3 (ratio 1.5), zeros (left out)."""
    assert outlier_score(np.array([[1.0, -3.0, 0.0], [-1.0, 1.0, 0.0]])) == 1.5
    assert outlier_score(np.zeros((2, 2))) == 0.0


def test_average_bits() -> None:
    """Attention at 4 bits of 1 M parameters, experts at 2 of 8 M and one at 8 of 1 M: (4 + 16 + 8) / 10."""
    assert average_bits(np.array([4.0, 2.0, 8.0]), np.array([1e6, 8e6, 1e6])) == pytest.approx(2.8)


def test_refusals() -> None:
    with pytest.raises(UsageError, match="importance is 0 or more"):
        allocate_bits(np.array([[-1.0]]), LOSS_K, BYTES_K, 100)
    assert allocate_bits(np.ones((1, 2)), LOSS_K, BYTES_K, 39).status == "infeasible"
