"""The portfolio's laws: never worse than its stages, one objective, a bound that holds, and what stops it."""

import itertools
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from portfolio_stand_ins import answering, raising, stand_in_stage
from solver_problems import counts_problem, every_assignment, problem_of, random_trace

from placer.core.check import check
from placer.core.errors import InfeasibleError, SolverError
from placer.core.problem import PlacementProblem
from placer.pipeline import make_plan
from solvers import stages
from solvers.portfolio import solve_portfolio
from solvers.ranks import slots_of_ranks
from solvers.registry import SOLVERS, run_solver
from solvers.score import goal_of, score
from solvers.stages import STAGES, Stage, stages_for

LINEAR = Stage(solver="linear", kind="baseline")
LPT = Stage(solver="lpt", kind="baseline")
FAST = tuple(stage for stage in STAGES if stage.solver != "cpsat")
"""Without the solver that starts a process of its own."""


def use(monkeypatch: Any, *rows: Stage) -> None:
    monkeypatch.setattr(stages, "STAGES", rows)


def best_objective(problem: PlacementProblem) -> float:
    """The least score of all placements under the cap, by brute force (layers separate where there is no cap)."""
    experts, ranks = problem.profile.model.num_experts, problem.cluster.num_ranks
    rows = [slots_of_ranks(rank_E[None], ranks)[0] for rank_E in every_assignment(experts, ranks)]
    layers = problem.profile.model.num_sites
    scores = [score(problem, np.stack(choice)) for choice in itertools.product(rows, repeat=layers)]
    return min(scored.objective for scored in scores if scored.feasible)


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, *FAST)


@pytest.mark.usefixtures("fast")
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.integers(0, 1000),
    st.sampled_from(["per_rank", "per_node", "coherent", "per_expert"]),
    st.sampled_from([None, 1.2, 1.5]),
)
def test_never_worse_than_any_stage_that_may_replace_it(seed: int, mode: str, cap: float | None) -> None:
    problem = problem_of(random_trace(seed, experts=8), 4, nodes=2, mode=mode, max_par=cap)
    try:
        result = run_solver("auto", problem, seed=seed)
    except InfeasibleError:
        assert cap is not None
        return
    assert result.slot_expert_LP is not None
    assert result.objective_name == goal_of(problem).name
    mine = score(problem, result.slot_expert_LP, result.replica_share_LP)
    assert result.objective == mine.objective
    assert result.bound is None or result.bound <= result.objective
    rows = stages_for(problem, FAST)
    searched = any(stage.kind == "search" for stage in rows)
    for stage in rows:
        if stage.kind == "bound":
            continue
        answer = run_solver(stage.solver, problem, seed=seed)
        assert answer.slot_expert_LP is not None
        scored = score(problem, answer.slot_expert_LP)
        assert mine.feasible or not scored.feasible
        # an exact answer may lose to the promise about unseen requests, which there is under a cap only
        may_replace = {"baseline": not searched, "search": True, "exact": cap is None}[stage.kind]
        if mine.feasible == scored.feasible and may_replace:
            assert mine.objective <= scored.objective + 1e-9, stage.solver
    if mine.feasible:
        assert check(problem, make_plan(problem, result, seed)) == []


@pytest.mark.parametrize(("experts", "ranks", "redundant"), [(128, 16, 0), (384, 64, 64), (512, 32, 0)])
def test_no_size_is_without_stages(experts: int, ranks: int, redundant: int) -> None:
    """comb(128, 8) is above 10^12: a limit that stood for "any" once left such problems without a single solver."""
    problem = counts_problem(np.ones((1, experts)), ranks, redundant=redundant)
    names = [stage.solver for stage in stages_for(problem)]
    assert {"linear", "eplb", "lpt"} <= set(names)
    assert run_solver("auto", problem).slot_expert_LP is not None


def test_on_tiny_problems_it_is_optimal_and_says_so() -> None:
    """CP-SAT ends the gap; the brute force agrees."""
    problem = problem_of(random_trace(3, experts=6), 3)
    result = run_solver("auto", problem)
    assert result.stopped_by == "optimal"
    assert result.objective == pytest.approx(best_objective(problem))
    assert result.bound == pytest.approx(result.objective)
    balance = problem_of(random_trace(3, experts=6), 3, mode="per_expert")
    result = run_solver("auto", balance)
    assert (result.objective_name, result.stopped_by) == ("par", "optimal")
    assert result.objective == pytest.approx(best_objective(balance))


