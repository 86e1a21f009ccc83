"""PlacementProblem: what is infeasible says what would do, and that does.

Legend: E experts, R ranks.
"""

import dataclasses
import re
from typing import Any

import numpy as np
import pytest
from core_cases import load_profile_of, make_cluster, make_model
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import InfeasibleError, UsageError
from placer.core.model import ModelSpec, Site
from placer.core.modes import DISPATCH_MODES, REPLICA_CHOICES
from placer.core.problem import PlacementProblem


def problem(experts: int = 8, ranks: int = 4, **changes: Any) -> PlacementProblem:
    model = changes.pop("model", make_model(2, experts))
    cluster = changes.pop("cluster", make_cluster(1, ranks))
    profile = load_profile_of(np.ones((1, model.num_sites, model.num_experts)), model)
    return PlacementProblem(profile=profile, cluster=cluster, **changes)


@settings(max_examples=200, deadline=None)
@given(experts=st.integers(1, 40), ranks=st.integers(1, 24), redundant=st.integers(0, 900))
def test_the_redundancy_that_a_refusal_names_works(experts: int, ranks: int, redundant: int) -> None:
    """In one step: the number named is never refused in turn. Refused are just the numbers no plan can have."""
    slots = experts + redundant
    possible = slots % ranks == 0 and slots <= experts * ranks
    try:
        made = problem(experts, ranks, redundant=redundant)
    except InfeasibleError as error:
        message = str(error)
        assert not possible
        named = int(re.search(r"--redundant (\d+)", message)[1])
        mended = problem(experts, ranks, redundant=named)
        assert mended.num_slots == experts + named
        if "at most" not in message:
            assert redundant < named < redundant + ranks
        return
    assert possible
    assert made.num_slots == slots == made.slots_per_rank * ranks


@pytest.mark.parametrize(
    ("experts", "ranks", "redundant", "text"),
    [
        (8, 3, 0, "8 experts + 0 redundant = 8 slots do not divide over 3 ranks; use --redundant 1"),
        (8, 4, 3, "8 experts + 3 redundant = 11 slots do not divide over 4 ranks; use --redundant 4"),
        (4, 8, 0, "4 experts + 0 redundant = 4 slots do not divide over 8 ranks; use --redundant 4"),
        (4, 2, 6, "10 slots on 2 ranks but only 4 experts"),
        (4, 2, 5, "use at most --redundant 4"),
    ],
)
def test_slots_that_no_plan_can_have(experts: int, ranks: int, redundant: int, text: str) -> None:
    with pytest.raises(InfeasibleError) as caught:
        problem(experts, ranks, redundant=redundant)
    assert text in str(caught.value)


def test_more_experts_than_memory_and_each_mend() -> None:
    """2 layers of 8 experts of 1 MiB on 4 ranks: 4 MiB a rank."""
    model = make_model(2, 8, hidden_size=512, moe_intermediate_size=512, matrices_per_expert=2)
    assert model.expert_bytes == 2**20
    exact = make_cluster(1, 4, memory_gib=4 / 1024)
    assert problem(model=model, cluster=exact).slots_per_rank == 2
    short = make_cluster(1, 4, memory_gib=3.9 / 1024)
    with pytest.raises(InfeasibleError) as caught:
        problem(model=model, cluster=short)
    message = str(caught.value)
    assert message.startswith("2 slots x 2 layers x 1.0 MiB = 0.0 GiB of experts a rank, but toy has 0.00380859 GiB")
    assert message.endswith("use more ranks, fewer redundant slots or smaller weights")
    problem(model=model, cluster=dataclasses.replace(short, ranks_per_node=8))
    problem(model=dataclasses.replace(model, weight_bytes=1.0), cluster=short)
    with pytest.raises(InfeasibleError, match="3 slots x 2 layers"):
        problem(model=model, cluster=exact, redundant=4)
    problem(model=model, cluster=exact, redundant=0)


@pytest.mark.parametrize(
    "sites",
    [
        (Site(layer=0, num_experts=8), Site(layer=1, num_experts=4)),
        (Site(layer=0, num_experts=8, module="attn"),),
        (Site(layer=0, num_experts=8), Site(layer=0, num_experts=8, round=1)),
        (Site(layer=0, num_experts=8), Site(layer=1, num_experts=8, pool=0)),
    ],
)
def test_models_that_engines_cannot_place(sites: tuple[Site, ...]) -> None:
    model = dataclasses.replace(make_model(2, 8), sites=sites)
    with pytest.raises(InfeasibleError, match="unequal, shared or non-feed-forward experts"):
        problem(model=model)
    plain = tuple(site for site in sites if site == Site(layer=site.layer, num_experts=8))
    if plain:
        problem(model=dataclasses.replace(model, sites=plain))


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"mode": "flood"}, "mode is 'flood'; use one of per_expert"),
        ({"replica_choice": "best"}, "replica_choice is 'best'; use one of visit_first"),
        ({"redundant": -1}, "redundant is -1; give 0 or more"),
        ({"redundant": 4.0}, "redundant is 4.0"),
        ({"redundant": True}, "redundant is True"),
        ({"batch_tokens": 0}, "batch_tokens is 0; give 1 or more"),
        ({"batch_tokens": 1.5}, "batch_tokens is 1.5"),
        ({"max_par": 0.99}, "max_par is 0.99"),
        ({"max_par": -1}, "max_par is -1"),
        ({"max_par": float("nan")}, "max_par is nan"),
    ],
)
def test_values_that_make_no_sense(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(UsageError) as caught:
        problem(**changes)
    assert text in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_mode_and_choice_named_by_a_refusal_works() -> None:
    for name, known in (("mode", DISPATCH_MODES), ("replica_choice", REPLICA_CHOICES)):
        with pytest.raises(UsageError) as caught:
            problem(**{name: "x"})
        named = str(caught.value).split("use one of ")[1].split(", ")
        assert named == list(known)
        for value in named:
            problem(**{name: value})


def test_the_hashes_tell_problems_apart() -> None:
    base = problem()
    assert base.hashes() == problem().hashes()
    assert set(base.hashes()) == {"trace", "model", "cluster", "limits"}
    changes: list[dict[str, Any]] = [
        {"mode": "per_node"}, {"redundant": 4}, {"max_par": 1.1}, {"replica_choice": "nearest"}, {"batch_tokens": 1},
        {"allow_empty_slots": True},
    ]  # fmt: skip
    limits = {problem(**change).hashes()["limits"] for change in changes}
    assert len(limits | {base.hashes()["limits"]}) == len(changes) + 1
    other = problem(cluster=make_cluster(2, 2))
    assert other.hashes()["cluster"] != base.hashes()["cluster"]
    assert other.hashes()["model"] == base.hashes()["model"]
    assert problem(model=make_model(2, 8, hidden_size=11)).hashes()["model"] != base.hashes()["model"]


def test_a_model_of_one_layer_of_one_expert() -> None:
    made = problem(model=ModelSpec.uniform("one", num_experts=1, top_k=1, num_hidden_layers=1), ranks=1)
    assert (made.num_slots, made.slots_per_rank) == (1, 1)
