"""A plane's bytes from codes, scales and offsets, and back: the layout that placer.core.device.planes describes.

Legend: R rows, C columns, G groups of columns that share a scale.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from placer.core.device.ladder import MatrixShape, matrix_plane_bytes
from placer.core.errors import MismatchError, UsageError

__all__ = ["PlaneMatrix", "pack_plane", "plane_bits", "refuse_other_bytes", "unpack_plane"]


@dataclass(frozen=True, slots=True)
class PlaneMatrix:
    """One matrix of a plane: codes (R, C) uint8, scales (R, G) and, in a base plane or a copy, offsets (R, G), float16.

    A base plane's weight is offset + scale * code; a residual plane adds scale * (2 * code - 1).
    """

    code_RC: Tensor
    scale_RG: Tensor
    offset_RG: Tensor | None = None


def pack_plane(matrices: Sequence[PlaneMatrix], bits: int) -> Tensor:
    """The bytes of one plane, uint8 (N,). Raises UsageError for a code wider than `bits` or a scale that is no number.

    Complexity: O(bits * weights).
    """
    parts = []
    for at, matrix in enumerate(matrices):
        code_RC = matrix.code_RC.cpu().numpy()
        if code_RC.size and int(code_RC.max()) >> bits:
            raise UsageError(f"matrix {at} has code {int(code_RC.max())}; {bits} bits hold 0 to {2**bits - 1}")
        bit_RCb = (code_RC[:, :, None] >> np.arange(bits, dtype=np.uint8)) & 1
        parts.append(np.packbits(bit_RCb.reshape(len(code_RC), -1), axis=1, bitorder="little").reshape(-1))
        for name, half_RG in (("scale", matrix.scale_RG), ("offset", matrix.offset_RG)):
            if half_RG is not None:
                if not torch.isfinite(half_RG).all():
                    raise UsageError(f"matrix {at} has a {name} that half precision cannot hold; scale the weights")
                parts.append(half_RG.to(torch.float16).cpu().contiguous().numpy().reshape(-1).view(np.uint8))
    return torch.from_numpy(np.concatenate(parts))


def unpack_plane(
    raw: Tensor, shapes: Sequence[MatrixShape], bits: int, group_size: int, *, offset: bool
) -> list[PlaneMatrix]:
    """Inverts `pack_plane` for matrices of these shapes. Raises MismatchError for another number of bytes.

    For reading and checking; `expert_weights` is the fast way to weights.
    """
    found = []
    for (rows, columns), codes, scale_RG, offset_RG in plane_bits(raw, shapes, bits, group_size, offset=offset):
        bit_RX = np.unpackbits(codes.cpu().numpy(), axis=1, count=columns * bits, bitorder="little")
        weight_b = (1 << np.arange(bits)).astype(np.uint8)
        code_RC = (bit_RX.reshape(rows, columns, bits) * weight_b).sum(axis=2, dtype=np.uint8)
        found.append(PlaneMatrix(torch.from_numpy(code_RC), scale_RG, offset_RG))
    return found


def refuse_other_bytes(raw: Tensor, shapes: Sequence[MatrixShape], bits: int, group_size: int, *, offset: bool) -> None:
    """Raises MismatchError where `raw` is not the bytes of one such plane."""
    expected = sum(matrix_plane_bytes(shape, bits, group_size, offset=offset) for shape in shapes)
    if raw.dtype != torch.uint8 or raw.ndim != 1 or len(raw) != expected:
        raise MismatchError(
            f"a plane of {bits} bits is {raw.dtype} {tuple(raw.shape)}; uint8 ({expected},) belongs there for matrices "
            f"{', '.join(f'{rows} x {columns}' for rows, columns in shapes)} in groups of {group_size}"
        )


def plane_bits(
    raw: Tensor, shapes: Sequence[MatrixShape], bits: int, group_size: int, *, offset: bool
) -> list[tuple[MatrixShape, Tensor, Tensor, Tensor | None]]:
    """Each matrix's shape, packed rows (R, bytes), scales and offsets (R, G), as views wherever bytes are aligned."""
    refuse_other_bytes(raw, shapes, bits, group_size, offset=offset)
    found, start = [], 0
    for shape in shapes:
        rows, columns = shape
        row_bytes, groups = -(-columns * bits // 8), -(-columns // group_size)
        codes = raw[start : start + rows * row_bytes].view(rows, row_bytes)
        start += rows * row_bytes
        halves: list[Tensor | None] = [None, None]
        for at in range(1 + offset):
            half = raw[start : start + 2 * rows * groups]
            start += 2 * rows * groups
            if half.storage_offset() % 2 or half.data_ptr() % 2:
                half = half.clone()
            halves[at] = half.view(torch.float16).view(rows, groups)
        assert halves[0] is not None
        found.append((shape, codes, halves[0], halves[1]))
    return found
