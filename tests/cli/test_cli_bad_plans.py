"""Bad input, plans: for another trace or cluster, and those that engines accept although tokens would be lost.

Exit codes: 2 usage, 3 input file, 4 mismatch, 5 infeasible, 6 violation.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bad_input_cases import (
    CLUSTER,
    ON_TRACE,
    TRACE,
    change_plan,
    rows,
    write,
    write_cluster,
    write_npz,
)
from cli_runner import placer, refused

from placer.export import EXPORTERS

# --- a plan for another trace


def test_a_plan_for_another_trace_of_the_same_shape_warns(work: Path) -> None:
    outcome = placer("check", "plan.json", "--trace", "other.safetensors", *CLUSTER)
    assert outcome.code == 0
    assert outcome.err.startswith("warning: the plan was solved for another trace (hash ")
    assert outcome.out.endswith("plan.json: legal\n")
    data = json.loads(placer("check", "plan.json", "--trace", "other.safetensors", *CLUSTER, "--json").out)
    assert len(data["warnings"]) == 1


def test_a_plan_for_another_cluster_of_the_same_shape_warns(work: Path) -> None:
    write_cluster(memory_gib=33)
    for call in (("check", "plan.json"), ("simulate", "plan.json", "-o", "new.out")):
        outcome = placer(*call, "--trace", TRACE, "--cluster", "c.yaml")
        assert outcome.code == 0
        assert "solved for another cluster" in outcome.err


@pytest.mark.parametrize("shape", [(3, 8), (2, 12)], ids=["layers", "experts"])
def test_a_plan_for_a_trace_of_another_shape_is_refused(shape: tuple[int, int], work: Path) -> None:
    layers, experts = shape
    ids = np.argsort(np.random.default_rng(0).random((40, layers, experts)), axis=2)[:, :, :2].astype(np.uint8)
    write_npz("shape.npz", expert_TLK=ids, request_id_T=np.arange(40) // 2)
    on_shape = ("--trace", "shape.npz", *CLUSTER)
    says = f"the plan has 2 MoE layers of 8 experts, the trace {layers} of {experts}"
    refused(4, "simulate", "plan.json", *on_shape, "-o", "new.out", says=says, folder=work)
    refused(4, "solve", "shape.npz", *CLUSTER, "--from", "plan.json", "-o", "new.out", says=says, folder=work)
    outcome = placer("check", "plan.json", *on_shape)
    assert (outcome.code, outcome.out) == (6, "")
    outcome = placer("check", "plan.json", *ON_TRACE, "--baseline", make_other(on_shape))
    assert (outcome.code, outcome.out) == (4, "")


def make_other(on_shape: tuple[str, ...]) -> str:
    assert placer("solve", "shape.npz", *CLUSTER, "--solver", "linear", "-o", "shape.json").code == 0
    return "shape.json"


@pytest.mark.parametrize("cluster", ["node2", "node8", "2x2", "node3"])
def test_a_plan_for_a_cluster_of_another_shape_is_refused(cluster: str, work: Path) -> None:
    on_cluster = ("--trace", TRACE, "--cluster", cluster)
    says = "the plan is for 4 ranks, 4 a node"
    refused(4, "simulate", "plan.json", *on_cluster, "-o", "new.out", says=says, folder=work)
    refused(6, "check", "plan.json", *on_cluster, says="ranks at plan.num_ranks: 4 ranks, 4 a node", folder=work)


def test_a_trace_recorded_on_more_ranks(work: Path) -> None:
    ids = np.argsort(np.random.default_rng(0).random((40, 2, 8)), axis=2)[:, :, :2].astype(np.uint8)
    write_npz("ranks.npz", expert_TLK=ids, request_id_T=np.arange(40), source_rank_T=np.arange(40) % 16)
    says = "source ranks go up to 15, the cluster has 4 ranks"
    refused(4, "solve", "ranks.npz", *CLUSTER, "-o", "new.out", says=says, folder=work)


# --- bad plans that engines accept


def changed_slot(layer: int, slot: int, value: int) -> list[list[int]]:
    result = rows()
    result[layer][slot] = value
    return result


def twice_on_a_rank() -> list[list[int]]:
    """Four redundant slots; the last rank holds one expert twice."""
    return [[row[i] for i in (0, 1, 4, 2, 3, 0, 4, 5, 1, 6, 7, 7)] for row in rows()]


BAD_PLANS: dict[str, tuple[Callable[[], dict[str, Any]], int, int, str]] = {
    # name: (changes, exit code of check, of export, what both say)
    "fewer layer rows": (lambda: {"slot_expert_LP": rows()[:1]}, 6, 6, "1 rows"),
    "more layer rows": (lambda: {"slot_expert_LP": [*rows(), rows()[0]]}, 6, 6, "3 rows"),
    "too many slots": (lambda: {"slot_expert_LP": [[*row, 0] for row in rows()]}, 6, 6, "9 slots"),
    "too few slots": (lambda: {"slot_expert_LP": [row[:4] for row in rows()]}, 6, 6, "4 slots"),
    "an expert never placed": (lambda: {"slot_expert_LP": changed_slot(1, 0, rows()[1][5])}, 6, 6, "has no slot"),
    "id out of range": (lambda: {"slot_expert_LP": changed_slot(0, 3, 8)}, 6, 6, "expert 8"),
    "id -1": (lambda: {"slot_expert_LP": changed_slot(0, 3, -1)}, 6, 6, "empty (-1)"),
    "two replicas on one rank": (lambda: {"slot_expert_LP": twice_on_a_rank()}, 6, 6, "rank 3"),
    "extra JSON key": (lambda: {"physical_to_logical_map": [[0]]}, 3, 3, "unknown field 'physical_to_logical_map'"),
}


@pytest.mark.parametrize("name", list(BAD_PLANS))
def test_bad_plans_are_refused_by_check(name: str, work: Path) -> None:
    changes, code, _, says = BAD_PLANS[name]
    change_plan(**changes())
    outcome = placer("check", "bad.json", *ON_TRACE)
    assert (outcome.code, outcome.out) == (code, "")
    assert says in outcome.err
    assert all(line.startswith("placer: ") for line in outcome.err.splitlines())


@pytest.mark.parametrize("name", list(BAD_PLANS))
@pytest.mark.parametrize("engine", list(EXPORTERS))
def test_bad_plans_are_refused_by_export(name: str, engine: str, work: Path) -> None:
    changes, _, code, says = BAD_PLANS[name]
    change_plan(**changes())
    target = f"new{EXPORTERS[engine].suffixes[0]}"
    write(target, "what was there before")
    refused(code, "export", "bad.json", "--to", engine, "-o", target, says=says, folder=work)


@pytest.mark.parametrize(
    "name", [n for n in BAD_PLANS if n not in ("two replicas on one rank", "extra JSON key")]
)  # fmt: skip
def test_bad_plans_that_would_lose_tokens_are_not_simulated(name: str, work: Path) -> None:
    """Repeated experts waste a slot but no token: EPLB's plans can be simulated."""
    changes, *_ = BAD_PLANS[name]
    change_plan(**changes())
    outcome = placer("simulate", "bad.json", *ON_TRACE, "-o", "new.out")
    assert outcome.code in (4, 6), outcome.err
    assert (outcome.out, outcome.err.count("\n")) == ("", 1)
    assert not Path("new.out").exists()


@pytest.mark.parametrize("name", [n for n in BAD_PLANS if n != "extra JSON key"])
def test_bad_plans_are_no_start_and_no_baseline(name: str, work: Path) -> None:
    changes, *_ = BAD_PLANS[name]
    change_plan(**changes())
    refused(4, "solve", TRACE, *CLUSTER, "--from", "bad.json", "-o", "new.out", folder=work)
    if name != "two replicas on one rank":
        says = "the baseline plan is not legal here: "
        refused(4, "check", "plan.json", *ON_TRACE, "--baseline", "bad.json", says=says, folder=work)