def test_same_seed_same_plan_and_any_solver_may_be_named(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, *FAST)
    problem = problem_of(random_trace(0, experts=8), 4)
    one, two = (run_solver("auto", problem, seed=4) for _ in range(2))
    assert np.array_equal(one.slot_expert_LP, two.slot_expert_LP)  # type: ignore[arg-type]
    assert one.solver == two.solver == "coactivation"
    assert "unseen" in one.message, "the finder's own promise is kept"


def test_the_trail_says_who_improved_what_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, *FAST)
    heard: list[str] = []
    problem = problem_of(random_trace(0, experts=8, layers=3), 4, max_par=1.3)
    result = solve_portfolio(problem, note=heard.append)
    assert tuple(heard) == result.trail
    assert all(re.search(r" after \d+\.\d s$", line) for line in heard)
    times = [float(line.split(" after ")[1][:-2]) for line in heard]
    assert times == sorted(times)
    assert heard[0].startswith("bound: 1 (capacity: ceil(k / slots)) after ")
    improved = [line for line in heard if " -> " in line and not line.startswith("bound")]
    assert improved[-1].split(" -> ")[1].startswith(f"{result.solver}: {result.objective:.4g} after ")
    for before, after in itertools.pairwise(improved):
        assert before.split(" -> ")[1].split(" after ")[0] == after.split(" -> ")[0]


def test_progress_is_of_the_whole_and_ends_once(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, *FAST)
    seen: list[float] = []
    solve_portfolio(problem_of(random_trace(0, experts=8), 4), progress=lambda done, total: seen.append(done / total))
    assert seen == sorted(seen)
    assert [share for share in seen if share >= 1] == [1.0]


def two_answers(problem: PlacementProblem) -> tuple[np.ndarray, np.ndarray]:
    """A better and a worse placement than another, both without a cap to break."""
    experts, ranks = problem.profile.model.num_experts, problem.cluster.num_ranks
    rng = np.random.default_rng(0)
    tried = [slots_of_ranks(np.stack([rng.permutation(experts) % ranks for _ in range(2)]), ranks) for _ in range(30)]
    tried.sort(key=lambda slots: score(problem, slots).objective)
    return tried[0], tried[-1]


def test_a_search_replaces_a_baseline_and_only_improvements_replace_a_search(monkeypatch: pytest.MonkeyPatch) -> None:
    """Baselines ignore unseen requests, so a search's word counts; but a feasible plan beats one above the cap."""
    problem = problem_of(random_trace(0), 3)
    good, bad = two_answers(problem)

    def winner(first_kind: str, first: np.ndarray, second_kind: str, second: np.ndarray, cap: float | None) -> Any:
        rows = (
            stand_in_stage(monkeypatch, "first", first_kind, answering(first, solver="first")),
            stand_in_stage(monkeypatch, "second", second_kind, answering(second, solver="second")),
        )
        use(monkeypatch, *rows)
        limited = problem_of(random_trace(0), 3, max_par=cap)
        return solve_portfolio(limited).solver

    assert winner("baseline", good, "search", bad, None) == "second"
    assert winner("search", bad, "baseline", good, None) == "first"
    assert winner("search", bad, "exact", good, None) == "second"
    assert winner("search", good, "search", bad, None) == "first"
    assert winner("baseline", bad, "baseline", good, None) == "second"
    assert winner("baseline", good, "exact", bad, None) == "first"
    loads = [score(problem, slots).par for slots in (good, bad)]
    heavy, light = (good, bad) if loads[0] > loads[1] else (bad, good)
    cap = (loads[0] + loads[1]) / 2
    assert winner("search", heavy, "baseline", light, cap) == "second"
    assert winner("baseline", light, "search", heavy, cap) == "first"


