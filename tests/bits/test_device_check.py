"""A legal device plan passes; every way to break one is named."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from device_cases import COPIES, NESTED, SHAPES, device_of, plan_of, work_of

from placer.core.device.check import check_device_plan
from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex

WORK = work_of(1)
INDEX = PlaneIndex(
    path=Path("planes.safetensors"), model="small", num_hidden_layers=2, moe_layers=(0, 1), num_experts=5,
    ladder=NESTED, shapes=SHAPES,
    offset_LEK=np.zeros((2, 5, 3), dtype=np.int64), crc32_LEK=np.zeros((2, 5, 3), dtype=np.uint32),
    sha256="7" * 64,
)  # fmt: skip
DEVICE = device_of()
BYTES_K = NESTED.plane_bytes_K(SHAPES)


def legal() -> DevicePlan:
    resident_LE = np.tile(np.array([3, 2, 1, 0, 0]), (2, 1))
    ceiling_LE = np.tile(np.array([3, 3, 3, 2, 3]), (2, 1))
    return plan_of(
        WORK, NESTED, resident_LE=resident_LE, ceiling_LE=ceiling_LE, cache="lru", cache_bytes=2 * sum(BYTES_K),
        objective=2.0, bound=1.0, hashes={"planes": "7" * 64},
    )  # fmt: skip


def codes(plan: DevicePlan, **given: Any) -> list[str]:
    parts = {"index": INDEX, "device": DEVICE, "work": WORK, **given}
    return [violation.code for violation in check_device_plan(plan, **parts)]


def test_a_legal_plan_passes() -> None:
    assert codes(legal()) == []
    exactly = legal().resident_bytes + legal().cache_bytes + legal().buffer_bytes
    assert codes(replace(legal(), memory_bytes=exactly)) == []


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"memory_bytes": legal().resident_bytes + legal().cache_bytes + legal().buffer_bytes - 1}, "budget"),
        ({"buffer_bytes": sum(BYTES_K) - 1}, "buffer"),
        ({"resident_LE": np.tile(np.array([3, 2, 1, 3, 0]), (2, 1))}, "waste"),
        ({"cache": "none"}, "cache"),
        ({"cache_bytes": 1}, "cache"),
        ({"memory_bytes": DEVICE.memory_bytes + 1}, "memory"),
        ({"bound": 2.1}, "bound"),
        ({"model": "another"}, "model"),
        ({"moe_layers": (1, 2)}, "layers"),
        ({"num_hidden_layers": 9}, "layers"),
        ({"plane_bytes_K": (BYTES_K[0], BYTES_K[1], BYTES_K[2] + 1), "buffer_bytes": sum(BYTES_K) + 1}, "plane-bytes"),
        ({"hashes": {"planes": "8" * 64}}, "planes-hash"),
    ],
)
def test_every_mutation_is_refused(changes: dict[str, Any], code: str) -> None:
    assert codes(replace(legal(), **changes)) == [code]


def test_another_ladder_and_other_experts() -> None:
    copies = plan_of(WORK, COPIES)
    assert codes(copies) == ["ladder", "plane-bytes"]
    other = work_of(1, (2, 2, 6, 3))
    assert codes(plan_of(other, NESTED)) == ["experts", "work"]


def test_levels_off_the_ladder_are_seen_in_a_plan_changed_in_place() -> None:
    for name, value in (("ceiling_LE", 4), ("ceiling_LE", 0), ("resident_LE", -1)):
        plan = legal()
        getattr(plan, name)[1, 2] = value
        found = check_device_plan(plan)
        assert [violation.code for violation in found] == ["levels"]
        assert "layer 1 expert 2" in str(found[0])


def test_belady_is_for_replay_alone() -> None:
    plan = replace(legal(), cache="belady")
    assert codes(plan) == []
    assert codes(plan, work=None) == ["cache"]


def test_copies_may_be_needed_at_every_level_at_once() -> None:
    bytes_K = COPIES.plane_bytes_K(SHAPES)
    ceiling_LE = np.full((2, 5), 2)
    plan = plan_of(WORK, COPIES, ceiling_LE=ceiling_LE, buffer_bytes=bytes_K[0] + bytes_K[1])
    assert check_device_plan(plan) == []
    found = check_device_plan(replace(plan, buffer_bytes=bytes_K[1]))
    assert [violation.code for violation in found] == ["buffer"]
    one_held = replace(plan, buffer_bytes=bytes_K[0], resident_LE=np.full((2, 5), 2))
    assert check_device_plan(one_held) == []
