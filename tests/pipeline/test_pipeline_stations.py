"""The arrow's stations as a program calls them: what each hands on, and what it refuses.

Legend: L sites, P slots, E experts, T tokens.
"""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from placer.config import load_cluster
from placer.config.settings import ProfileSettings, SolveSettings
from placer.core.check import check
from placer.core.cluster import ClusterSpec
from placer.core.errors import (
    InfeasibleError,
    InputFileError,
    MismatchError,
    RegressionError,
    SolverError,
    UsageError,
    ViolationError,
)
from placer.core.evaluate import evaluate
from placer.core.model import ModelSpec
from placer.core.problem import PlacementProblem
from placer.pipeline import (
    CheckReport,
    check_plan,
    judge,
    make_plan,
    model_of_plan,
    open_source,
    open_trace,
    predict,
    profile_of,
    solve,
    sources_of,
    warn_mismatch,
)
from solvers.result import SolveResult
from traces.counts import LoadCounts
from traces.profile_store import save_profile
from traces.store import save_trace
from traces.synthetic import synthesize
from traces.trace import RoutingTrace

NODE4: ClusterSpec = load_cluster("node4")


def make_trace(*, layers: int = 2, experts: int = 8, seed: int = 1, source_ranks: int = 0) -> RoutingTrace:
    return synthesize(
        num_layers=layers, num_experts=experts, top_k=2, num_tokens=400, num_requests=20, seed=seed,
        popularity_sigma=0.4, source_ranks=source_ranks,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trace() -> RoutingTrace:
    return make_trace()


def linear(trace: RoutingTrace, **options: Any) -> Any:
    return solve(trace, NODE4, solver="linear", max_par=None, **options)


def test_solve_hands_on_the_problem_that_it_solved(trace: RoutingTrace) -> None:
    settings = SolveSettings(replica_choice="token_hash", batch_tokens=128)
    options = {"redundant": 4, "max_par": 1.5, "seed": 3, "mode": "per_node", "solver": "lpt"}
    solved = solve(trace, NODE4, solve_settings=settings, **options)
    assert solved.problem.hashes() == solved.plan.hashes
    assert solved.plan.hashes["trace"] == trace.sha256
    assert (solved.problem.redundant, solved.problem.max_par, solved.problem.batch_tokens) == (4, 1.5, 128)
    assert (solved.plan.mode, solved.plan.replica_choice, solved.plan.seed) == ("per_node", "token_hash", 3)
    assert (solved.plan.moe_layers, solved.plan.num_hidden_layers) == ((0, 1), 2)
    assert solved.plan.num_slots == 12
    assert check(solved.problem, solved.plan) == []
    assert set(solved.evaluation.iteration_us) == {"per_node"}


@pytest.mark.parametrize(("max_par", "wanted"), [(None, None), (float("inf"), None), (2.5, 2.5)])
def test_the_cap_that_is_given_is_the_cap(max_par: float | None, wanted: float | None, trace: RoutingTrace) -> None:
    assert solve(trace, NODE4, max_par=max_par, solver="lpt").problem.max_par == wanted


def test_the_cap_left_out_is_one_point_one_or_above_what_is_proven() -> None:
    assert linear(make_trace(), mode="per_rank").problem.max_par is None
    even = LoadCounts(model=ModelSpec.uniform("x", num_experts=8, top_k=1, num_hidden_layers=1),
                      load_WLE=np.full((1, 1, 8), 10))  # fmt: skip
    assert solve(even, NODE4).problem.max_par == 1.10
    hot = dataclasses.replace(even, load_WLE=np.array([[[40, 4, 4, 4, 4, 4, 4, 4]]]))
    # the hottest expert shares its rank with the lightest: 44 of a mean of 17
    assert solve(hot, NODE4).problem.max_par == pytest.approx(1.05 * 44 / 17, abs=1e-4)


@pytest.mark.parametrize("seed", [-1, 1.0, True, "1", None])
def test_seeds_are_whole_numbers(seed: Any, trace: RoutingTrace) -> None:
    with pytest.raises(UsageError, match="seed is"):
        solve(trace, NODE4, seed=seed)


def test_allgather_is_warned_about(trace: RoutingTrace) -> None:
    assert any("balance only" in warning for warning in linear(trace, mode="allgather").warnings)
    assert linear(trace).warnings == ()


def test_baselines_may_miss_the_cap_and_say_so(trace: RoutingTrace) -> None:
    solved = solve(trace, NODE4, solver="linear", max_par=1.0001)
    assert [warning.split(" ")[0] for warning in solved.warnings] == ["max-par"]
    with pytest.raises(InfeasibleError, match="raise --max-par"):
        solve(trace, NODE4, solver="lpt", max_par=1.0)


def test_results_without_a_placement_become_errors(trace: RoutingTrace) -> None:
    problem = PlacementProblem(profile=profile_of(trace, ProfileSettings()), cluster=NODE4)
    for status, error in (("infeasible", InfeasibleError), ("error", SolverError)):
        result = SolveResult(solver="x", status=status, stopped_by=status, message="the reason")  # type: ignore[arg-type]
        with pytest.raises(error, match="x: the reason"):
            make_plan(problem, result, 0)


def test_an_illegal_result_of_a_solver_is_the_solvers_error(trace: RoutingTrace, monkeypatch: Any) -> None:
    import placer.pipeline.planning as planning

    def lose_an_expert(name: str, problem: PlacementProblem, **options: Any) -> SolveResult:
        slots = np.zeros((2, problem.num_slots), dtype=np.int64)
        return SolveResult(solver="lpt", status="solved", stopped_by="effort", slot_expert_LP=slots)

    monkeypatch.setattr(planning, "run_solver", lose_an_expert)
    with pytest.raises(SolverError, match="lpt returned an illegal plan: missing-expert"):
        solve(trace, NODE4, solver="lpt")


def test_layers_that_were_never_routed_are_refused() -> None:
    trace = make_trace()
    ids = trace.expert_LTK.copy()
    ids[1] = 255
    with pytest.raises(UsageError, match=r"layer\(s\) \[1\]"):
        solve(dataclasses.replace(trace, expert_LTK=ids, known_sha256=""), NODE4)


def test_a_plan_to_start_from_must_fit(trace: RoutingTrace) -> None:
    start = linear(trace).plan
    assert solve(trace, NODE4, current=start, max_par=None).plan.num_slots == 8
    with pytest.raises(MismatchError, match="start from is not legal here: slots"):
        solve(trace, NODE4, current=start, redundant=4, max_par=None)
    with pytest.raises(MismatchError, match="the plan is for 4 ranks, 4 a node; cluster '2x2' has 4, 2 a node"):
        solve(trace, load_cluster("2x2"), current=start, max_par=None)


def test_a_plan_to_start_from_of_another_trace_is_warned_about(trace: RoutingTrace) -> None:
    start = linear(make_trace(seed=9)).plan
    assert warn_mismatch(start, trace.model, NODE4, trace.sha256)
    assert warn_mismatch(start, trace.model, NODE4) == []
    assert len(warn_mismatch(start, dataclasses.replace(trace.model, hidden_size=8), NODE4)) == 1
    assert len(warn_mismatch(start, trace.model, dataclasses.replace(NODE4, memory_gib=1))) == 1


@pytest.mark.parametrize("window_tokens", [16, 64, 1000])
def test_judge_replays_a_trace_and_counts_a_profile_alike(window_tokens: int, trace: RoutingTrace) -> None:
    plan = linear(trace).plan
    exact = judge(plan, trace, NODE4, SolveSettings(batch_tokens=50), window_tokens=window_tokens)
    assert exact == evaluate(
        plan, trace.model, NODE4, trace.expert_LTK, sources_of(trace, 4), window_tokens=window_tokens, batch_tokens=50
    )
    counted = judge(plan, profile_of(trace, ProfileSettings(window_tokens=window_tokens)), NODE4)
    for field in dataclasses.fields(counted):
        assert getattr(counted, field.name) == pytest.approx(getattr(exact, field.name), abs=1e-12), field.name


def test_source_ranks_are_the_traces_own_or_dealt_by_request() -> None:
    dealt = sources_of(make_trace(), 3)
    assert dealt.tolist() == [request % 3 for request in make_trace().request_id_T.tolist()]
    own = make_trace(source_ranks=4)
    assert sources_of(own, 4).tolist() == own.source_rank_T.tolist()
    assert sources_of(own, 8).tolist() == own.source_rank_T.tolist()
    with pytest.raises(MismatchError, match="go up to 3, the cluster has 2 ranks"):
        sources_of(own, 2)


def broken(plan: Any, row: int = 0, slot: int = 0, expert: int = 7) -> Any:
    rows = plan.slot_expert_LP.copy()
    rows[row, slot] = expert
    return dataclasses.replace(plan, slot_expert_LP=rows)


def test_broken_plans_are_neither_judged_nor_simulated(trace: RoutingTrace) -> None:
    plan = linear(trace).plan
    for bad in (broken(plan), broken(plan, expert=99), broken(plan, expert=-5)):
        with pytest.raises(ViolationError, match="cannot be run"):
            judge(bad, trace, NODE4)
        with pytest.raises(ViolationError, match="cannot be run"):
            predict(bad, trace, NODE4)


def test_predict_at_port_is_what_judge_says(trace: RoutingTrace) -> None:
    plan = linear(trace).plan
    timeline, warnings = predict(plan, trace, NODE4, fidelity="port", batch_tokens=64)
    judged = judge(plan, trace, NODE4, SolveSettings(batch_tokens=64))
    assert timeline.iteration_ns().mean() / 1e3 == pytest.approx(judged.iteration_us["per_rank"])
    assert warnings == []
    assert timeline.about["trace_sha256"] == trace.sha256


def test_check_plan_reports_rules_and_raises_for_them(trace: RoutingTrace) -> None:
    plan = linear(trace).plan
    fine = check_plan(plan, trace, NODE4)
    fine.raise_for_status()
    assert (fine.violations, fine.regressions, fine.warnings) == ((), (), ())
    bad = check_plan(broken(plan), trace, NODE4)
    assert {violation.code for violation in bad.violations} >= {"missing-expert"}
    assert bad.evaluation is None
    with pytest.raises(ViolationError, match="missing-expert at layer 0"):
        bad.raise_for_status()


def test_check_plan_names_numbers_of_slots_that_no_problem_has(trace: RoutingTrace) -> None:
    plan = linear(trace).plan
    for rows in (plan.slot_expert_LP[:, :4], plan.slot_expert_LP[:, :0], np.tile(plan.slot_expert_LP, (1, 5)),
                 np.hstack([plan.slot_expert_LP, [[0], [0]]])):  # fmt: skip
        report = check_plan(dataclasses.replace(plan, slot_expert_LP=rows), trace, NODE4)
        assert [violation.code for violation in report.violations] == ["slots"], rows.shape


def test_check_plan_calls_too_little_memory_a_violation(trace: RoutingTrace) -> None:
    report = check_plan(linear(trace).plan, trace, dataclasses.replace(NODE4, memory_gib=0.01))
    assert [violation.code for violation in report.violations] == ["memory"]


def test_regressions_by_hand(trace: RoutingTrace) -> None:
    """A plan against itself never regresses; linear against the balanced one does, as far as its PAR is worse."""
    bad, good = linear(trace).plan, solve(trace, NODE4, solver="lpt", max_par=None).plan
    assert check_plan(bad, trace, NODE4, baseline=bad, max_regression=0.0).regressions == ()
    before, after = judge(good, trace, NODE4), judge(bad, trace, NODE4)
    worse = after.par / before.par - 1
    assert worse > 0.01
    report = check_plan(bad, trace, NODE4, baseline=good, max_regression=worse - 1e-6)
    assert any(
        line.startswith(f"par is {after.par:.4g}, the baseline has {before.par:.4g}") for line in report.regressions
    )
    with pytest.raises(RegressionError):
        report.raise_for_status()
    report = check_plan(bad, trace, NODE4, baseline=good, max_regression=worse + 1e-6)
    assert not any(line.startswith("par ") for line in report.regressions)


def test_each_finding_is_a_line_of_its_own() -> None:
    report = CheckReport(violations=(), regressions=("one", "two"))
    with pytest.raises(RegressionError) as caught:
        report.raise_for_status()
    assert f"placer: {caught.value}".splitlines() == ["placer: one", "placer: two"]


def test_a_broken_baseline_is_the_users_mismatch(trace: RoutingTrace) -> None:
    plan = linear(trace).plan
    with pytest.raises(MismatchError, match="baseline plan is not legal here: missing-expert"):
        check_plan(plan, trace, NODE4, baseline=broken(plan))
    few = dataclasses.replace(plan, slot_expert_LP=plan.slot_expert_LP[:, :4])
    with pytest.raises(MismatchError, match="baseline plan is not legal here: slots"):
        check_plan(plan, trace, NODE4, baseline=few)


def test_the_model_of_a_plan(trace: RoutingTrace) -> None:
    plan = linear(trace).plan
    assert model_of_plan(plan, trace.model) is trace.model
    remembered = model_of_plan(plan)
    assert (remembered.num_experts, remembered.moe_layers, remembered.num_hidden_layers) == (8, (0, 1), 2)
    with pytest.raises(MismatchError, match="the plan 8 in 2; give the plan's model or leave it out"):
        model_of_plan(plan, make_trace(layers=3).model)
    with pytest.raises(UsageError, match="give --model"):
        model_of_plan(dataclasses.replace(plan, num_hidden_layers=None))


def test_sources_are_recognised_by_content(trace: RoutingTrace, tmp_path: Path) -> None:
    save_trace(trace, tmp_path / "one.bin")
    save_profile(profile_of(trace, ProfileSettings()), tmp_path / "two.bin")
    (tmp_path / "three.bin").write_text('{"logical_count": [[1, 2], [3, 4]]}')
    kinds = [type(open_source(tmp_path / f"{name}.bin")).__name__ for name in ("one", "two", "three")]
    assert kinds == ["RoutingTrace", "Profile", "LoadCounts"]
    assert open_trace(tmp_path / "one.bin").sha256 == trace.sha256
    for name in ("two", "three"):
        with pytest.raises(InputFileError, match="holds load counts only"):
            open_trace(tmp_path / f"{name}.bin")
    with pytest.raises(InputFileError, match="does not exist"):
        open_source(tmp_path / "four.bin")
    with pytest.raises(InputFileError, match="File name too long"):
        open_source(tmp_path / ("x" * 300))


def test_profiles_and_counts_are_taken_as_they_are(trace: RoutingTrace) -> None:
    profile = profile_of(trace, ProfileSettings(window_tokens=100))
    assert len(profile.load_WLE) == 4
    assert profile_of(profile, ProfileSettings(window_tokens=7)) is profile
    counts = LoadCounts(model=trace.model, load_WLE=profile.load_WLE)
    np.testing.assert_array_equal(profile_of(counts, ProfileSettings()).load_WLE, profile.load_WLE)
