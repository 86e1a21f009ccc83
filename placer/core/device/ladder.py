"""BitLadder: the bit-widths an expert can be used at, and the exact bytes of the planes that hold them.

Legend: K levels of the ladder (and planes of an expert), P parameters.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from placer.core.errors import InputFileError, UsageError

__all__ = ["LADDERS", "BitLadder", "MatrixShape", "expert_shapes", "matrix_plane_bytes"]

MatrixShape = tuple[int, int]
"""Rows (outputs) and columns (inputs) of a weight matrix."""

MOST_BITS = 8
HALF_BYTES = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class BitLadder:
    """Candidate bit-widths b_1 < ... < b_K, and how a matrix is stored at each (D2MoE section 4.1).

    nested       True: plane 1 holds b_1 bits, every further plane one binary residual (so b_k = b_1 + k - 1), and
                 level k uses planes 1 to k. False: plane k is a whole copy at b_k bits and level k uses plane k alone
                 (what D2MoE calls Matryoshka-free).
    group_size   columns that share a scale; a row's last group may be shorter

    Per row and group a base plane or copy has a half-precision scale and offset, a residual plane a half-precision
    scale. Raises UsageError.
    """

    bits_K: tuple[int, ...]
    group_size: int = 128
    nested: bool = True

    def __post_init__(self) -> None:
        bits = self.bits_K
        if not bits or any(isinstance(b, bool) or not isinstance(b, int) or not 1 <= b <= MOST_BITS for b in bits):
            raise UsageError(f"ladder.bits_K is {bits!r}; give whole numbers of bits, 1 to {MOST_BITS}")
        if list(bits) != sorted(set(bits)):
            raise UsageError(f"ladder.bits_K is {bits!r}; give every width once, ascending")
        if self.nested and bits[-1] - bits[0] != len(bits) - 1:
            raise UsageError(f"ladder.bits_K is {bits!r}; nested planes add one bit each, so give widths without gaps")
        if isinstance(self.group_size, bool) or not isinstance(self.group_size, int) or self.group_size < 8:
            raise UsageError(f"ladder.group_size is {self.group_size!r}; give a whole number of columns, 8 or more")
        if not isinstance(self.nested, bool):
            raise UsageError(f"ladder.nested is {self.nested!r}; give true or false")

    @property
    def levels(self) -> int:
        """K."""
        return len(self.bits_K)

    def planes_of(self, level: int) -> range:
        """Planes (from 0) that an expert needs at `level` (from 1; 0 needs none)."""
        if not 0 <= level <= self.levels:
            raise UsageError(f"level {level} is not on the ladder; it has levels 1 to {self.levels}")
        return range(level) if self.nested else range(max(0, level - 1), level)

    def level_of(self, bits: int) -> int:
        """The level (from 1) of a bit-width. Raises UsageError for a width that is not on the ladder."""
        if bits not in self.bits_K:
            raise UsageError(
                f"{bits} bits are demanded; the ladder has {', '.join(map(str, self.bits_K))}: quantise that "
                "width too, or clip the demand"
            )
        return self.bits_K.index(bits) + 1

    def plane_bytes_K(self, shapes: Sequence[MatrixShape]) -> tuple[int, ...]:
        """Bytes of every plane of an expert with these matrices, (K,).

        Where rows have whole groups and bits fill whole bytes: base P (b_1 + 32 / g) / 8, residual P (1 + 16 / g) / 8.
        """
        widths = [(self.bits_K[0], True), *[(1, False)] * (self.levels - 1)]
        if not self.nested:
            widths = [(bits, True) for bits in self.bits_K]
        return tuple(
            sum(matrix_plane_bytes(shape, bits, self.group_size, offset=offset) for shape in shapes)
            for bits, offset in widths
        )

    def level_bytes(self, shapes: Sequence[MatrixShape], level: int) -> int:
        """Bytes that must be in memory to use an expert at `level`."""
        plane_bytes_K = self.plane_bytes_K(shapes)
        return sum(plane_bytes_K[plane] for plane in self.planes_of(level))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; `from_dict` inverts it."""
        return {"bits": list(self.bits_K), "group_size": self.group_size, "nested": self.nested}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "ladder") -> "BitLadder":
        """Inverts `to_dict`. Raises InputFileError naming `where`."""
        try:
            return cls(bits_K=tuple(data["bits"]), group_size=data["group_size"], nested=data["nested"])
        except (KeyError, TypeError, UsageError) as error:
            raise InputFileError(f"{where}: not a bit ladder ({error})") from error


LADDERS: Mapping[str, BitLadder] = {
    "v1": BitLadder(bits_K=(2, 3, 4)),
    "v2": BitLadder(bits_K=(5, 6, 7, 8)),
}
"""The two that D2MoE ships: V1 against INT4, V2 against INT8."""


def matrix_plane_bytes(shape: MatrixShape, bits: int, group_size: int, *, offset: bool) -> int:
    """Bytes of one plane of one matrix: bits packed row by row, each row filled up to a whole byte, then the scales."""
    rows, columns = shape
    groups = -(-columns // group_size)
    return rows * (-(-columns * bits // 8)) + rows * groups * HALF_BYTES * (2 if offset else 1)


def expert_shapes(hidden_size: int, moe_intermediate_size: int) -> tuple[MatrixShape, ...]:
    """The matrices of a gated expert: gate above up (2 I, H), and down (H, I)."""
    return (2 * moe_intermediate_size, hidden_size), (hidden_size, moe_intermediate_size)
