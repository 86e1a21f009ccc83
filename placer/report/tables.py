"""Tables as plain data, printed with rich where a person reads them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from placer.core.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["MAX_WIDTH", "Cell", "DataTable", "format_cell", "render"]

MAX_WIDTH = 110
"""Columns of a terminal that a table never exceeds."""

Cell = str | int | float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DataTable:
    """Rows of plain values under named columns; `notes` are lines that belong below the table."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.columns:
            raise UsageError("table.columns is empty; name at least one column")
        for row in self.rows:
            if len(row) != len(self.columns):
                raise UsageError(f"table row {row!r} has {len(row)} cells; there are {len(self.columns)} columns")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types: a list of {column: value}; numbers as they are, not as printed."""
        rows = [dict(zip(self.columns, row, strict=True)) for row in self.rows]
        return {"title": self.title, "rows": rows, "notes": list(self.notes)}


def format_cell(value: Cell) -> str:
    """The text of one cell: four significant digits, thousands in groups, `-` for None (unknown)."""
    if value is None:
        return "-"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    decimals = min(6, max(0, 3 - math.floor(math.log10(abs(value)))))
    return f"{value:,.{decimals}f}"


def render(table: DataTable, console: "Console") -> None:
    """Prints the table to `console`: numbers right-aligned, no line wider than 110 columns or than the console."""
    from rich.table import Table
    from rich.text import Text

    width = min(console.width, MAX_WIDTH)
    grid = Table(title=Text(table.title), title_justify="left", width=None, pad_edge=False)
    for index, name in enumerate(table.columns):
        numeric = _is_numeric([row[index] for row in table.rows])
        grid.add_column(Text(name), justify="right" if numeric else "left", overflow="fold")
    for row in table.rows:
        grid.add_row(*(Text(format_cell(cell)) for cell in row))
    console.print(grid, width=width)
    for note in table.notes:
        console.print(Text(note), width=width)


def _is_numeric(cells: Sequence[Cell]) -> bool:
    return any(isinstance(cell, int | float) for cell in cells) and not any(isinstance(cell, str) for cell in cells)
