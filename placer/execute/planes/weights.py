"""An expert's weights from its packed planes, in few passes over the weights.

Legend: R rows, C columns, G groups of columns that share a scale, H hidden size, F = 2 I (gate rows, then up rows).
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from placer.core.device.ladder import BitLadder, MatrixShape, matrix_plane_bytes
from placer.core.errors import MismatchError, UsageError
from placer.execute.experts import ExpertWeights
from placer.execute.planes.packing import plane_bits, refuse_other_bytes
from placer.execute.planes.unpack import unpack_matrix

__all__ = ["expert_weights", "vectorised_weights"]

Unpacked = tuple[MatrixShape, Tensor, Tensor, Tensor | None]

CODES_PER_BLOCK = 8
CHUNK_WEIGHTS = 1 << 17
"""Weights unpacked at once: intermediate values stay in the processor's cache."""


def expert_weights(
    planes: Sequence[Tensor], ladder: BitLadder, shapes: Sequence[MatrixShape], *, dtype: torch.dtype = torch.float32
) -> ExpertWeights:
    """The weights that `planes`, those of `ladder.planes_of(level)` in order, stand for; on the planes' device.

    planes   uint8, one dimension each: one or more of a nested ladder (1 to level), one whole copy otherwise
    shapes   gate above up (F, H), then down (H, I)

    Raises UsageError for no or too many planes, MismatchError for a plane with another number of bytes.
    Complexity: O(planes * weights) in vectorised steps.
    """
    if len(shapes) != 2:
        raise UsageError(f"shapes has {len(shapes)} matrices; give two, gate above up and down")
    if not 1 <= len(planes) <= (ladder.levels if ladder.nested else 1):
        most = f"1 to {ladder.levels} planes" if ladder.nested else "one copy"
        raise UsageError(f"{len(planes)} planes are given; give {most}")
    base_bits = ladder.bits_K[0] if ladder.nested else _copy_bits(planes[0], ladder, shapes)
    if all(raw.device.type == "cpu" for raw in planes):
        gate_up, down = _compiled(planes, ladder, shapes, base_bits)
        return ExpertWeights(gate_up.to(dtype), down.to(dtype))
    gate_up, down = vectorised_weights(planes, ladder, shapes, base_bits)
    return ExpertWeights(gate_up.to(dtype), down.to(dtype))


def vectorised_weights(
    planes: Sequence[Tensor], ladder: BitLadder, shapes: Sequence[MatrixShape], base_bits: int
) -> tuple[Tensor, Tensor]:
    """Both matrices, float32, by torch's operations on the planes' device: what accelerators take."""
    group = ladder.group_size
    split = [plane_bits(raw, shapes, 1 if at else base_bits, group, offset=not at) for at, raw in enumerate(planes)]
    gate_up, down = (_matrix([parts[at] for parts in split], base_bits, group) for at in range(len(shapes)))
    return gate_up, down


def _compiled(
    planes: Sequence[Tensor], ladder: BitLadder, shapes: Sequence[MatrixShape], base_bits: int
) -> tuple[Tensor, Tensor]:
    """Both matrices by compiled code: on the processor, one call is several times faster than many small steps."""
    group = ladder.group_size
    first_P = []
    for plane, raw in enumerate(planes):
        bits = 1 if plane else base_bits
        refuse_other_bytes(raw, shapes, bits, group, offset=not plane)
        first_P.append(matrix_plane_bytes(shapes[0], bits, group, offset=not plane))
    packed = tuple(raw.numpy() for raw in planes)
    # torch's own memory: the last bits of a matrix product depend on where its operands are aligned
    gate_up, down = (torch.empty(*shape) for shape in shapes)
    unpack_matrix(packed, (0,) * len(planes), base_bits, group, gate_up.numpy())
    unpack_matrix(packed, tuple(first_P), base_bits, group, down.numpy())
    return gate_up, down


def _copy_bits(raw: Tensor, ladder: BitLadder, shapes: Sequence[MatrixShape]) -> int:
    """The width of a whole copy: no two widths need the same bytes."""
    sizes = ladder.plane_bytes_K(shapes)
    if raw.numel() not in sizes:
        raise MismatchError(
            f"a copy has {raw.numel()} bytes; those of {', '.join(map(str, ladder.bits_K))} bits have "
            f"{', '.join(map(str, sizes))}"
        )
    return ladder.bits_K[sizes.index(raw.numel())]


def _matrix(parts: list[Unpacked], base_bits: int, group: int) -> Tensor:
    """One matrix (R, C), float32, from its part of every plane."""
    (rows, columns), device = parts[0][0], parts[0][1].device
    weight_RC = torch.empty(rows, columns, device=device)
    step = max(1, CHUNK_WEIGHTS // columns)
    for start in range(0, rows, step):
        here = slice(start, start + step)
        out = weight_RC[here]
        for plane, (_, packed, scale_RG, offset_RG) in enumerate(parts):
            code = _codes(packed[here], 1 if plane else base_bits, columns, signs=plane > 0)
            scale = scale_RG[here].float()
            for span, columns_of, groups_of in _whole_groups(columns, group):
                grouped = out[:, columns_of].unflatten(1, (-1, span))
                found = code[:, columns_of].unflatten(1, (-1, span))
                factor = scale[:, groups_of, None]
                if plane:
                    grouped.add_(found.mul_(factor))
                else:
                    assert offset_RG is not None
                    torch.mul(found, factor, out=grouped)
                    grouped.add_(offset_RG[here][:, groups_of, None].float())
    return weight_RC


def _whole_groups(columns: int, group: int) -> list[tuple[int, slice, slice]]:
    """Parts of a row whose groups are equally long: their length, the columns and the groups."""
    whole, rest = divmod(columns, group)
    parts = [(group, slice(0, whole * group), slice(0, whole))] if whole else []
    return [*parts, (rest, slice(whole * group, columns), slice(whole, whole + 1))] if rest else parts


def _codes(packed: Tensor, bits: int, columns: int, *, signs: bool) -> Tensor:
    """Codes (R, C) as float32; with `signs` -1 and 1 in place of 0 and 1."""
    rows = len(packed)
    if bits == 8:
        return packed.float()
    if 8 % bits == 0:
        index = packed.int()
        per_index = 8 // bits
    else:
        blocks = -(-columns // CODES_PER_BLOCK)
        word = torch.zeros(rows, blocks, 8, dtype=torch.uint8, device=packed.device)
        short = blocks * bits - packed.shape[1]
        filled = torch.nn.functional.pad(packed, (0, short)) if short else packed
        word[:, :, :bits] = filled.view(rows, blocks, bits)
        per_index = 4 if bits == 3 else 2
        shift = torch.arange(0, CODES_PER_BLOCK, per_index, device=packed.device) * bits
        index = (word.view(torch.int64) >> shift) & ((1 << bits * per_index) - 1)
    table = _table(bits, per_index, signs, packed.device)
    code = table.index_select(0, index.reshape(-1)).view(rows, -1)
    return code[:, :columns]


@functools.lru_cache(maxsize=32)
def _table(bits: int, per_index: int, signs: bool, device: torch.device) -> Tensor:
    """The codes inside every pattern of `bits * per_index` bits, (patterns, per_index) float32."""
    pattern = torch.arange(1 << bits * per_index)[:, None]
    code = (pattern >> torch.arange(per_index) * bits) & ((1 << bits) - 1)
    return (2 * code - 1 if signs else code).float().to(device)
