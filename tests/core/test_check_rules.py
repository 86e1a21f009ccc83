"""check: every code has a test, every bad plan that an engine accepts is refused, and a slow oracle agrees.

Legend: L sites, P slots, R ranks, E experts.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from core_cases import Case, cases, count_profile, load_profile_of, make_cluster, make_model, make_plan
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.check import Violation, assert_runnable, check
from placer.core.errors import InputFileError, ViolationError
from placer.core.plan import Plan
from placer.core.problem import PlacementProblem

CLUSTER = make_cluster(2, 2)
MODEL = make_model(2, 6)
ROWS = [[0, 1, 2, 3, 4, 5, 0, 1], [5, 4, 3, 2, 1, 0, 5, 4]]
"""Two layers, six experts, two slots on each of four ranks; experts 0 and 1 (5 and 4) have two replicas."""


def problem(**changes: Any) -> PlacementProblem:
    profile = load_profile_of([[[4, 4, 2, 2, 2, 2], [2, 2, 2, 2, 4, 4]]], MODEL)
    return PlacementProblem(**{"profile": profile, "cluster": CLUSTER, "redundant": 2} | changes)


def plan(rows: Any = ROWS, **changes: Any) -> Plan:
    return make_plan(rows, CLUSTER, 6, **changes)


def with_slot(layer: int, slot: int, expert: int) -> list[list[int]]:
    rows = [list(row) for row in ROWS]
    rows[layer][slot] = expert
    return rows


def codes(found: list[Violation]) -> list[str]:
    return [violation.code for violation in found]


def test_a_legal_plan_breaks_no_rule() -> None:
    assert check(problem(), plan()) == []
    assert_runnable(plan())


ACCEPTED_BY_ENGINES = [
    pytest.param(plan(ROWS[:1]), ["layers", "layers"], id="fewer layer rows"),
    pytest.param(plan([*ROWS, ROWS[0]]), ["layers", "layers"], id="more layer rows"),
    pytest.param(plan([[*row, 2, 3, 4, 5] for row in ROWS]), ["slots"], id="too many slots"),
    pytest.param(plan([row[:4] for row in ROWS]), ["slots"], id="too few slots"),
    pytest.param(plan([[*row, 2] for row in ROWS]), ["slots"], id="slots that do not divide"),
    pytest.param(plan(with_slot(1, 2, 0)), ["missing-expert"], id="an expert never placed"),
    pytest.param(plan(with_slot(1, 2, 6)), ["id-range"], id="id out of range"),
    pytest.param(plan(with_slot(1, 2, -2)), ["id-range"], id="negative id"),
    pytest.param(plan(with_slot(0, 7, -1)), ["empty-slot"], id="id -1"),
    pytest.param(plan(with_slot(0, 7, 0)), ["same-rank-replicas"], id="two replicas on one rank"),
]


@pytest.mark.parametrize(("bad", "wanted"), ACCEPTED_BY_ENGINES)
def test_plans_that_engines_accept_are_refused(bad: Plan, wanted: list[str]) -> None:
    found = check(problem(), bad)
    assert codes(found) == wanted
    for violation in found:
        assert "\n" not in str(violation)
        assert str(violation).startswith(f"{violation.code} at {violation.where}: ")


def test_an_extra_json_key_is_refused_when_the_plan_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "plan.json"
    path.write_text(json.dumps(json.loads(plan().to_json()) | {"comment": "mine"}))
    with pytest.raises(InputFileError, match="unknown field 'comment'"):
        Plan.load(path)


def test_layers_of_other_numbers() -> None:
    found = check(problem(), plan(moe_layers=(1, 2)))
    assert [(v.code, v.where) for v in found] == [("layers", "plan.moe_layers")]
    assert "[1, 2]" in found[0].message
    assert "[0, 1]" in found[0].message


def test_many_layers_are_not_all_printed() -> None:
    model = make_model(40, 6)
    rows = [ROWS[0]] * 40
    profile = load_profile_of(np.ones((1, 40, 6)), model)
    bad = make_plan(rows, CLUSTER, 6, moe_layers=tuple(range(1, 41)))
    found = check(problem(profile=profile), bad)
    assert "[1, 2, ..., 40]" in found[0].message
    assert len(str(found[0])) < 200


def test_a_plan_of_another_number_of_experts() -> None:
    other = make_plan([[0, 1, 2, 3, 0, 1, 2, 3]] * 2, CLUSTER, 4)
    assert codes(check(problem(), other)) == ["experts"]


@pytest.mark.parametrize("shape", [(1, 4), (4, 1), (1, 2), (4, 2)])
def test_a_plan_for_another_cluster(shape: tuple[int, int]) -> None:
    other = make_plan(ROWS, make_cluster(*shape), 6)
    assert codes(check(problem(), other))[0] == "ranks"


def test_every_broken_frame_rule_is_reported_together() -> None:
    bad = make_plan([[0, 1, 2]], make_cluster(1, 2), 3, moe_layers=(7,))
    assert codes(check(problem(), bad)) == ["layers", "layers", "experts", "ranks", "slots"]


def test_every_bad_slot_is_named() -> None:
    found = check(problem(), plan([[0, 1, 9, 3, 4, 7, 0, 1], ROWS[1]]))
    assert [(v.code, v.where) for v in found] == [("id-range", "layer 0")] * 2
    assert "slot 2 has expert 9; ids go from 0 to 5" in found[0].message
    assert "slot 5 has expert 7" in found[1].message


def test_missing_experts_say_how_many() -> None:
    found = check(problem(), plan([[0, 1, 2, 3, 0, 1, 2, 3], ROWS[1]]))
    assert codes(found) == ["missing-expert"]
    assert "expert 4 has no slot (2 missing)" in found[0].message


def test_layers_are_named_by_the_models_numbers() -> None:
    model = make_model(moe_layers=(3, 5), layers=6, experts=6)
    profile = load_profile_of(np.ones((1, 2, 6)), model)
    found = check(problem(profile=profile), plan(with_slot(1, 2, 0), moe_layers=(3, 5)))
    assert [(v.code, v.where) for v in found] == [("missing-expert", "layer 5")]


EQUAL = np.array([[0.5, 0.5, 1, 1, 1, 1, 0.5, 0.5], [0.5, 0.5, 1, 1, 1, 1, 0.5, 0.5]])


def shares(**changes: float) -> np.ndarray:
    result = EQUAL.copy()
    for slot, value in changes.items():
        result[1, int(slot[1:])] = value
    return result


@pytest.mark.parametrize(
    ("share_LP", "text"),
    [
        (shares(p0=0.7), "shares of expert 5 add up to 1.2000"),
        (shares(p0=0.502), "shares of expert 5 add up to 1.0020"),
        (shares(p2=0.0), "shares of expert 3 add up to 0.0000"),
        (shares(p0=-0.5, p6=1.5), "negative or not a number"),
        (shares(p0=np.nan), "negative or not a number"),
        (shares(p0=np.inf), "negative or not a number"),
        (EQUAL[:, :4], "replica_share_LP is (2, 4), slot_expert_LP (2, 8)"),
    ],
)
def test_shares_that_are_none(share_LP: np.ndarray, text: str) -> None:
    bad = plan(replica_share_LP=share_LP)
    found = check(problem(), bad)
    assert set(codes(found)) == {"share"}
    assert text in found[0].message
    with pytest.raises(ViolationError, match="share at layer"):
        assert_runnable(bad)


def test_shares_as_rounded_in_a_file_are_legal() -> None:
    thirds = np.array([[1 / 3, 2 / 3, 1, 1, 1, 1, 2 / 3, 1 / 3]] * 2).round(6)
    assert check(problem(), plan(replica_share_LP=thirds)) == []


def test_memory_counts_what_each_rank_holds() -> None:
    """Uneven plans only: an even plan that does not fit has no problem to be checked against."""
    cluster = make_cluster(2, 2, memory_gib=2**-30 * 5 * MODEL.expert_bytes)
    uneven = [[0, 1, 2, 3, 4, 5, -1, -1, -1], [0, 1, 2, 3, 4, 5, -1, -1, -1]]
    rows = [row + [-1] * 3 for row in uneven]
    bad = make_plan(rows, cluster, 6)
    empty = problem(cluster=cluster, allow_empty_slots=True, redundant=2)
    assert codes(check(empty, bad)) == ["memory"]
    found = check(empty, bad)[0]
    assert found.where == "rank 0"
    assert "has" in found.message
    fits = problem(cluster=make_cluster(2, 2), allow_empty_slots=True, redundant=2)
    assert check(fits, make_plan(rows, CLUSTER, 6)) == []


def test_empty_slots_are_legal_where_the_problem_allows_them() -> None:
    allowed = problem(allow_empty_slots=True)
    assert check(allowed, plan(with_slot(0, 7, -1))) == []
    assert codes(check(allowed, plan(with_slot(0, 2, -1)))) == ["missing-expert"]
    assert codes(check(allowed, plan(with_slot(0, 2, -3)))) == ["id-range"]


def test_the_load_cap_by_hand() -> None:
    """Layer 0: ranks 2+2, 4, 4, 2+2 -> PAR 1; with shares all on the first replicas 8, 4, 4, 0 -> 2."""
    assert check(problem(max_par=1.0), plan()) == []
    first = np.array([[1.0, 1, 1, 1, 1, 1, 0, 0]] * 2)
    found = check(problem(max_par=1.9), plan(replica_share_LP=first))
    assert codes(found) == ["max-par"]
    assert "is 2.0000 (mean over layers), the limit is 1.9" in found[0].message
    assert check(problem(max_par=2.0), plan(replica_share_LP=first)) == []


def test_the_load_cap_is_on_the_mean_over_layers() -> None:
    first = np.array([[1.0, 1, 1, 1, 1, 1, 0, 0], EQUAL[1]])
    assert check(problem(max_par=1.5), plan(replica_share_LP=first)) == []
    assert codes(check(problem(max_par=1.49), plan(replica_share_LP=first))) == ["max-par"]


def test_a_layer_without_load_counts_as_balanced() -> None:
    profile = load_profile_of([[[4, 4, 2, 2, 2, 2], [0] * 6]], MODEL)
    assert check(problem(profile=profile, max_par=1.0), plan()) == []


def test_the_load_cap_is_not_judged_on_a_plan_that_is_broken_anyway() -> None:
    assert codes(check(problem(max_par=1.0), plan(with_slot(0, 7, 0)))) == ["same-rank-replicas"]


@pytest.mark.parametrize(
    ("bad", "text"),
    [
        (plan([[*row, 2] for row in ROWS]), "9 slots do not divide over 4 ranks"),
        (plan([[], []]), "0 slots do not divide"),
        (plan(moe_layers=(0,)), "2 rows, but plan.moe_layers names 1 layers"),
        (plan(with_slot(0, 2, 6)), "slot 2 has expert 6"),
        (plan(with_slot(0, 2, 2**62)), "slot 2 has expert"),
        (plan(with_slot(0, 2, -2)), "slot 2 has expert -2"),
        (plan(with_slot(0, 2, 3)), "expert 2 has no slot"),
        (plan(with_slot(0, 2, -1)), "expert 2 has no slot"),
    ],
)
def test_plans_that_would_lose_tokens_cannot_be_run(bad: Plan, text: str) -> None:
    with pytest.raises(ViolationError) as caught:
        assert_runnable(bad)
    assert text in str(caught.value)
    assert "placer check" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_engines_refuse_but_tokens_survive_can_be_run() -> None:
    assert_runnable(plan(with_slot(0, 7, -1)))
    assert_runnable(plan(with_slot(0, 7, 0)))


def legal(rows: np.ndarray, experts: int, ranks: int) -> bool:
    """Every expert in every layer, no id beyond them, none twice on a rank; in plain Python."""
    for row in rows.tolist():
        width = len(row) // ranks
        blocks = [row[rank * width : (rank + 1) * width] for rank in range(ranks)]
        if set(row) != set(range(experts)) or any(len(set(block)) != len(block) for block in blocks):
            return False
    return True


@settings(max_examples=150, deadline=None)
@given(case=cases(), data=st.data())
def test_agrees_with_a_plain_reading_of_the_rules(case: Case, data: st.DataObject) -> None:
    """A legal plan with up to two slots changed: refused exactly where the plain reading refuses it."""
    rows = case.plan.slot_expert_LP.copy()
    experts, ranks = case.plan.num_experts, case.plan.num_ranks
    for _ in range(data.draw(st.integers(0, 2))):
        layer, slot = data.draw(st.integers(0, len(rows) - 1)), data.draw(st.integers(0, rows.shape[1] - 1))
        rows[layer, slot] = data.draw(st.integers(-1, experts))
    profile = load_profile_of(np.ones((1, len(rows), experts)), case.model)
    made = PlacementProblem(profile=profile, cluster=case.cluster, redundant=rows.shape[1] - experts)
    changed = dataclasses.replace(case.plan, slot_expert_LP=rows, replica_share_LP=None)
    assert (check(made, changed) == []) == legal(rows, experts, ranks)


@settings(max_examples=60, deadline=None)
@given(case=cases())
def test_legal_plans_with_shares_and_sets_break_no_rule(case: Case) -> None:
    profile = count_profile(case)
    redundant = case.plan.num_slots - case.plan.num_experts
    made = PlacementProblem(profile=profile, cluster=case.cluster, redundant=redundant, max_par=1e9)
    assert check(made, case.plan) == []
    assert_runnable(case.plan)
