import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import UsageError
from placer.report.gates import GateRow, gate_tables, judge_gates, kendall_tau


def row(name: str, measured: float, predicted: float, base: tuple[float, float], spread: float = 0.01) -> GateRow:
    ratio = base[0] / measured
    return GateRow(
        group="2x2",
        name=name,
        placement=name,
        mode="per_rank",
        homes="dealt",
        measured_us=measured,
        measured_low_us=measured * (1 - spread),
        measured_high_us=measured * (1 + spread),
        predicted_us=predicted,
        ratio=ratio,
        ratio_low=ratio * (1 - spread),
        ratio_high=ratio * (1 + spread),
        predicted_ratio=base[1] / predicted,
    )


def test_good_predictions_pass_every_gate() -> None:
    base = (100.0, 104.0)
    rows = [row("linear", 100, 104, base), row("a", 80, 81, base), row("b", 50, 52, base), row("same", 99, 103, base)]
    verdict = judge_gates(rows, noise=0.05)
    assert all(verdict.passed.values())
    assert verdict.median_error == pytest.approx(0.04, abs=0.001)
    assert verdict.tau == 1.0
    # 99 against 100 is under the noise floor and is no gain
    assert verdict.resolved == 2


def test_a_gain_predicted_with_the_wrong_sign_is_named() -> None:
    base = (100.0, 100.0)
    verdict = judge_gates([row("linear", 100, 100, base), row("a", 80, 105, base)], noise=0.05)
    assert verdict.wrong_signs == ("2x2: a",)
    assert not verdict.passed["sign of every resolved gain"]
    assert verdict.tau == -1.0
    assert "FAIL" in str(gate_tables([row("a", 80, 105, base)], verdict)[0].rows)


def test_a_gain_that_changes_sign_between_launches_is_not_resolved() -> None:
    assert not row("a", 90, 90, (100.0, 100.0), spread=0.2).is_resolved(0.05)
    assert row("a", 90, 90, (100.0, 100.0), spread=0.02).is_resolved(0.05)


def test_large_errors_fail_their_gates() -> None:
    rows = [row(str(i), 100.0 + i, (100.0 + i) * (1.4 if i < 3 else 1.12), (100.0, 112.0)) for i in range(10)]
    passed = judge_gates(rows, noise=0.02).passed
    assert not passed["median error"]
    assert not passed["p90 error"]


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=2, max_size=8))
def test_tau_counts_pairs(pairs: list[tuple[int, int]]) -> None:
    first, second = zip(*pairs, strict=True)
    agree = ties_first = ties_second = 0
    total = 0
    for i in range(len(pairs)):
        for j in range(i + 1, len(pairs)):
            a, b = np.sign(first[i] - first[j]), np.sign(second[i] - second[j])
            agree += int(a * b)
            ties_first += a == 0
            ties_second += b == 0
            total += 1
    weight = np.sqrt(float((total - ties_first) * (total - ties_second)))
    tau = kendall_tau(first, second)
    assert (np.isnan(tau) and weight == 0) or tau == pytest.approx(agree / weight)


def test_pairs_that_the_noise_covers_are_not_ranked() -> None:
    measured, predicted = [100.0, 101.0, 150.0, 200.0], [101.0, 100.0, 155.0, 190.0]
    assert kendall_tau(measured, predicted) == pytest.approx(4 / 6)
    assert kendall_tau(measured, predicted, noise=0.05) == 1.0
    assert kendall_tau(measured, [101.0, 100.0, 195.0, 190.0], noise=0.05) == pytest.approx(3 / 5)
    assert np.isnan(kendall_tau(measured[:2], predicted[:2], noise=0.05))


def test_no_rows_is_refused() -> None:
    with pytest.raises(UsageError, match="no rows"):
        judge_gates([], 0.05)
