"""Spans as they are found, with the plane that each is about, and the Timeline that they make.

Legend: X spans.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.timeline import PHASES, Timeline

__all__ = ["ATTENTION", "COLUMNS", "COPY", "EXPERTS", "LOAD", "Rows"]

IntArray = npt.NDArray[np.int64]

ATTENTION, EXPERTS, LOAD, COPY = (PHASES.index(name) for name in ("attention", "experts", "load", "copy"))
COLUMNS = ("iteration", "site", "phase", "start_ns", "end_ns", "bytes", "tokens", "expert", "plane")


class Rows:
    """A table of spans, one line each; expert and plane are -1 where a span is about neither."""

    def __init__(self) -> None:
        self._blocks: list[IntArray] = []
        self._lines: list[tuple[int, ...]] = []

    def add(self, *line: int) -> None:
        """One span, in the order of COLUMNS."""
        self._lines.append(line)

    def add_many(self, *columns: int | IntArray) -> None:
        """Spans by columns, in the order of COLUMNS; a number stands for a column of it, one column is an array."""
        longest = max(column.size for column in columns if isinstance(column, np.ndarray))
        block = np.empty((longest, len(COLUMNS)), dtype=np.int64)
        for index, column in enumerate(columns):
            block[:, index] = column
        self._blocks.append(block)

    def table(self) -> IntArray:
        """All spans (X, columns) by iteration, start and phase."""
        lines = np.array(self._lines, dtype=np.int64).reshape(-1, len(COLUMNS))
        table = np.concatenate([lines, *self._blocks])
        # by end too: a span of no time comes before the one that begins then
        return table[np.lexsort([table[:, 4], table[:, 2], table[:, 3], table[:, 0]])]

    def timeline(self, about: dict[str, Any]) -> Timeline:
        """The Timeline of one rank; read and copied bytes are received."""
        iteration_X, site_X, phase_X, start_X, end_X, bytes_X, tokens_X, _, _ = self.table().T
        return Timeline(
            about=about,
            iteration=iteration_X.astype(np.int32),
            layer=site_X.astype(np.int32),
            phase=phase_X.astype(np.int8),
            rank=np.zeros(len(start_X), dtype=np.int32),
            start_ns=start_X.copy(),
            duration_ns=end_X - start_X,
            sent_bytes=np.zeros(len(start_X), dtype=np.int64),
            received_bytes=bytes_X.copy(),
            tokens=tokens_X.copy(),
        )
