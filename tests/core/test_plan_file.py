"""Plan JSON: round trip, same bytes, and damaged files of every kind: nothing but InputFileError comes out.

Legend: L sites, P slots.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_cases import Case, cases, load_profile_of, make_cluster, make_model, make_plan
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from placer.core.check import assert_runnable, check
from placer.core.errors import InputFileError, UsageError, ViolationError
from placer.core.evaluate import evaluate
from placer.core.plan import Plan, canonical_slots
from placer.core.problem import PlacementProblem

QUIET = [HealthCheck.function_scoped_fixture]
ROWS = [[0, 1, 2, 3, 4, 5, 6, 7], [7, 6, 5, 4, 3, 2, 1, 0]]
CLUSTER = make_cluster(1, 4)
MODEL = make_model(2, 8)
TEXTS = st.text(max_size=8)


def toy_plan(**changes: Any) -> Plan:
    about: dict[str, Any] = {
        "solver": "lpt",
        "status": "solved",
        "stopped_by": "effort",
        "objective_name": "par",
        "objective": 1.25,
        "bound": 1.0,
        "bound_by": "load",
        "seed": 7,
        "hashes": {"trace": "ab", "model": "cd"},
    }
    return make_plan(ROWS, CLUSTER, 8, **about | changes)


def saved(tmp_path: Path, **changes: Any) -> dict[str, Any]:
    path = tmp_path / "plan.json"
    toy_plan(**changes).save(path)
    return json.loads(path.read_text())


def load_changed(tmp_path: Path, **changes: Any) -> Plan:
    path = tmp_path / "changed.json"
    path.write_text(json.dumps(saved(tmp_path) | changes))
    return Plan.load(path)


@settings(max_examples=60, deadline=None, suppress_health_check=QUIET)
@given(case=cases(), text=TEXTS, numbers=st.none() | st.floats(-1e9, 1e9), seed=st.integers(0, 2**80))
def test_what_is_saved_is_loaded(case: Case, text: str, numbers: float | None, seed: int, tmp_path: Path) -> None:
    plan = case.plan
    plan = make_plan(
        plan.slot_expert_LP, case.cluster, plan.num_experts, mode=plan.mode, replica_choice=plan.replica_choice,
        replica_share_LP=plan.replica_share_LP, model=text, solver=text, objective=numbers, bound=numbers, seed=seed,
        hashes={text: text},
    )  # fmt: skip
    path = tmp_path / "plan.json"
    plan.save(path)
    first = path.read_bytes()
    loaded = Plan.load(path)
    np.testing.assert_array_equal(loaded.slot_expert_LP, plan.slot_expert_LP)
    if plan.replica_share_LP is None:
        assert loaded.replica_share_LP is None
    else:
        np.testing.assert_allclose(loaded.replica_share_LP, plan.replica_share_LP, atol=1e-6)
    for name in ("model", "objective", "seed", "hashes", "moe_layers", "mode", "replica_choice", "num_hidden_layers"):
        assert getattr(loaded, name) == getattr(plan, name)
    loaded.save(path)
    assert path.read_bytes() == first
    assert loaded.sha256 == plan.sha256


def test_the_file_is_json_with_a_line_for_each_layer(tmp_path: Path) -> None:
    data = saved(tmp_path)
    assert (data["format"], data["version"], data["gap"]) == ("placer-plan", 1, pytest.approx(0.2))
    lines = (tmp_path / "plan.json").read_text().splitlines()
    assert sum(line.strip().rstrip(",") == json.dumps(ROWS[1]) for line in lines) == 1
    assert list(data) == list(saved(tmp_path, seed=8)), "the order of fields does not depend on their values"


def test_shares_are_written_with_six_decimals(tmp_path: Path) -> None:
    """More would make two plans of one placement differ in digits that no engine sees."""
    data = saved(tmp_path, replica_share_LP=np.full((2, 8), 1 / 3))
    assert data["replica_share_LP"] == [[0.333333] * 8] * 2


def test_equal_hashes_in_another_order_give_equal_bytes() -> None:
    one, other = toy_plan(hashes={"a": "1", "b": "2"}), toy_plan(hashes={"b": "2", "a": "1"})
    assert one.to_json() == other.to_json()


@pytest.mark.parametrize(
    ("objective", "bound", "gap"), [(None, 1.0, None), (2.0, None, None), (2.0, 1.0, 0.5), (0.0, 0.0, 0.0), (1, 2, 0)]
)
def test_gap(objective: float | None, bound: float | None, gap: float | None) -> None:
    assert toy_plan(objective=objective, bound=bound).gap == gap


def test_canonical_slots_sorts_inside_each_rank_only() -> None:
    assert canonical_slots(np.array([[3, 0, 1, 2], [2, 3, 1, 0]]), 2).tolist() == [[0, 3, 1, 2], [2, 3, 0, 1]]


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"slot_expert_LP": np.arange(8)}, "slot_expert_LP has 1 axes"),
        ({"num_experts": 0}, "num_experts is 0"),
        ({"num_experts": True}, "num_experts is True"),
        ({"num_ranks": 2.0}, "num_ranks is 2.0"),
        ({"ranks_per_node": -1}, "ranks_per_node is -1"),
        ({"mode": "broadcast"}, "mode is 'broadcast'; use one of per_expert"),
        ({"replica_choice": "best"}, "replica_choice is 'best'; use one of visit_first"),
    ],
)
def test_the_constructor_refuses(changes: dict[str, Any], text: str) -> None:
    fields = {
        "model": "toy", "num_experts": 8, "num_ranks": 4, "ranks_per_node": 4, "moe_layers": (0, 1),
        "slot_expert_LP": np.array(ROWS), "mode": "per_rank",
    }  # fmt: skip
    with pytest.raises(UsageError) as caught:
        Plan(**fields | changes)
    assert text in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value", "text"),
    [
        ("format", "placer-timeline", "not a placer plan"),
        ("format", None, "not a placer plan"),
        ("version", 2, "plan version 2; this placer reads version 1"),
        ("version", "1", "plan version '1'"),
        ("surprise", 1, "unknown field 'surprise'"),
        ("model", 5, "model is 5"),
        ("model", None, "model is None"),
        ("solver", ["x"], "solver is"),
        ("status", {}, "status is"),
        ("num_experts", "8", "num_experts is '8'"),
        ("num_experts", 8.0, "num_experts is 8.0"),
        ("num_experts", True, "num_experts is True"),
        ("num_ranks", 0, "num_ranks is 0"),
        ("num_ranks", None, "num_ranks is None"),
        ("ranks_per_node", [4], "ranks_per_node is [4]"),
        ("mode", "fast", "mode is 'fast'"),
        ("mode", ["per_rank"], "mode is"),
        ("replica_choice", None, "replica_choice is None"),
        ("moe_layers", "01", "moe_layers is 01"),
        ("moe_layers", [0.5, 1], "moe_layers is"),
        ("moe_layers", [0, -1], "moe_layers is"),
        ("moe_layers", [False, 1], "moe_layers is"),
        ("moe_layers", {"0": 1}, "moe_layers is"),
        ("moe_layers", 3, "moe_layers is 3"),
        ("objective", "1.5", "objective is '1.5'"),
        ("objective", True, "objective is 'True'"),
        ("objective", float("nan"), "objective is 'nan'"),
        ("bound", float("inf"), "bound is 'inf'"),
        ("bound", [1], "bound is '[1]'"),
        pytest.param("bound", 10**400, "bound is", id="bound-huge"),
        ("seed", "0", "seed is '0'"),
        ("seed", 1.5, "seed is 1.5"),
        ("num_hidden_layers", "2", "num_hidden_layers is '2'"),
        ("num_hidden_layers", 0, "num_hidden_layers is 0"),
        ("hashes", [["trace", "x"]], "hashes is"),
        ("hashes", {"trace": 5}, "hashes is"),
        ("slot_expert_LP", [], "slot_expert_LP must be a list of rows"),
        ("slot_expert_LP", 7, "slot_expert_LP must be a list of rows"),
        ("slot_expert_LP", [0, 1], "slot_expert_LP must be a list of rows"),
        ("slot_expert_LP", [[0, 1], [0]], "rows of different lengths [1, 2]"),
        ("slot_expert_LP", [[0, 1.0]], "slot_expert_LP row 0 has 1.0"),
        ("slot_expert_LP", [[0, True]], "slot_expert_LP row 0 has True"),
        ("slot_expert_LP", [[0, None]], "slot_expert_LP row 0 has None"),
        ("slot_expert_LP", [[0, "1"]], "slot_expert_LP row 0 has '1'"),
        ("slot_expert_LP", [[0, [1]]], "slot_expert_LP row 0 has [1]"),
        ("slot_expert_LP", [[0, 2**63]], "damaged plan"),
        ("replica_share_LP", [[0.5, "x"]], "replica_share_LP row 0 has 'x'"),
        ("replica_share_LP", "equal", "replica_share_LP must be a list of rows"),
    ],
)
def test_a_wrong_field_is_named(field: str, value: Any, text: str, tmp_path: Path) -> None:
    with pytest.raises(InputFileError) as caught:
        load_changed(tmp_path, **{field: value})
    message = str(caught.value)
    assert text in message
    assert "changed.json" in message
    assert "\n" not in message
    assert len(message) < 500, "a message does not repeat a whole file"


REQUIRED = ("model", "num_experts", "num_ranks", "ranks_per_node", "moe_layers", "slot_expert_LP", "mode", "format")


@pytest.mark.parametrize("field", [*REQUIRED, "version"])
def test_a_missing_field_is_named(field: str, tmp_path: Path) -> None:
    data = saved(tmp_path)
    del data[field]
    path = tmp_path / "short.json"
    path.write_text(json.dumps(data))
    with pytest.raises(InputFileError, match=field):
        Plan.load(path)


def test_fields_with_defaults_may_be_left_out(tmp_path: Path) -> None:
    data = saved(tmp_path)
    path = tmp_path / "short.json"
    path.write_text(json.dumps({key: data[key] for key in (*REQUIRED, "version")}))
    assert Plan.load(path).replica_choice == "visit_first"


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00" * 64, b"\xff\xfe", b"{", b"[]", b"null", b"3", b'"plan"', b"{}", b"[" * 100_000, b"\x80\x04K\x01."],
    ids=["empty", "zeros", "utf-16", "brace", "list", "null", "number", "text", "object", "deep", "pickle"],
)
def test_what_is_no_plan_at_all(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(InputFileError, match=r"plan\.json: is not"):
        Plan.load(path)


def test_a_missing_file_and_a_folder(tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere.json", tmp_path):
        with pytest.raises(InputFileError, match="cannot be read"):
            Plan.load(path)


def survives(content: bytes, tmp_path: Path) -> None:
    """Whatever loads can be written again, checked and judged; everything else is InputFileError."""
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    try:
        plan = Plan.load(path)
    except InputFileError:
        return
    assert Plan.load(path).to_json() == plan.to_json()
    problem = PlacementProblem(profile=load_profile_of(np.ones((1, 2, 8)), MODEL), cluster=CLUSTER, max_par=2.0)
    found = check(problem, plan)
    assert all(str(violation) for violation in found)
    try:
        assert_runnable(plan)
    except ViolationError:
        assert found, "what cannot be run is not legal"
        return
    if len(plan.slot_expert_LP) == 2 and (plan.num_ranks, plan.ranks_per_node) == (4, 4):
        evaluate(plan, MODEL, CLUSTER, np.zeros((2, 3, 1), dtype=np.uint8), np.zeros(3, dtype=np.int64))


@settings(max_examples=60, deadline=None, suppress_health_check=QUIET)
@given(cut=st.integers(0, 10**6))
def test_truncation(cut: int, tmp_path: Path) -> None:
    whole = toy_plan().to_json().encode()
    survives(whole[: cut % len(whole)], tmp_path)


@settings(max_examples=120, deadline=None, suppress_health_check=QUIET)
@given(flips=st.lists(st.tuples(st.integers(0, 10**6), st.integers(0, 7)), min_size=1, max_size=3))
def test_bit_flips(flips: list[tuple[int, int]], tmp_path: Path) -> None:
    content = bytearray(toy_plan(replica_share_LP=np.ones((2, 8))).to_json().encode())
    for place, bit in flips:
        content[place % len(content)] ^= 1 << bit
    survives(bytes(content), tmp_path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.sampled_from([2**63, -(2**70)]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=12,
)


@settings(max_examples=120, deadline=None, suppress_health_check=QUIET)
@given(data=st.data())
def test_random_json_in_any_field(data: st.DataObject, tmp_path: Path) -> None:
    whole = json.loads(toy_plan().to_json())
    for field in data.draw(st.sets(st.sampled_from(sorted([*whole, "replica_share_LP"])), min_size=1, max_size=2)):
        whole[field] = data.draw(JSON)
    survives(json.dumps(whole).encode(), tmp_path)


@settings(max_examples=100, deadline=None, suppress_health_check=QUIET)
@given(
    rows=st.lists(st.lists(st.integers(-3, 10), min_size=0, max_size=12), min_size=1, max_size=3),
    ranks=st.integers(1, 9),
)
def test_random_placements(rows: list[list[int]], ranks: int, tmp_path: Path) -> None:
    width = len(rows[0])
    whole = json.loads(toy_plan().to_json()) | {
        "slot_expert_LP": [(row + [0] * width)[:width] for row in rows],
        "num_ranks": ranks,
    }
    survives(json.dumps(whole).encode(), tmp_path)
