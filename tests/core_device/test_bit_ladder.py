"""Bytes of planes by the formula and by packing bit for bit; levels, and ladders that are refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.device.ladder import LADDERS, BitLadder, expert_shapes, matrix_plane_bytes
from placer.core.errors import InputFileError, UsageError

V1, V2 = LADDERS["v1"], LADDERS["v2"]


def test_whole_groups_take_what_the_papers_formula_says() -> None:
    """Base P (b + 32 / g) / 8, every residual P (1 + 16 / g) / 8, for an expert of 2 x 256 x 128 and 128 x 256."""
    shapes = expert_shapes(128, 256)
    assert shapes == ((512, 128), (128, 256))
    weights = 512 * 128 + 128 * 256
    assert V1.plane_bytes_K(shapes) == (
        int(weights * (2 + 32 / 128) / 8),
        int(weights * (1 + 16 / 128) / 8),
        int(weights * (1 + 16 / 128) / 8),
    )
    assert V2.plane_bytes_K(shapes)[0] == int(weights * (5 + 32 / 128) / 8)


def test_nested_planes_are_the_widest_copy_and_a_scale_per_plane_and_three_copies_are_more_than_twice_that() -> None:
    """D2MoE: separate INT2 + 3 + 4 take 9/4 of INT4 (and scales)."""
    shapes = expert_shapes(128, 256)
    copies = BitLadder(bits_K=(2, 3, 4), nested=False)
    groups = 512 * 1 + 128 * 2
    copy_bytes = copies.plane_bytes_K(shapes)
    assert sum(V1.plane_bytes_K(shapes)) == copy_bytes[2] + 2 * groups * 2
    codes = [size - groups * 4 for size in copy_bytes]
    assert sum(codes) * 4 == codes[2] * 9
    assert V1.level_bytes(shapes, 3) == sum(V1.plane_bytes_K(shapes))
    assert copies.level_bytes(shapes, 3) == copy_bytes[2]
    assert V1.level_bytes(shapes, 0) == 0


@settings(max_examples=50, deadline=None)
@given(
    rows=st.integers(1, 9), columns=st.integers(1, 300), bits=st.integers(1, 8), group=st.integers(8, 130),
    offset=st.booleans(),
)  # fmt: skip
def test_plane_bytes_row_by_row(rows: int, columns: int, bits: int, group: int, offset: bool) -> None:
    one_row = len(bytes((columns * bits + 7) // 8))
    scales = len(range(0, columns, group)) * 2
    assert matrix_plane_bytes((rows, columns), bits, group, offset=offset) == rows * (
        one_row + scales + scales * offset
    )


def test_levels_and_their_planes() -> None:
    copies = BitLadder(bits_K=(2, 4, 8), nested=False)
    assert [list(V1.planes_of(level)) for level in range(4)] == [[], [0], [0, 1], [0, 1, 2]]
    assert [list(copies.planes_of(level)) for level in range(4)] == [[], [0], [1], [2]]
    assert [V2.level_of(bits) for bits in (5, 6, 7, 8)] == [1, 2, 3, 4]
    with pytest.raises(UsageError, match=r"9 bits are demanded; the ladder has 5, 6, 7, 8"):
        V2.level_of(9)
    with pytest.raises(UsageError, match="level 4 is not on the ladder; it has levels 1 to 3"):
        V1.planes_of(4)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"bits_K": ()}, "ladder.bits_K is \\(\\)"),
        ({"bits_K": (0, 1)}, "1 to 8"),
        ({"bits_K": (8, 9)}, "1 to 8"),
        ({"bits_K": (True, 2)}, "whole numbers"),
        ({"bits_K": (3, 2)}, "ascending"),
        ({"bits_K": (2, 2)}, "every width once"),
        ({"bits_K": (2, 4)}, "without gaps"),
        ({"bits_K": (2,), "group_size": 4}, "group_size is 4"),
        ({"bits_K": (2,), "group_size": 128.0}, "group_size is 128.0"),
        ({"bits_K": (2,), "nested": 1}, "nested is 1"),
    ],
)
def test_ladders_that_are_refused(changes: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        BitLadder(**changes)


def test_a_ladder_survives_json_and_a_damaged_one_is_named() -> None:
    for ladder in (V1, V2, BitLadder(bits_K=(2, 8), nested=False, group_size=64)):
        assert BitLadder.from_dict(ladder.to_dict()) == ladder
    for damaged in ({}, {"bits": 3, "group_size": 128, "nested": True}, {"bits": [2, 4], "group_size": 8, "nested": 1}):
        with pytest.raises(InputFileError, match="plan: not a bit ladder"):
            BitLadder.from_dict(damaged, where="plan")
