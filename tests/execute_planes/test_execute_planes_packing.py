"""Planes survive packing, have the bytes that the ladder says, and turn into the weights they stand for."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.device.ladder import LADDERS, BitLadder, expert_shapes
from placer.core.errors import MismatchError, UsageError
from placer.execute.planes import PlaneMatrix, expert_weights, pack_plane, unpack_plane
from placer.execute.planes.weights import vectorised_weights


def random_plane(rng, shapes, bits, group, *, offset):
    matrices = []
    for rows, columns in shapes:
        groups = -(-columns // group)
        halves = [torch.from_numpy(rng.standard_normal((rows, groups))).half() for _ in range(1 + offset)]
        code = torch.from_numpy(rng.integers(0, 2**bits, (rows, columns)).astype(np.uint8))
        matrices.append(PlaneMatrix(code, *halves))
    return matrices


def spread(half_RG, columns, group):
    return half_RG.float().repeat_interleave(group, dim=1)[:, :columns]


def by_definition(planes, group):
    """Weights written out as the docstring of placer.core.device.planes says."""
    weights = []
    for parts in zip(*planes, strict=True):
        columns = parts[0].code_RC.shape[1]
        weight = (
            spread(parts[0].offset_RG, columns, group) + spread(parts[0].scale_RG, columns, group) * parts[0].code_RC
        )
        for part in parts[1:]:
            weight = weight + spread(part.scale_RG, columns, group) * (2.0 * part.code_RC - 1)
        weights.append(weight)
    return weights


@given(
    seed=st.integers(0, 2**32 - 1),
    bits=st.integers(1, 8),
    hidden=st.integers(1, 40),
    inner=st.integers(1, 40),
    group=st.integers(8, 40),
    offset=st.booleans(),
)
@settings(max_examples=80, deadline=None)
def test_a_plane_survives_packing(seed, bits, hidden, inner, group, offset) -> None:
    rng = np.random.default_rng(seed)
    shapes = expert_shapes(hidden, inner)
    matrices = random_plane(rng, shapes, bits, group, offset=offset)
    raw = pack_plane(matrices, bits)
    ladder = BitLadder(bits_K=(bits,), group_size=group)
    if offset:
        assert len(raw) == ladder.plane_bytes_K(shapes)[0]
    for before, after in zip(matrices, unpack_plane(raw, shapes, bits, group, offset=offset), strict=True):
        assert torch.equal(before.code_RC, after.code_RC)
        assert torch.equal(before.scale_RG, after.scale_RG)
        assert (before.offset_RG is None) == (after.offset_RG is None)
        assert before.offset_RG is None or torch.equal(before.offset_RG, after.offset_RG)


@given(
    seed=st.integers(0, 2**32 - 1),
    base=st.integers(1, 8),
    levels=st.integers(1, 4),
    hidden=st.integers(1, 70),
    inner=st.integers(1, 70),
    group=st.integers(8, 40),
)
@settings(max_examples=80, deadline=None)
def test_weights_are_those_of_the_definition(seed, base, levels, hidden, inner, group) -> None:
    rng = np.random.default_rng(seed)
    ladder = BitLadder(bits_K=tuple(range(base, min(8, base + levels - 1) + 1)), group_size=group)
    shapes = expert_shapes(hidden, inner)
    planes = [random_plane(rng, shapes, 1 if at else base, group, offset=not at) for at in range(ladder.levels)]
    raws = [pack_plane(plane, 1 if at else base) for at, plane in enumerate(planes)]
    for level in range(1, ladder.levels + 1):
        expert = expert_weights(raws[:level], ladder, shapes)
        expected = by_definition(planes[:level], group)
        for got, wanted in zip((expert.gate_up_FH, expert.down_HI), expected, strict=True):
            assert got.is_contiguous()
            torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-4)


def test_a_copy_is_known_by_its_bytes() -> None:
    rng = np.random.default_rng(3)
    ladder = BitLadder(bits_K=(2, 3, 4, 8), nested=False)
    shapes = expert_shapes(128, 96)
    for plane, bits in enumerate(ladder.bits_K):
        matrices = random_plane(rng, shapes, bits, 128, offset=True)
        raw = pack_plane(matrices, bits)
        assert len(raw) == ladder.plane_bytes_K(shapes)[plane]
        expert = expert_weights([raw], ladder, shapes)
        torch.testing.assert_close(expert.down_HI, by_definition([matrices], 128)[1], rtol=1e-5, atol=1e-4)


def test_the_papers_sizes() -> None:
    """Nested 2-3-4 is INT4 and one more scale per residual; the three copies are 9/4 of it and their own scales."""
    shapes = expert_shapes(1024, 1024)
    weights = 3 * 1024 * 1024
    groups = weights // 128
    nested = LADDERS["v1"].plane_bytes_K(shapes)
    int4 = weights * 4 // 8
    assert sum(nested) == int4 + groups * (4 + 2 + 2)
    copies = BitLadder(bits_K=(2, 3, 4), nested=False).plane_bytes_K(shapes)
    assert sum(copies) == int4 * 9 // 4 + 3 * groups * 4


def test_bad_planes_are_one_line() -> None:
    rng = np.random.default_rng(4)
    ladder, shapes = LADDERS["v1"], expert_shapes(16, 8)
    raw = pack_plane(random_plane(rng, shapes, 2, 128, offset=True), 2)
    for planes in ([raw[:-1]], [raw, raw], [raw.short()]):
        with pytest.raises(MismatchError, match="belongs there") as caught:
            expert_weights(planes, ladder, shapes)
        assert "\n" not in str(caught.value)
    for planes in ([], [raw] * 4):
        with pytest.raises(UsageError, match="give 1 to 3 planes"):
            expert_weights(planes, ladder, shapes)
    with pytest.raises(MismatchError, match="a copy has"):
        expert_weights([raw[:-1]], BitLadder(bits_K=(2, 4), nested=False), shapes)
    with pytest.raises(UsageError, match="3 bits hold 0 to 7"):
        pack_plane([PlaneMatrix(torch.full((1, 8), 8, dtype=torch.uint8), torch.ones(1, 1).half())], 3)
    with pytest.raises(UsageError, match="half precision"):
        pack_plane([PlaneMatrix(torch.zeros(1, 8, dtype=torch.uint8), torch.full((1, 1), 1e6).half())], 3)


@given(
    seed=st.integers(0, 2**32 - 1),
    base=st.integers(1, 8),
    hidden=st.integers(1, 40),
    inner=st.integers(1, 40),
    group=st.integers(8, 40),
)
@settings(max_examples=40, deadline=None)
def test_compiled_weights_are_the_vectorised_ones_to_the_bit(seed, base, hidden, inner, group) -> None:
    rng = np.random.default_rng(seed)
    levels = int(rng.integers(1, 10 - base))
    ladder = BitLadder(bits_K=tuple(range(base, base + levels)), group_size=group)
    shapes = expert_shapes(hidden, inner)
    matrices = [random_plane(rng, shapes, 1 if at else base, group, offset=not at) for at in range(levels)]
    planes = [pack_plane(parts, 1 if at else base) for at, parts in enumerate(matrices)]
    found = expert_weights(planes, ladder, shapes)
    wanted = vectorised_weights(planes, ladder, shapes, base)
    assert torch.equal(found.gate_up_FH, wanted[0])
    assert torch.equal(found.down_HI, wanted[1])