def test_an_exact_answer_may_not_break_what_the_search_promises_of_unseen_requests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Better on the profile and within its cap, but unseen requests would be above it; its bound counts."""
    problem = problem_of(random_trace(1, experts=8), 4)
    searched = run_solver("coactivation", replace(problem, max_par=1.108), seed=0)
    exact = run_solver("cpsat", replace(problem, max_par=1.108), seed=0)
    assert searched.slot_expert_LP is not None
    assert exact.slot_expert_LP is not None
    assert exact.objective is not None
    assert searched.objective is not None
    assert exact.objective < searched.objective - 1e-3
    proven = {"solver": "x", "bound": exact.bound, "objective_name": "ranks_touched", "stopped_by": "optimal"}
    rows = (
        stand_in_stage(monkeypatch, "first", "search", answering(searched.slot_expert_LP, solver="first")),
        stand_in_stage(monkeypatch, "second", "exact", answering(exact.slot_expert_LP, **proven)),
    )
    use(monkeypatch, *rows)
    result = solve_portfolio(replace(problem, max_par=1.108))
    assert (result.solver, result.stopped_by, result.bound) == ("first", "effort", exact.bound)
    assert any(line.startswith("second: ") and "not used: its PAR on unseen" in line for line in result.trail)
    assert solve_portfolio(problem).solver == "x", "no cap, no promise"


def test_it_stops_at_the_gap_and_not_before_a_search_has_looked(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(random_trace(0), 3)
    good, _ = two_answers(problem)
    objective = score(problem, good).objective
    never = stand_in_stage(monkeypatch, "second", "exact", raising(AssertionError("must not run")))
    proven = {"bound": 0.95 * objective, "bound_by": "x", "objective_name": "ranks_touched"}
    first = stand_in_stage(monkeypatch, "first", "search", answering(good, **proven))
    use(monkeypatch, LINEAR, first, never)
    result = solve_portfolio(problem, gap=0.051)
    assert (result.stopped_by, result.bound, result.bound_by) == ("gap", pytest.approx(0.95 * objective), "x")
    with pytest.raises(AssertionError, match="must not run"):
        solve_portfolio(problem, gap=0.049)
    # top-1 routing: every placement touches one rank, and the search still chooses which
    top_1 = problem_of(random_trace(0, top_k=1), 3)
    use(monkeypatch, LINEAR, stand_in_stage(monkeypatch, "first", "search", answering(good, solver="first")), never)
    result = solve_portfolio(top_1)
    assert (result.solver, result.stopped_by) == ("first", "optimal")


def test_a_bound_on_another_objective_is_not_one_on_this(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(random_trace(0), 3)
    good, _ = two_answers(problem)
    for name in ("par", "slowest_pair_ns"):
        stage = stand_in_stage(monkeypatch, "first", "search", answering(good, bound=1e9, objective_name=name))
        use(monkeypatch, LINEAR, stage)
        assert solve_portfolio(problem).bound == 1.0


def test_failures_are_noted_and_skipped_unless_all_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(random_trace(0), 3)
    first = stand_in_stage(monkeypatch, "first", "search", raising(SolverError("the reason")))
    second = stand_in_stage(monkeypatch, "second", "exact", answering(None, status="error", message="no time"))
    use(monkeypatch, LINEAR, first, second)
    result = solve_portfolio(problem)
    assert result.solver == "linear"
    assert any(line.startswith("first: failed (the reason)") for line in result.trail)
    assert any(line.startswith("second: no placement (no time)") for line in result.trail)
    use(monkeypatch, first, second)
    with pytest.raises(SolverError, match="the reason"):
        solve_portfolio(problem)
    use(monkeypatch, second)
    with pytest.raises(SolverError, match=r"no stage returned a placement: .*no time"):
        solve_portfolio(problem)
    broken = stand_in_stage(monkeypatch, "first", "search", raising(ZeroDivisionError("a bug")))
    use(monkeypatch, LINEAR, broken)
    with pytest.raises(ZeroDivisionError):
        solve_portfolio(problem)


def test_repeats_on_a_rank_are_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = counts_problem(np.array([[40, 3, 2, 1]]), 2, redundant=2)
    stage = stand_in_stage(monkeypatch, "first", "exact", answering(np.array([[0, 0, 1, 0, 2, 3]])))
    use(monkeypatch, LPT, stage)
    result = solve_portfolio(problem)
    assert result.solver == "lpt"
    assert any(line.startswith("first: not used, a rank holds an expert twice") for line in result.trail)


def test_an_impossible_cap_is_the_problems_own_fault() -> None:
    with pytest.raises(InfeasibleError, match="cannot be met"):
        run_solver("auto", problem_of(random_trace(0), 3, max_par=1.0001))


@pytest.mark.parametrize("compiled", [False, True])
def test_ctrl_c_returns_the_incumbent_or_goes_on_up(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    error: BaseException = KeyboardInterrupt()
    if compiled:
        error = SystemError("returned a result with an exception set")
        error.__cause__ = KeyboardInterrupt()
    problem = problem_of(random_trace(0), 3)
    first = stand_in_stage(monkeypatch, "first", "search", raising(error))
    never = stand_in_stage(monkeypatch, "second", "exact", raising(AssertionError("must not run")))
    use(monkeypatch, LINEAR, first, never)
    result = solve_portfolio(problem)
    assert (result.solver, result.stopped_by) == ("linear", "interrupt")
    use(monkeypatch, first, never)
    with pytest.raises(KeyboardInterrupt):
        solve_portfolio(problem)
    use(monkeypatch, LINEAR, stand_in_stage(monkeypatch, "first", "search", raising(SystemError("a bug"))))
    with pytest.raises(SystemError, match="a bug"):
        solve_portfolio(problem)


def test_a_search_that_is_interrupted_hands_on_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """Co-activation itself: Ctrl-C in its third annealing."""
    import solvers.touch.coactivation as coactivation

    calls = itertools.count()
    real = coactivation.better

    def interrupted(*arguments: Any) -> Any:
        if next(calls) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    problem = problem_of(random_trace(0, experts=12, layers=3), 4)
    use(monkeypatch, *FAST)
    baselines = min(score(problem, run_solver(n, problem).slot_expert_LP).objective for n in ("linear", "eplb", "lpt"))  # type: ignore[arg-type]
    monkeypatch.setattr(coactivation, "better", interrupted)
    result = solve_portfolio(problem)
    assert (result.solver, result.stopped_by) == ("coactivation", "interrupt")
    assert result.objective is not None
    assert result.objective < baselines
    assert check(problem, make_plan(problem, result, 0)) == []


def test_no_time_leaves_the_best_baseline_and_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    first = stand_in_stage(monkeypatch, "first", "search", raising(AssertionError("must not run")))
    use(monkeypatch, LINEAR, LPT, first)
    result = solve_portfolio(problem_of(random_trace(0), 3), time_limit_s=1e-9)
    assert result.stopped_by == "time_limit"
    assert result.solver in ("linear", "lpt")


def test_the_plan_to_start_from_reaches_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(random_trace(0), 3)
    good, bad = two_answers(problem)
    seen = []

    def search(problem: PlacementProblem, *, start_LP: np.ndarray, **options: Any) -> Any:
        seen.append(start_LP)
        return answering(start_LP, solver="first")(problem)

    use(monkeypatch, LINEAR, stand_in_stage(monkeypatch, "first", "search", search))
    assert solve_portfolio(problem, start_LP=bad).solver == "first"
    assert np.array_equal(seen[-1], bad), "the user's own plan, though linear may look better"
    solve_portfolio(problem, start_LP=bad[:1])
    assert np.array_equal(seen[-1], np.tile(np.arange(6), (2, 1))), "one of another shape is ignored"
    use(monkeypatch, LINEAR)
    assert solve_portfolio(problem, start_LP=good).solver == "given"


def test_every_row_names_what_exists_or_will_and_applies_somewhere() -> None:
    rows = {stage.solver for stage in STAGES}
    assert {"linear", "eplb", "lpt", "coactivation", "replicated", "cpsat"} <= rows & set(SOLVERS)
    problem = problem_of(random_trace(0, experts=8), 4)
    names = [stage.solver for stage in stages_for(problem)]
    assert names[:3] == ["linear", "eplb", "lpt"]
    assert "coactivation" in names
    assert "replicated" not in names
    replicas = [stage.solver for stage in stages_for(problem_of(random_trace(0, experts=8), 4, redundant=4))]
    assert "replicated" in replicas
    assert not {"coactivation", "cpsat"} & set(replicas)
    counts = [stage.solver for stage in stages_for(counts_problem(np.ones((1, 24)), 4))]
    assert counts == ["linear", "eplb", "lpt"]
