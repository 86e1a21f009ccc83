"""METIS, KaHIP and Mt-KaHyPar with repair: legal placements that beat contiguous blocks; an absent wheel says so.

pip install -e '.[bench]'
"""

import numpy as np
import partitioners
import pytest
from instances import OBJECTIVES
from partitioners import TOOLS, available, solve_by_partition

from placer.config import load_cluster
from placer.core.check import check
from placer.core.errors import DependencyError, UsageError
from placer.core.evaluate_profile import evaluate_profile
from placer.core.problem import PlacementProblem
from placer.pipeline.planning import make_plan
from solvers.registry import run_solver
from traces.summarize import summarize
from traces.synthetic import synthesize

tools = pytest.mark.parametrize(
    "tool",
    [
        pytest.param(tool, marks=pytest.mark.skipif(not available(tool), reason=f"{tool}: pip install -e '.[bench]'"))
        for tool in TOOLS
    ],
)


def problem(objective: str, **limits: object) -> PlacementProblem:
    trace = synthesize(
        num_layers=3, num_experts=16, top_k=2, num_tokens=3_000, num_requests=30, seed=5, affinity=0.9, coactivation=0.9
    )
    mode = OBJECTIVES[objective]  # type: ignore[index]
    return PlacementProblem(profile=summarize(trace), cluster=load_cluster("node4"), mode=mode, **limits)  # type: ignore[arg-type]


@tools
@pytest.mark.parametrize("objective", ["touched", "cut"])
def test_a_repaired_partition_is_legal_and_better_than_linear(tool: str, objective: str) -> None:
    hard = problem(objective, max_par=1.15)
    result = solve_by_partition(hard, tool)
    plan = make_plan(hard, result, 0)
    assert check(hard, plan) == []
    found = evaluate_profile(plan, hard.profile)
    linear = evaluate_profile(make_plan(hard, run_solver("linear", hard), 0), hard.profile)
    assert found.ranks_touched is not None
    assert linear.ranks_touched is not None
    assert found.kept is not None
    assert linear.kept is not None
    if objective == "touched":
        assert found.ranks_touched < linear.ranks_touched
    else:
        assert found.kept > linear.kept
    np.testing.assert_array_equal(solve_by_partition(hard, tool).slot_expert_LP, result.slot_expert_LP)


@tools
def test_replicas_are_refused(tool: str) -> None:
    with pytest.raises(UsageError, match="redundant is 4"):
        solve_by_partition(problem("touched", redundant=4), tool)


def test_an_absent_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(partitioners.TOOLS, "metis", "no_such_package")
    with pytest.raises(DependencyError, match=r"pip install -e '\.\[bench\]'"):
        solve_by_partition(problem("touched"), "metis")
