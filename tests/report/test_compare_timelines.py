"""Comparisons by hand: one iteration of `one()` takes 6 us, stretched by s it takes 6 s us."""

import json

import pytest
from report_cases import iteration_rows, one, timeline

from placer.core.errors import UsageError
from placer.core.timeline import Timeline
from placer.report.compare import compare, comparison_tables


def test_totals_phases_and_ratios() -> None:
    result = compare([one(), one(3)], ["base", "slow"])
    base, slow = result.timelines
    assert (base.mean_us, slow.mean_us) == (6.0, 18.0)
    assert (base.ratio, slow.ratio) == (1.0, 3.0)
    assert base.phase_us == {"dispatch": 1.0, "experts": 4.0, "combine": 5.0}
    assert slow.phase_ratio == {"dispatch": 3.0, "experts": 3.0, "combine": 3.0}
    assert result.errors == ()
    assert result.warnings == ()


def test_spread_over_iterations() -> None:
    rows = []
    start = 0
    for iteration, stretch in enumerate((1, 2, 3)):
        rows += iteration_rows(iteration, start, stretch)
        start += 6000 * stretch
    (summary,) = compare([timeline(rows)], ["x"]).timelines
    assert summary.iterations == 3
    assert summary.mean_us == summary.p50_us == pytest.approx(12.0)
    assert summary.p10_us == pytest.approx(7.2)
    assert summary.p90_us == pytest.approx(16.8)


def test_error_of_a_prediction() -> None:
    result = compare([one(3), one(4, source="measured")], ["predicted", "measured"])
    (error,) = result.errors
    assert (error.predicted, error.measured) == ("predicted", "measured")
    assert error.total == pytest.approx(-0.25)
    assert error.phases == pytest.approx({"dispatch": -0.25, "experts": -0.25, "combine": -0.25})
    assert result.warnings == ()


def test_predictions_meet_only_measurements_of_the_same() -> None:
    other = {"plan_sha256": "c" * 64}
    predictions = [one(1), one(2, **other)]
    measurements = [one(2, source="measured"), one(2, source="measured", **other)]
    result = compare([*predictions, *measurements], ["p1", "p2", "m1", "m2"])
    assert [(e.predicted, e.measured, e.total) for e in result.errors] == [("p1", "m1", -0.5), ("p2", "m2", 0.0)]
    assert len(result.warnings) == 1
    assert result.warnings[0].startswith("different plans (p1: aaaaaaaaaaaa, p2: cccccccccccc")


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("mode", "coherent", "different dispatch modes (x: per_rank, y: coherent)"),
        ("plan_sha256", "d" * 64, "different plans"),
        ("tokens_per_iteration", 4, "different token counts (x: 2, y: 4)"),
        ("num_ranks", 4, "different numbers of ranks"),
        ("ranks_per_node", 2, "different ranks per node"),
        ("cluster", "other", "different clusters"),
        ("model", "other", "different models"),
        ("trace_sha256", "e" * 64, "different traces"),
    ],
)
def test_warns_of_unlike_things(field: str, value: object, words: str) -> None:
    (warning,) = compare([one(), one(**{field: value})], ["x", "y"]).warnings
    assert words in warning


def test_warns_of_iterations_and_of_unpaired_measurements() -> None:
    twice = timeline(iteration_rows(0, 0) + iteration_rows(1, 6000))
    assert any(
        "different numbers of iterations (x: 1, y: 2)" in w for w in compare([one(), twice], ["x", "y"]).warnings
    )
    result = compare([one(), one(source="measured", mode="coherent")], ["x", "y"])
    assert result.errors == ()
    assert any("no prediction belongs to a measurement" in w for w in result.warnings)


def test_a_field_that_one_lacks_is_no_difference() -> None:
    bare = one(2, source="measured")
    for field in ("trace_sha256", "cluster", "model"):
        del bare.about[field]
    result = compare([one(), bare], ["x", "y"])
    assert result.warnings == ()
    assert len(result.errors) == 1


def test_phases_that_only_one_has() -> None:
    rows = [*iteration_rows(0, 0), (0, -1, "gather", 0, 6000, 500, 10, 10, 1)]
    result = compare([one(), timeline(rows)], ["x", "y"])
    assert result.timelines[1].phase_ratio["gather"] is None
    phases = comparison_tables(result)[1]
    assert phases.columns[-2:] == ("gather us", "ratio")
    assert [row[-2:] for row in phases.rows] == [(None, None), (0.5, None)]


def test_json_form() -> None:
    result = compare([one(3), one(4, source="measured")], ["p", "m"])
    data = json.loads(json.dumps(result.to_dict()))
    assert set(data) == {"timelines", "errors", "warnings"}
    assert data["timelines"][1]["mean_us"] == 24.0
    assert data["errors"][0]["total"] == pytest.approx(-0.25)


def test_tables_hold_the_same_numbers() -> None:
    totals, _, errors = comparison_tables(compare([one(3), one(4, source="measured")], ["p", "m"]))
    assert [row[:6] for row in totals.rows] == [
        ("p", "simulated", "per_rank", 1, 18.0, 1.0),
        ("m", "measured", "per_rank", 1, 24.0, pytest.approx(4 / 3)),
    ]
    assert errors.columns == ("predicted", "measured", "total %", "dispatch %", "experts %", "combine %")
    assert errors.rows[0][2:] == (pytest.approx(-25), pytest.approx(-25), pytest.approx(-25), pytest.approx(-25))


@pytest.mark.parametrize(
    ("timelines", "names", "words"),
    [
        ([], [], "no timelines"),
        ([one()], [], "one distinct name for each"),
        ([one(), one()], ["x", "x"], "one distinct name for each"),
        ([timeline([])], ["x"], "timeline 'x' lasts 0 ns"),
        ([timeline([(0, 0, "experts", 0, 0, 0, 0, 0, 0)])], ["x"], "timeline 'x' lasts 0 ns"),
    ],
)
def test_refuses(timelines: list, names: list[str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        compare(timelines, names)


def test_a_device_shows_disk_and_copy_engine_beside_the_processor() -> None:
    def device(stretch: int, **about: object) -> Timeline:
        rows = [
            (0, 0, "attention", 0, 0, 1000, 0, 0, 4),
            (0, 0, "load", 0, 1000, 2000 * stretch, 0, 2000, 0),
            (0, 0, "copy", 0, 1000 + 2000 * stretch, 500, 0, 2000, 0),
            (0, 0, "experts", 0, 1500 + 2000 * stretch, 1500, 0, 0, 3),
        ]
        return timeline(rows, mode="device", num_ranks=1, **about)

    result = compare([device(1), device(2, source="measured")], ["simulated", "measured"])
    assert result.warnings == ()
    (error,) = result.errors
    assert error.total == pytest.approx(5 / 7 - 1)
    assert error.phases == pytest.approx({"attention": 0, "experts": 0, "load": -0.5, "copy": 0})
    _, phases, _ = comparison_tables(result)
    assert phases.columns[1::2] == ("attention us", "experts us", "load us", "copy us")
    assert any("load and copy" in note for note in phases.notes)
    assert len(comparison_tables(compare([one()], ["x"]))[1].notes) == 1
    (warning,) = compare([device(1, device="a"), device(1, device="b")], ["x", "y"]).warnings
    assert "different devices (x: a, y: b)" in warning
