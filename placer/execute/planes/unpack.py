"""A matrix from its packed planes in one pass of compiled code, without Python's lock: the processor's hot path.

Legend: R rows, C columns, G groups of columns that share a scale.
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

__all__ = ["unpack_matrix"]

FloatArray = npt.NDArray[np.float32]
ByteArray = npt.NDArray[np.uint8]

HALF_VALUES: FloatArray = np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
"""The number that every pattern of two bytes stands for."""


def unpack_matrix(
    planes: tuple[ByteArray, ...],
    start_P: tuple[int, ...],
    base_bits: int,
    group: int,
    out_RC: FloatArray,
) -> None:
    """Fills `out_RC` with weights: the same, to the bit, as the vectorised steps in placer.execute.planes.weights.

    start_P: the byte at which the matrix begins in each plane. Complexity: O(planes * weights).
    """
    _unpack(planes, np.array(start_P, dtype=np.int64), base_bits, group, HALF_VALUES, out_RC)


@njit(cache=True, nogil=True, error_model="numpy")
def _half(plane: Any, at: int, values: Any) -> Any:  # pragma: no cover - compiled
    return values[plane[at] | (plane[at + 1] << 8)]


@njit(cache=True, nogil=True, error_model="numpy")
def _unpack(
    planes: Any, start_P: Any, base_bits: int, group: int, values: Any, out_RC: Any
) -> None:  # pragma: no cover - compiled
    rows, columns = out_RC.shape
    groups = (columns + group - 1) // group
    base_row = (columns * base_bits + 7) // 8
    sign_row = (columns + 7) // 8
    base_scales = start_P[0] + rows * base_row
    base_offsets = base_scales + 2 * rows * groups
    for row in range(rows):
        out_C = out_RC[row]
        first = start_P[0] + row * base_row
        for one in range(groups):
            at = 2 * (row * groups + one)
            scale, offset = _half(planes[0], base_scales + at, values), _half(planes[0], base_offsets + at, values)
            _base(planes[0][first : first + base_row], base_bits, scale, offset, one * group, (one + 1) * group, out_C)
        for plane in range(1, len(planes)):
            first = start_P[plane] + row * sign_row
            scales = start_P[plane] + rows * sign_row
            for one in range(groups):
                scale = _half(planes[plane], scales + 2 * (row * groups + one), values)
                _signs(planes[plane][first : first + sign_row], scale, one * group, (one + 1) * group, out_C)


@njit(cache=True, nogil=True, error_model="numpy")
def _base(
    packed: Any, bits: int, scale: Any, offset: Any, begin: int, end: int, out_C: Any
) -> None:  # pragma: no cover - compiled
    end = min(end, len(out_C))
    mask = np.uint64((1 << bits) - 1)
    column = begin
    if begin % 8 == 0:
        # eight codes fill whole bytes; a loop of eight is one vector instruction after another
        for block in range(begin // 8, end // 8):
            word = np.uint64(0)
            for byte in range(bits):
                word |= np.uint64(packed[block * bits + byte]) << np.uint64(8 * byte)
            for lane in range(8):
                code = np.int32((word >> np.uint64(lane * bits)) & mask)
                out_C[8 * block + lane] = np.float32(code) * scale + offset
        column = max(begin, end // 8 * 8)
    while column < end:
        bit = column * bits
        word = np.uint64(packed[bit >> 3])
        if (bit & 7) + bits > 8:
            word |= np.uint64(packed[(bit >> 3) + 1]) << np.uint64(8)
        out_C[column] = np.float32(np.int32((word >> np.uint64(bit & 7)) & mask)) * scale + offset
        column += 1


@njit(cache=True, nogil=True, error_model="numpy")
def _signs(packed: Any, scale: Any, begin: int, end: int, out_C: Any) -> None:  # pragma: no cover - compiled
    end = min(end, len(out_C))
    column = begin
    if begin % 8 == 0:
        for block in range(begin // 8, end // 8):
            byte = np.int32(packed[block])
            for lane in range(8):
                out_C[8 * block + lane] += np.float32(((byte >> lane) & 1) * 2 - 1) * scale
        column = max(begin, end // 8 * 8)
    while column < end:
        out_C[column] += scale if (packed[column >> 3] >> (column & 7)) & 1 else -scale
        column += 1
