"""Tables: what a person reads is what the data says, aligned, and never wider than 110 columns."""

import io
import json
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from report_cases import evaluation, one
from rich.console import Console

from placer.core.errors import UsageError
from placer.core.modes import DISPATCH_MODES
from placer.report.compare import compare, comparison_tables
from placer.report.gain import gain
from placer.report.summary import plan_table
from placer.report.tables import MAX_WIDTH, DataTable, format_cell, render


def printed(table: DataTable, width: int = 200) -> list[str]:
    out = io.StringIO()
    render(table, Console(file=out, width=width, color_system=None, legacy_windows=False))
    return out.getvalue().splitlines()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        ("linear", "linear"),
        (0, "0"),
        (12345, "12,345"),
        (0.0, "0"),
        (1.0, "1.000"),
        (6.25, "6.250"),
        (-25.0, "-25.00"),
        (12345.678, "12,346"),
        (0.00012345, "0.000123"),
        (float("inf"), "inf"),
        (float("nan"), "nan"),
    ],
)
def test_format_cell(value: object, text: str) -> None:
    assert format_cell(value) == text


def test_plan_table() -> None:
    table = plan_table({"linear": evaluation(), "eplb": evaluation(0.9), "placer": evaluation(0.5)})
    assert table.columns == (
        "plan",
        "ranks touched",
        "nodes touched",
        "copies sent",
        "PAR pooled",
        "PAR window mean",
        "PAR window p99",
        "kept",
        "per_rank us",
    )
    assert [row[0] for row in table.rows] == ["linear", "eplb", "placer"]
    assert table.rows[2] == ("placer", 3.125, 1.5, 5.4321, 1.1, 1.4567, 2.0, 0.125, 6172.839)
    assert "1,000 tokens" in table.title


def test_plan_table_over_all_modes_fits_and_is_right_aligned() -> None:
    plans = {name: evaluation(scale, modes=DISPATCH_MODES) for name, scale in (("linear", 1.0), ("placer", 0.01))}
    lines = printed(plan_table(plans))
    assert max(len(line) for line in lines) <= MAX_WIDTH
    linear, placer = ([line for line in lines if line.strip().startswith(name)] for name in ("linear", "placer"))
    assert " ".join(linear).count("12,346") == " ".join(placer).count("123.5") == 5, "every time, unbroken"
    for one_line, other in zip(linear, placer, strict=True):
        ends = [[match.end() for match in re.finditer(r"\S+", line)][1:] for line in (one_line, other)]
        assert ends[0] == ends[1], "numbers end where their column ends"


def test_columns_that_do_not_fit_go_below() -> None:
    table = DataTable(title="t", columns=("a", *("wide" * 10 + str(i) for i in range(4))), rows=(("x", 1, 2, 3, 4),))
    text = "\n".join(printed(table))
    assert [word for word in text.split() if word.isdigit()] == ["1", "2", "3", "4"]
    assert text.count("x") == 2


def test_unknown_times_show_as_unknown() -> None:
    table = plan_table({"a": evaluation(modes=("per_rank", "coherent")), "b": evaluation(modes=("per_rank",))})
    assert table.rows[1][-1] is None


def test_plan_table_refuses_unlike_tokens_and_nothing() -> None:
    with pytest.raises(UsageError, match="different token counts"):
        plan_table({"a": evaluation(), "b": evaluation(tokens=7)})
    with pytest.raises(UsageError, match="no evaluations"):
        plan_table({})


def test_table_refuses_ragged_rows() -> None:
    with pytest.raises(UsageError, match="has 1 cells; there are 2 columns"):
        DataTable(title="t", columns=("a", "b"), rows=(("x",),))
    with pytest.raises(UsageError, match=r"table\.columns is empty"):
        DataTable(title="t", columns=(), rows=())


def test_markup_in_a_name_is_printed_as_it_is() -> None:
    table = DataTable(title="[bold]t", columns=("a", "b"), rows=(("[red]x[/red]", 1),), notes=("[note]",))
    text = "\n".join(printed(table))
    for literal in ("[bold]t", "[red]x[/red]", "[note]"):
        assert literal in text


@given(
    names=st.lists(st.text(st.characters(codec="ascii", categories=["L", "N"]), min_size=1, max_size=200), max_size=4),
    columns=st.integers(1, 14),
    width=st.sampled_from([80, 110, 300]),
)
def test_never_too_wide(names: list[str], columns: int, width: int) -> None:
    heads = tuple(f"column {index}" for index in range(columns))
    rows = tuple((name, *(1.5 * index for index in range(columns - 1))) for name in names)
    table = DataTable(title="t" * 150, columns=heads, rows=rows, notes=("n " * 150,))
    assert all(len(line) <= min(width, MAX_WIDTH) for line in printed(table, width))


def test_comparison_tables_fit() -> None:
    comparison = compare([one(3), one(4, source="measured", mode="coherent")], ["predicted " * 5, "measured"])
    for table in comparison_tables(comparison):
        assert all(len(line) <= MAX_WIDTH for line in printed(table))


def test_table_as_json() -> None:
    data = json.loads(json.dumps(plan_table({"linear": evaluation()}).to_dict()))
    assert data["rows"][0]["ranks touched"] == 6.25


def test_gain_states_its_mode() -> None:
    result = gain(evaluation(0.5), evaluation(), "per_rank")
    assert result.ratio == 0.5
    assert result.speedup == 2.0
    assert str(result) == "2.00x the speed of linear under per_rank (12345.7 -> 6172.8 us an iteration, predicted)"
    spread = gain(*(evaluation(modes=("allgather",)) for _ in range(2)), "allgather")
    assert "balance only" in str(spread)


def test_gain_refuses() -> None:
    with pytest.raises(UsageError, match="plan judged on 7 tokens, linear on 1000"):
        gain(evaluation(tokens=7), evaluation(), "per_rank")
    with pytest.raises(UsageError, match="linear has no time for mode 'coherent', only per_rank"):
        gain(evaluation(modes=("coherent",)), evaluation(), "coherent")
    with pytest.raises(UsageError, match=r"linear takes 0\.0 us"):
        gain(evaluation(), evaluation(0.0), "per_rank")
