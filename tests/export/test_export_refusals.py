"""Plans that the engines accept and serve wrongly are refused before a file exists."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plans_for_export import make_plan, plans

from placer.core.errors import ViolationError
from placer.core.model import ModelSpec, Site
from placer.core.plan import Plan
from placer.export import EXPORTERS, assert_exportable, export_plan, export_violations


def edited(plan: Plan, row: int, slot: int, expert: int) -> Plan:
    slots = plan.slot_expert_LP.copy()
    slots[row, slot] = expert
    return replace(plan, slot_expert_LP=slots)


def bad_plans() -> dict[str, tuple[Plan, ModelSpec, str]]:
    """Name of the fault -> plan, model, what the refusal must say. Legal rows: experts 0-7 on 4 ranks, 3 slots each."""
    legal = [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]] * 3
    plan, model = make_plan()
    plan = replace(plan, slot_expert_LP=np.array(legal))
    assert_exportable(plan, model)
    without_redundancy = replace(plan, slot_expert_LP=np.array([[*range(8)]] * 3))
    return {
        "fewer rows": (
            replace(plan, moe_layers=(3, 4), slot_expert_LP=plan.slot_expert_LP[:2]),
            model,
            "2 MoE layers, model 'tiny' has 3 .*lacks MoE layer 5",
        ),
        "more rows": (
            replace(plan, moe_layers=(2, 3, 4, 5), slot_expert_LP=plan.slot_expert_LP[[0, 0, 1, 2]]),
            model,
            "4 MoE layers, model 'tiny' has 3 .*names layer 2",
        ),
        "a row too few for the layers named": (
            replace(plan, slot_expert_LP=plan.slot_expert_LP[:1]),
            model,
            "1 rows but names 3 MoE layers",
        ),
        "layers out of order": (replace(plan, moe_layers=(4, 3, 5)), model, "not ascending"),
        "too few slots": (
            replace(plan, slot_expert_LP=plan.slot_expert_LP[:, :4]),
            model,
            "4 slots a layer are too few for 8 experts",
        ),
        "uneven slots": (
            replace(plan, slot_expert_LP=plan.slot_expert_LP[:, :11]),
            model,
            "11 slots a layer do not divide over 4 ranks",
        ),
        "missing expert": (edited(without_redundancy, 1, 6, 5), model, r"layer 4 \(row 1\): expert 6 has no slot"),
        "id too large": (edited(plan, 2, 9, 8), model, r"layer 5 \(row 2\): slot 9 holds expert 8; ids are 0 to 7"),
        "id negative": (edited(plan, 2, 9, -2), model, r"layer 5 \(row 2\): slot 9 holds expert -2"),
        "empty slot": (edited(plan, 0, 10, -1), model, r"layer 3 \(row 0\): slot 10 on rank 3 is empty"),
        "twice on a rank": (
            edited(plan, 1, 1, 0),
            model,
            r"layer 4 \(row 1\): expert 0 is 2 times on rank 0 \(slots \[0, 1\]\)",
        ),
        "other number of experts": (replace(plan, num_experts=7), model, "for 7 experts a layer; model 'tiny' has 8"),
        "other number of hidden layers": (replace(plan, num_hidden_layers=9), model, "for 9 hidden layers; .* has 6"),
        "fractional ids": (replace(plan, slot_expert_LP=plan.slot_expert_LP.astype(float)), model, "float64"),
        "unequal layers": (
            plan,
            replace(model, sites=(*model.sites[:2], Site(layer=5, num_experts=4))),
            "which no engine's map can name",
        ),
    }


@pytest.mark.parametrize("fault", bad_plans())
@pytest.mark.parametrize("name", EXPORTERS)
def test_a_bad_plan_is_refused_and_nothing_is_written(name: str, fault: str, tmp_path: Path) -> None:
    plan, model, says = bad_plans()[fault]
    with pytest.raises(ViolationError, match=says) as caught:
        export_plan(plan, model, name, tmp_path / f"plan{EXPORTERS[name].suffixes[0]}")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_the_message_shows_three_violations_and_counts_the_rest() -> None:
    plan, model = make_plan()
    with pytest.raises(ViolationError, match=r"; and \d+ more$") as caught:
        assert_exportable(replace(plan, slot_expert_LP=np.full((3, 12), 99)), model)
    assert str(caught.value).count("holds expert 99") == 3


@settings(max_examples=200, deadline=None)
@given(made=plans(), data=st.data())
def test_one_changed_slot_is_refused_exactly_when_the_layer_is_no_longer_legal(
    made: tuple[Plan, ModelSpec], data: st.DataObject
) -> None:
    plan, model = made
    assert_exportable(plan, model)
    row = data.draw(st.integers(0, model.num_sites - 1))
    slot = data.draw(st.integers(0, plan.num_slots - 1))
    changed = edited(plan, row, slot, data.draw(st.integers(-1, model.num_experts)))
    held = np.split(changed.slot_expert_LP[row], plan.num_ranks)
    legal = all(len(set(rank.tolist())) == len(rank) for rank in held) and set(
        changed.slot_expert_LP[row].tolist()
    ) == set(range(model.num_experts))
    assert (not list(export_violations(changed, model))) == legal
