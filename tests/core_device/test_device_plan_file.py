"""DevicePlan: bytes it keeps, files that come back as they were, and files that are refused with one line."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.device.ladder import LADDERS, BitLadder
from placer.core.device.plan import DevicePlan
from placer.core.errors import InputFileError, PlacerError, UsageError


def make_plan(**changes: Any) -> DevicePlan:
    fields: dict[str, Any] = {
        "model": "toy",
        "num_hidden_layers": 4,
        "moe_layers": (1, 3),
        "num_experts": 3,
        "ladder": LADDERS["v1"],
        "plane_bytes_K": (20, 10, 5),
        "resident_LE": np.array([[0, 1, 2], [3, 0, 0]]),
        "ceiling_LE": np.array([[3, 3, 3], [3, 1, 2]]),
        "cache": "lru",
        "cache_bytes": 40,
        "buffer_bytes": 35,
        "memory_bytes": 160,
        "objective": 12.5,
        "bound": 10.0,
        "hashes": {"trace": "ab"},
    }
    return DevicePlan(**fields | changes)


def test_resident_planes_are_a_prefix_or_the_one_copy() -> None:
    plan = make_plan()
    assert plan.present_LEK.astype(int).tolist() == [[[0, 0, 0], [1, 0, 0], [1, 1, 0]], [[1, 1, 1], [0] * 3, [0] * 3]]
    assert plan.resident_bytes == 20 + 30 + 35
    copies = make_plan(ladder=BitLadder(bits_K=(2, 3, 4), nested=False))
    assert copies.present_LEK.astype(int).tolist() == [[[0, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 0, 1], [0] * 3, [0] * 3]]
    assert copies.resident_bytes == 20 + 10 + 5
    assert plan.gap == pytest.approx(0.2)
    assert make_plan(bound=None).gap is None


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 999), layers=st.integers(1, 4), experts=st.integers(1, 6))
def test_a_plan_comes_back_from_its_file(tmp_path_factory, seed: int, layers: int, experts: int) -> None:
    rng = np.random.default_rng(seed)
    plan = make_plan(
        moe_layers=tuple(range(layers)),
        num_experts=experts,
        resident_LE=rng.integers(0, 4, (layers, experts)),
        ceiling_LE=rng.integers(1, 4, (layers, experts)),
        order="johnson",
        seed=seed,
    )
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    again = DevicePlan.load(path)
    assert again.to_json() == plan.to_json() == path.read_text()
    assert again.sha256 == plan.sha256
    np.testing.assert_array_equal(again.resident_LE, plan.resident_LE)
    assert again.moe_layers == plan.moe_layers
    assert again.sha256 != replace(plan, order="hebf").sha256


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"resident_LE": np.zeros((2, 4), dtype=int)}, "plan.resident_LE is \\(2, 4\\)"),
        ({"resident_LE": np.full((2, 3), 4)}, "levels go from 0 to 3"),
        ({"ceiling_LE": np.zeros((2, 3), dtype=int)}, "levels go from 1 to 3"),
        ({"plane_bytes_K": (1, 2)}, "each of 3 planes"),
        ({"plane_bytes_K": (1, 2, 0)}, "each of 3 planes"),
        ({"order": "fastest"}, "use one of by_id"),
        ({"cache": "magic"}, "use one of none"),
        ({"buffer_bytes": -1}, "plan.buffer_bytes is -1"),
        ({"cache_bytes": 1.5}, "plan.cache_bytes is 1.5"),
        ({"prefetch_layers": 2}, "one layer ahead at most"),
    ],
)
def test_plans_that_are_refused(changes: dict, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        make_plan(**changes)


JUNK: list[Any] = [None, "x", -1, 1.5, True, [], [1], {}, {"a": 1}, [[9]], 10**30, "\n", float("nan")]


@pytest.mark.parametrize("junk", JUNK, ids=repr)
def test_junk_in_any_field_is_one_line_or_a_plan_that_can_be_written(tmp_path: Path, junk: Any) -> None:
    data = json.loads(make_plan().to_json())
    path = tmp_path / "plan.json"
    refusals = []
    for field in data:
        path.write_text(json.dumps({**data, field: junk}))
        try:
            DevicePlan.load(path).to_json()
        except InputFileError as error:
            refusals.append(str(error))
    assert len(refusals) >= 10
    assert [line for line in refusals if not line.startswith(f"{path}: ") or "\n" in line] == []


def test_files_that_are_no_plans(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    whole = json.loads(make_plan().to_json())
    texts = {
        "is not JSON": '{"format"',
        "is not a device plan": json.dumps({"format": "placer-plan"}),
        "reads version 1": json.dumps({**whole, "version": 2}),
        "unknown field 'speed'": json.dumps({**whole, "speed": 1}),
        "field 'ladder' is missing": json.dumps({key: value for key, value in whole.items() if key != "ladder"}),
        "rows of different lengths": json.dumps({**whole, "resident_LE": [[1], [1, 2]]}),
    }
    for says, text in texts.items():
        path.write_text(text)
        with pytest.raises(PlacerError, match=says):
            DevicePlan.load(path)
    with pytest.raises(InputFileError, match="cannot be read"):
        DevicePlan.load(tmp_path / "none.json")
