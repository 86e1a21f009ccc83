"""The scaling study: slopes of exact power laws, a small sweep, its table and picture."""

from pathlib import Path

import pytest
import scaling
from instances import shape_case
from methods import methods_of
from scaling import SHAPES, measure, slope, sweep, table_of
from scaling_plot import plot

from placer.core.errors import PlacerError, UsageError
from traces.summarize import summarize
from traces.synthetic import synthesize


@pytest.mark.parametrize("power", [0.0, 1.0, 2.5])
def test_the_slope_of_a_power_law_is_its_exponent(power: float) -> None:
    size = [4, 8, 16, 32]
    assert slope(size, [3.0 * x**power for x in size]) == pytest.approx(power, abs=1e-9)
    # a point that hit the limit is left out, and two points are no slope
    assert slope(size, [*(3.0 * x**power for x in size[:3]), None]) == pytest.approx(power, abs=1e-9)
    assert slope(size, [1.0, 2.0, None, None]) is None


def test_a_sweep_times_every_method_and_can_be_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "BASE", {"L": 1, "E": 8, "R": 4, "T": 300})
    monkeypatch.setattr(scaling, "SHORT_S", 0.0)
    found = sweep("T", (200, 300, 400), ["summarize", "lpt"], 1.0)
    assert list(found) == ["summarize", "lpt"]
    for row in found.values():
        assert row["size"] == [200, 300, 400]
        assert all(seconds >= 0 for seconds in row["seconds"])
    assert table_of({"T": found}).count("| T = 200, 300, 400 |") == 2
    pytest.importorskip("matplotlib", reason="pip install -e '.[bench]'")
    plot({"T": found}, tmp_path / "scaling.png")
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_a_point_that_fails_or_hits_the_limit_has_no_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    def measured(method: str, *_: object) -> tuple[float, str]:
        if method == "eplb":
            raise UsageError("no")
        return 1.0, "time_limit" if method == "lpt" else "effort"

    monkeypatch.setattr(scaling, "measure", measured)
    found = sweep("L", (1, 2, 3), ["eplb", "lpt", "summarize"], 1.0)
    assert [row["seconds"] for row in found.values()] == [[None] * 3, [None] * 3, [1.0] * 3]
    assert found["eplb"]["end"] == ["error: no"] * 3


def test_methods_of_the_study_run_on_their_objective() -> None:
    trace = synthesize(num_layers=2, num_experts=8, top_k=2, num_tokens=300, num_requests=8, seed=0)
    profile = summarize(trace, threads=1)
    for name in scaling.METHODS:
        if name == "summarize" or name in scaling.SOLVERS:
            seconds, end = measure(name, trace, profile, 4, 1.0)
            assert seconds >= 0
            assert end in ("effort", "optimal", "gap", "time_limit")
    with pytest.raises((PlacerError, KeyError)):
        measure("no such solver", trace, profile, 4, 1.0)


def test_every_large_shape_divides_over_its_ranks_and_meets_auto() -> None:
    for layers, experts, cluster, spare in SHAPES:
        case = shape_case(layers, experts, cluster, redundant=spare, limit_s=60)
        assert set(scaling.SHAPE_METHODS) <= set(methods_of(case))
        ranks = 1
        for part in cluster.split("x"):
            ranks *= int(part)
        assert (experts + spare) % ranks == 0
