"""PlaneIndex: where every plane of every expert lies in a file, how long it is, and its checksum.

The bytes of a plane, matrix after matrix (gate above up, then down): codes packed row by row, least significant bit
first, each row filled up to a whole byte; then the scales, (rows, groups) half precision; then, in a base plane or a
copy, the offsets, (rows, groups) half precision. A weight is offset + scale * code, and every residual plane adds its
scale where the bit is 1 and subtracts it where it is 0. Legend: L routing sites, E experts, K planes.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.device.ladder import BitLadder, MatrixShape
from placer.core.errors import UsageError

__all__ = ["PlaneIndex", "plane_key"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlaneIndex:
    """A file of planes without its bytes.

    model, moe_layers, num_hidden_layers   of the model that was quantised
    shapes        matrices of every expert      sha256   of everything the header says, checksums included
    offset_LEK    first byte of each plane in the file, one contiguous range each of plane_bytes_K bytes
    crc32_LEK     zlib's checksum of those bytes
    error_LEK     relative squared error of the expert's output at each level on calibration text, or None
    about         how it was made: method, seed, calibration text
    """

    path: Path
    model: str
    num_hidden_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    ladder: BitLadder
    shapes: tuple[MatrixShape, ...]
    offset_LEK: npt.NDArray[np.int64]
    crc32_LEK: npt.NDArray[np.uint32]
    sha256: str
    error_LEK: npt.NDArray[np.float64] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = self.shape_LEK
        for name in ("offset_LEK", "crc32_LEK", "error_LEK"):
            table = getattr(self, name)
            if table is not None and table.shape != shape:
                raise UsageError(f"planes.{name} is {table.shape}; {shape} (sites, experts, planes) belongs there")

    @property
    def shape_LEK(self) -> tuple[int, int, int]:
        """Sites, experts, planes."""
        return len(self.moe_layers), self.num_experts, self.ladder.levels

    @property
    def plane_bytes_K(self) -> tuple[int, ...]:
        """Bytes of each plane of an expert."""
        return self.ladder.plane_bytes_K(self.shapes)

    @property
    def total_bytes(self) -> int:
        """Bytes of all planes."""
        return sum(self.plane_bytes_K) * len(self.moe_layers) * self.num_experts


def plane_key(layer: int, expert: int, plane: int) -> str:
    """The name of a plane in its file (absolute layer; planes from 0)."""
    return f"layers.{layer}.experts.{expert}.planes.{plane}"
