"""Tables as plain data, printed with rich where a person reads them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from placer.core.errors import UsageError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["MAX_WIDTH", "Cell", "DataTable", "format_cell", "render"]

MAX_WIDTH = 110
"""Columns of a terminal that a table never exceeds."""

GUTTER = 3
"""Columns of the terminal between two columns of a table."""

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
    """Prints the table to `console`: numbers right-aligned, no line wider than 110 columns or than the console.

    Columns that do not fit side by side go below, in further blocks that repeat the first column; no number is broken.
    """
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    width = min(console.width, MAX_WIDTH)
    text = [[format_cell(cell) for cell in row] for row in table.rows]
    numeric = [_is_numeric([row[index] for row in table.rows]) for index in range(len(table.columns))]
    console.print(Text(table.title, style="bold"), width=width)
    for number, block in enumerate(_blocks(table.columns, text, width)):
        if number:
            console.print()
        grid = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False)
        for index, column_width in block.items():
            justify: Literal["left", "right"] = "right" if numeric[index] else "left"
            grid.add_column(Text(table.columns[index]), justify=justify, overflow="fold", width=column_width)
        for row in text:
            grid.add_row(*(Text(row[index]) for index in block))
        console.print(grid, width=width)
    for note in table.notes:
        console.print(Text(note), width=width)


def _blocks(columns: tuple[str, ...], text: list[list[str]], width: int) -> list[dict[int, int]]:
    """Column index to printed width, for each block; every block begins with column 0.

    Heads stand on one line where the block has room for that, else they break between words.
    """
    broken, whole = [], []
    for index, name in enumerate(columns):
        cells = [len(row[index]) for row in text]
        broken.append(max([*cells, *(len(word) for word in name.split())], default=1))
        whole.append(max([*cells, len(name)]))
    broken[0] = whole[0] = min(broken[0], width // 3)
    blocks = [[0]]
    for index in range(1, len(columns)):
        if len(blocks[-1]) > 1 and _total(broken, [*blocks[-1], index]) > width:
            blocks.append([0])
        blocks[-1].append(index)
    widths = [whole if _total(whole, block) <= width else broken for block in blocks]
    return [{index: needs[index] for index in block} for needs, block in zip(widths, blocks, strict=True)]


def _total(widths: list[int], block: list[int]) -> int:
    return sum(widths[index] + GUTTER for index in block) - GUTTER


def _is_numeric(cells: Sequence[Cell]) -> bool:
    return any(isinstance(cell, int | float) for cell in cells) and not any(isinstance(cell, str) for cell in cells)
