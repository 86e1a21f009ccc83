"""Planes of random experts on disk, so that a plan can be tried without a quantised model."""

import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from placer.core.device.ladder import BitLadder, MatrixShape
from placer.core.device.planes import PlaneIndex
from placer.execute.planes import PlaneMatrix, pack_plane
from traces.plane_store import Piece, PlaneFileHeader, save_planes

__all__ = ["write_random_planes"]


def write_random_planes(
    path: Path, layers: int, experts: int, ladder: BitLadder, shapes: Sequence[MatrixShape], seed: int
) -> PlaneIndex:
    """Writes seeded planes whose weights have about the variance 1 / inputs at every level; returns their index.

    Raises InputFileError where `path` cannot be written.
    """
    header = PlaneFileHeader(
        model="random",
        num_hidden_layers=layers,
        moe_layers=tuple(range(layers)),
        num_experts=experts,
        ladder=ladder,
        shapes=tuple(shapes),
        about={"method": "random", "seed": seed},
    )
    return save_planes(path, header, _pieces(header, seed))


def _pieces(header: PlaneFileHeader, seed: int) -> Iterator[Piece]:
    ladder = header.ladder
    for site in range(len(header.moe_layers)):
        for expert in range(header.num_experts):
            rng = np.random.default_rng([seed, site, expert])
            for plane in range(ladder.levels):
                whole = plane == 0 or not ladder.nested
                bits = ladder.bits_K[0 if ladder.nested else plane] if whole else 1
                # a residual's step is half of the plane before it
                halvings = plane if ladder.nested else 0
                matrices = [_matrix(rng, shape, bits, ladder, halvings, offset=whole) for shape in header.shapes]
                yield site, expert, plane, pack_plane(matrices, bits).numpy()


def _matrix(
    rng: np.random.Generator, shape: MatrixShape, bits: int, ladder: BitLadder, halvings: int, *, offset: bool
) -> PlaneMatrix:
    rows, columns = shape
    width = math.sqrt(12 / columns)
    base_bits = ladder.bits_K[0] if ladder.nested else bits
    step = width / 2**base_bits / 2**halvings
    scale_RG = torch.full((rows, -(-columns // ladder.group_size)), step).half()
    code_RC = torch.from_numpy(rng.integers(0, 2**bits, shape, dtype=np.uint8))
    if not offset:
        return PlaneMatrix(code_RC, scale_RG)
    return PlaneMatrix(code_RC, scale_RG, torch.full_like(scale_RG, step / 2 - width / 2))
