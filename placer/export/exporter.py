"""What every engine's exporter is: a pair of pure functions between a plan and the bytes of a file.

Legend: L routing sites (MoE layers), P physical slots.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.atomic import write_atomically
from placer.core.errors import InputFileError, UsageError
from placer.core.model import ModelSpec
from placer.core.plan import Plan, canonical_slots
from placer.export.legal import assert_exportable

__all__ = ["Exporter", "expert_matrix"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Exporter:
    """One engine's file form of a plan.

    suffixes         names of the file may end in these
    encode           (plan, model, suffix) -> bytes of the file
    decode           (bytes, model, suffix) -> slot_expert_LP of the MoE rows; written without `encode`, so that the two
                     check each other; raises InputFileError when the bytes are not that form
    launch           (plan, path) -> the engine's own flags or settings that load the file
    keeps_slot_order whether the file says which slot of its rank an expert takes
    """

    name: str
    about: str
    suffixes: tuple[str, ...]
    encode: Callable[[Plan, ModelSpec, str], bytes]
    decode: Callable[[bytes, ModelSpec, str], npt.NDArray[np.int64]]
    launch: Callable[[Plan, Path], str]
    keeps_slot_order: bool = True

    def suffix(self, path: Path) -> str:
        """The ending of `path`. Raises UsageError where the engine would not recognise it."""
        ending = Path(path).suffix
        if ending not in self.suffixes:
            raise UsageError(f"{path}: {self.name} reads files ending in {' or '.join(self.suffixes)}; rename it")
        return ending

    def write(self, plan: Plan, model: ModelSpec, path: Path) -> None:
        """Writes the checked plan to `path`, reads it back, and only then lets it replace what was there.

        Raises ViolationError for a plan that the engine would load wrongly, UsageError for a wrong suffix,
        InputFileError when the file cannot be written or does not read back as the plan.
        """
        ending = self.suffix(path)
        assert_exportable(plan, model)
        payload = self.encode(plan, model, ending)

        def write_and_compare(temporary: Path) -> None:
            temporary.write_bytes(payload)
            self._assert_same(plan, self._decode(temporary.read_bytes(), model, ending, path), path)

        write_atomically(path, write_and_compare)

    def read_back(self, path: Path, model: ModelSpec) -> npt.NDArray[np.int64]:
        """slot_expert_LP of the MoE rows in the file, int64 (L, P). Raises InputFileError or UsageError."""
        ending = self.suffix(path)
        try:
            payload = Path(path).read_bytes()
        except OSError as error:
            raise InputFileError(f"{path}: cannot be read ({error.strerror})") from error
        return self._decode(payload, model, ending, path)

    def _decode(self, payload: bytes, model: ModelSpec, ending: str, path: Path) -> npt.NDArray[np.int64]:
        try:
            return self.decode(payload, model, ending)
        except InputFileError as error:
            raise InputFileError(f"{path}: {error}") from error

    def _assert_same(self, plan: Plan, found_LP: npt.NDArray[np.int64], path: Path) -> None:
        wanted_LP = plan.slot_expert_LP
        if not self.keeps_slot_order:
            wanted_LP = canonical_slots(wanted_LP, plan.num_ranks)
        if found_LP.shape != wanted_LP.shape:
            raise InputFileError(
                f"{path}: reads back as {found_LP.shape} slots, the plan has {wanted_LP.shape}; try again"
            )
        wrong = np.argwhere(found_LP != wanted_LP)
        if len(wrong):
            row, slot = wrong[0].tolist()
            raise InputFileError(
                f"{path}: layer {plan.moe_layers[row]} slot {slot} reads back as expert {found_LP[row, slot]}, "
                f"the plan has {wanted_LP[row, slot]}; nothing was written, try again"
            )


def expert_matrix(rows: Any, field: str) -> npt.NDArray[np.int64]:
    """Rows of expert ids as int64 (rows, P). Raises InputFileError unless it is a rectangle of integers."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise InputFileError(f"{field} must be a list of rows of expert ids")
    if len({len(row) for row in rows}) != 1:
        raise InputFileError(f"{field} has rows of different lengths")
    for number, row in enumerate(rows):
        for value in row:
            if type(value) is not int:
                raise InputFileError(f"{field} row {number} has {value!r}; give expert ids")
    try:
        return np.asarray(rows, dtype=np.int64)
    except OverflowError as error:
        raise InputFileError(f"{field} has an id that does not fit 64 bits") from error
