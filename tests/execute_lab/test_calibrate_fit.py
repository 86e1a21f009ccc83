"""The calibration's fits on times that are known: exact ones, noisy ones, and ones that are no fit."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import ExecutionError
from placer.execute.calibrate.fit import fit_experts, fit_link, fit_tail

SIZES = np.array([2.0**power for power in range(10, 24)])


def link_times(alpha_ns, gbytes_per_s, burst=0.0, sizes=SIZES):
    return alpha_ns + np.maximum(0, sizes - burst) / gbytes_per_s


@given(st.floats(1e2, 1e6), st.floats(0.01, 50), st.sampled_from([0.0, 3e3, 5e4, 1e6]))
@settings(max_examples=40, deadline=None)
def test_exact_times_are_recovered(alpha_ns, gbytes_per_s, burst):
    fit = fit_link("x", SIZES, link_times(alpha_ns, gbytes_per_s, burst)[None, None])
    assert fit.gbytes_per_s == pytest.approx(gbytes_per_s, rel=1e-6)
    assert fit.alpha_ns == pytest.approx(alpha_ns, rel=1e-3)
    assert fit.burst_bytes == pytest.approx(burst, rel=1e-3)
    assert fit.quality.r2 == pytest.approx(1.0)
    assert fit.quality.max_residual < 1e-6
    assert fit.quality.spread == 0


def test_behind_a_token_bucket_the_plain_line_is_wrong_and_ours_is_not():
    """As measured once: 24 MB/s behind 64 KB, sizes of which half fit in the bucket."""
    sizes = np.array([1e3, 2e3, 4e3, 8e3, 16e3, 32e3, 64e3, 96e3, 128e3, 256e3])
    times = link_times(80e3, 0.024, 64e3, sizes)
    ratio = np.stack([np.ones_like(sizes), sizes], axis=1) / times[:, None]
    naive = 1 / np.linalg.lstsq(ratio, np.ones(len(sizes)), rcond=None)[0][1]
    assert naive > 1.7 * 0.024
    fit = fit_link("x", sizes, times[None, None])
    assert fit.gbytes_per_s == pytest.approx(0.024, rel=0.05)
    assert fit.burst_bytes == pytest.approx(64e3, rel=0.05)


@given(st.integers(0, 2**32 - 1), st.sampled_from([0.0, 64e3]))
@settings(max_examples=25, deadline=None)
def test_noise_moves_the_bandwidth_by_no_more_than_itself(seed, burst):
    rng = np.random.default_rng(seed)
    noise_JIN = np.exp(rng.normal(0, 0.05, (3, 9, len(SIZES))))
    # now and then something else has the machine
    noise_JIN[rng.random(noise_JIN.shape) < 0.05] *= 3
    fit = fit_link("x", SIZES, link_times(80e3, 0.1, burst) * noise_JIN)
    assert fit.gbytes_per_s == pytest.approx(0.1, rel=0.08)
    assert fit.quality.spread > 0


def test_a_line_is_not_taken_for_a_bucket():
    rng = np.random.default_rng(0)
    found = [fit_link("x", SIZES, link_times(4e5, 3.0) * rng.uniform(0.9, 1.1, (1, 1, len(SIZES)))) for _ in range(20)]
    assert [fit.burst_bytes for fit in found] == [0.0] * 20


def test_a_negative_fixed_cost_becomes_none():
    fit = fit_link("x", SIZES, (SIZES / 0.02 + 1e4 - 5e-4 * SIZES**1.01)[None, None])
    assert fit.alpha_ns >= 0


@pytest.mark.parametrize(
    ("times", "said"),
    [
        (np.full(len(SIZES), 1e6), "times do not grow|R2"),
        (1e9 - SIZES, "times do not grow with sizes"),
        (np.where(np.arange(len(SIZES)) % 2, 1.0, 5.0) * SIZES, r"R2 0\.\d+ \(at least 0.95\), largest residual \d+ %"),
        (SIZES**2, "R2"),
    ],
    ids=["flat", "falling", "zigzag", "square"],
)
def test_what_is_no_line_is_refused_with_its_numbers(times, said):
    with pytest.raises(ExecutionError, match=rf"^calibration of link class inter refused: .*({said})") as info:
        fit_link("link class inter", SIZES, times[None, None])
    assert "\n" not in str(info.value)


ROWS = np.tile([8.0, 16, 32, 64, 128, 256], 2)
EXPERTS = np.repeat([1.0, 8], 6)


@given(st.floats(1e3, 1e6), st.floats(1e3, 1e6), st.floats(0.1, 100), st.sampled_from(["sum", "max"]))
@settings(max_examples=40, deadline=None)
def test_exact_expert_times_are_recovered(launch, row, corner, form):
    """`corner`: at how many rows computing takes as long as reading; beyond those measured, max has no curve to see."""
    read = row * np.clip(corner, 20, 100) if form == "max" else row * corner
    join = np.maximum if form == "max" else np.add
    times = launch + EXPERTS * join(read, ROWS * row)
    fit = fit_experts("x", EXPERTS, ROWS, times[None, None])
    assert fit.form == form
    assert fit.row_ns == pytest.approx(row, rel=1e-4)
    assert fit.read_ns == pytest.approx(read, rel=1e-3)
    assert fit.launch_ns == pytest.approx(launch, rel=1e-2, abs=1e-3 * row)
    assert fit.quality.max_residual < 1e-5


@pytest.mark.parametrize("times", [1e6 - EXPERTS * ROWS, EXPERTS * ROWS**3], ids=["falling", "cubic"])
def test_expert_times_of_another_form_are_refused(times):
    with pytest.raises(ExecutionError, match=r"^calibration of experts refused: .* ns a row"):
        fit_experts("experts", EXPERTS, ROWS, times[None, None])


@given(st.floats(1, 15))
@settings(max_examples=20, deadline=None)
def test_a_tail_is_recovered(tail):
    def predict(value):
        return np.maximum(1e5, 2e4 + SIZES * value)

    found, residual = fit_tail(predict, predict(tail))
    assert found == pytest.approx(tail, rel=1e-3)
    assert residual < 2e-3


def test_times_below_the_closed_form_have_no_tail():
    assert fit_tail(lambda tail: SIZES * tail, SIZES * 0.9)[0] == 1.0
