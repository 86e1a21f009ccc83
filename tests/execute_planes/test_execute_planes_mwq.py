"""Matryoshka planes of one matrix: as good as GPTQ at every width, monotone, deterministic; kernels against numpy."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.device.ladder import LADDERS, BitLadder
from placer.execute.planes.gptq import damped, gptq, inverse_factor, output_error_K, round_to_nearest
from placer.execute.planes.kernels import compensated_codes, descend, kick, level_weights
from placer.execute.planes.mwq import matryoshka


def correlated_layer(seed, rows=48, columns=64, decay=0.4, tokens=512):
    """Weights (R, C) and inputs (T, C) whose neighbouring columns correlate."""
    rng = np.random.default_rng(seed)
    inputs = rng.standard_normal((tokens, columns))
    for c in range(1, columns):
        inputs[:, c] = decay * inputs[:, c - 1] + (1 - decay**2) ** 0.5 * inputs[:, c]
    return rng.standard_normal((rows, columns)), inputs


def prepared(seed, **fields):
    weight_RC, inputs = correlated_layer(seed, **fields)
    hessian_CC = damped(inputs.T @ inputs)
    return weight_RC, hessian_CC, inverse_factor(hessian_CC)


def ratio_to_gptq(weight_RC, hessian_CC, factor_CC, ladder):
    nested = output_error_K(weight_RC, matryoshka(weight_RC, hessian_CC, factor_CC, ladder).weight_KRC(), hessian_CC)
    alone = [
        output_error_K(weight_RC, gptq(weight_RC, factor_CC, bits, ladder.group_size).weight_KRC(), hessian_CC)[0]
        for bits in ladder.bits_K
    ]
    return nested / alone


@pytest.mark.parametrize("group", [128, 32])
@pytest.mark.parametrize("seed", [0, 1])
def test_nested_planes_are_within_a_twentieth_of_gptq(seed, group) -> None:
    ladder = BitLadder(bits_K=(2, 3, 4), group_size=group)
    assert ratio_to_gptq(*prepared(seed), ladder).max() <= 1.05


def test_eight_bits_are_close_to_gptq_where_inputs_do_not_correlate() -> None:
    assert ratio_to_gptq(*prepared(2, decay=0), LADDERS["v2"]).max() <= 1.06


@pytest.mark.parametrize("name", sorted(LADDERS))
def test_strong_correlation_costs_something_but_far_less_than_rounding_does(name) -> None:
    ladder, (weight_RC, hessian_CC, factor_CC) = LADDERS[name], prepared(5, decay=0.8)
    ratio_K = ratio_to_gptq(weight_RC, hessian_CC, factor_CC, ladder)
    assert ratio_K.max() <= 1.5
    for bits, ratio in zip(ladder.bits_K, ratio_K, strict=True):
        rounded = round_to_nearest(weight_RC, bits, 128).weight_KRC()
        alone = gptq(weight_RC, factor_CC, bits, 128).weight_KRC()
        errors = [output_error_K(weight_RC, found, hessian_CC)[0] for found in (rounded, alone)]
        assert ratio <= 0.75 * errors[0] / errors[1]


@given(seed=st.integers(0, 2**32 - 1), ladder=st.sampled_from(list(LADDERS.values())), columns=st.integers(1, 40))
@settings(max_examples=10, deadline=None)
def test_levels_get_better_and_are_the_same_again(seed, ladder, columns) -> None:
    weight_RC, hessian_CC, factor_CC = prepared(seed, rows=6, columns=columns, tokens=30)
    first, again = (matryoshka(weight_RC, hessian_CC, factor_CC, ladder) for _ in range(2))
    error_K = output_error_K(weight_RC, first.weight_KRC(), hessian_CC)
    assert (np.diff(error_K) <= 0).all()
    assert np.array_equal(first.code_RC, again.code_RC)
    assert np.array_equal(first.sign_RC, again.sign_RC)
    assert np.array_equal(first.scale_RGQ, again.scale_RGQ)
    assert np.array_equal(first.scale_RGQ, first.scale_RGQ.astype(np.float16))


def test_one_level_without_correlation_is_rounding() -> None:
    weight_RC, _ = correlated_layer(3)
    eye = np.eye(weight_RC.shape[1])
    alone, nearest = gptq(weight_RC, eye, 4, 64), round_to_nearest(weight_RC, 4, 64)
    code_RC, _ = compensated_codes(weight_RC, eye, nearest.scale_RGQ, np.ones(1), 15, 64)
    assert np.array_equal(code_RC, nearest.code_RC)
    errors = [output_error_K(weight_RC, codes.weight_KRC(), eye)[0] for codes in (alone, nearest)]
    assert errors[0] <= errors[1]


def test_gptq_by_hand() -> None:
    """Two columns, H = [[2, 1], [1, 2]]: the first column's error goes to the second by -H01 / H11."""
    hessian_CC = np.array([[2.0, 1.0], [1.0, 2.0]])
    scale_RGQ = np.array([[[0.0, 1.0]]])
    code_RC, _ = compensated_codes(np.array([[0.4, 0.4]]), inverse_factor(hessian_CC), scale_RGQ, np.ones(1), 3, 8)
    # 0.4 -> 0; the second is worth 0.4 + 0.4 / 2 = 0.6 -> 1
    assert code_RC.tolist() == [[0, 1]]


@given(seed=st.integers(0, 2**32 - 1), levels=st.integers(1, 3))
@settings(max_examples=15, deadline=None)
def test_searches_never_make_it_worse_and_keep_the_gradient(seed, levels) -> None:
    rng = np.random.default_rng(seed)
    weight_RC, hessian_CC, _ = prepared(seed, rows=3, columns=20)
    scale_RGQ = np.tile([-1.5, 1.0, *0.5 ** np.arange(2, levels + 1)], (3, 1, 1))
    importance_K = rng.random(levels) + 0.1
    code_RC = rng.integers(0, 4, (3, 20)).astype(np.uint8)
    sign_RC = rng.integers(0, 2 ** (levels - 1), (3, 20)).astype(np.uint8)
    near_CN = np.argsort(-np.abs(hessian_CC), axis=1)[:, 1:6]

    def total() -> float:
        found_KRC = level_weights(code_RC, sign_RC, scale_RGQ, 32)
        return float(importance_K @ output_error_K(weight_RC, found_KRC, hessian_CC))

    gradient_KRC = (weight_RC - level_weights(code_RC, sign_RC, scale_RGQ, 32)) @ hessian_CC
    before = total()
    descend(code_RC, sign_RC, gradient_KRC, hessian_CC, scale_RGQ, importance_K, 3, 32, 20)
    between = total()
    kick(code_RC, sign_RC, gradient_KRC, hessian_CC, scale_RGQ, importance_K, 3, 32, near_CN)
    assert total() <= between * (1 + 1e-12) <= before * (1 + 1e-12)
    expected = (weight_RC - level_weights(code_RC, sign_RC, scale_RGQ, 32)) @ hessian_CC
    np.testing.assert_allclose(gradient_KRC, expected, rtol=1e-8, atol=1e-8)
