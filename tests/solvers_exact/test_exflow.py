"""ExFlow's program in its forms and back ends against brute force, its stages and increments."""

import itertools
from typing import Any

import numpy as np
import pulp
import pytest
from exact_problems import equal_placements, make_cluster, make_problem, random_trace, rank_LE
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import SolverError, UsageError
from placer.core.plan import canonical_slots
from placer.core.problem import PlacementProblem
from solvers.exact.isolate import IsolationTimeoutError
from solvers.exact.pulp_run import run_program, value_of
from solvers.papers import exflow
from solvers.papers.exflow import solve_exflow, solve_exflow_staged
from solvers.papers.exflow_model import Settings, Terms, _named, _program, _values, count_rows, cut_of, search_parts
from solvers.papers.exflow_stages import increments_of, largest_program, mean_hops, search_paths, search_stages

BACKENDS = ["cpsat", "highs", "cbc"]
FORMS = ["per_token", "aggregated", "colocation"]


def paths(layers: int, tokens: int, experts: int, seed: int) -> np.ndarray:
    return random_trace(layers, tokens, 1, experts, seed)[:, :, 0].T


def crossings(path_TL: np.ndarray, part_LE: np.ndarray) -> int:
    """Token by token, as the paper counts."""
    return sum(
        int(part_LE[layer, path[layer]] != part_LE[layer + 1, path[layer + 1]])
        for path in path_TL.tolist()
        for layer in range(len(path) - 1)
    )


def least_crossings(weight_LEE: np.ndarray, experts: int, parts: int) -> int:
    """The optimum by enumeration of equal parts in every layer."""
    one_layer = np.array(list(equal_placements(experts, parts)))
    best = np.zeros(len(one_layer), dtype=np.int64)
    for weight_EE in weight_LEE:
        apart_BB = one_layer[:, None, :, None] != one_layer[None, :, None, :]
        best = (best[:, None] + (apart_BB * weight_EE).sum(axis=(2, 3))).min(axis=0)
    return int(best.min())


def problem_of(layers: int, experts: int, ranks: int, seed: int, **more: Any) -> PlacementProblem:
    nodes = more.pop("nodes", 1)
    trace = random_trace(layers, 100, more.pop("top_k", 2), experts, seed)
    return make_problem(trace, num_experts=experts, cluster=make_cluster(ranks, nodes=nodes), **more)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=3, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(3, 4, 2), (2, 6, 3), (2, 6, 2), (2, 4, 4)]),
    tokens=st.integers(0, 60),
)
def test_tokens_counts_and_colocation_have_one_optimum(
    backend: str, seed: int, shape: tuple[int, int, int], tokens: int
) -> None:
    layers, experts, parts = shape
    path_TL = paths(layers, tokens, experts, seed)
    terms = Terms.of_paths(path_TL)
    best = least_crossings(terms.weights(layers, experts), experts, parts)
    for form in FORMS:
        found = search_parts(terms, layers, experts, parts, Settings(backend=backend, form=form), 60.0)
        assert (found.state, found.cost, found.bound) == ("optimal", best, best), form
        assert crossings(path_TL, found.part_LE) == best
        assert all(np.bincount(row).tolist() == [experts // parts] * parts for row in found.part_LE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_hundred_tokens(backend: str) -> None:
    path_TL = paths(3, 200, 4, 11)
    terms = Terms.of_paths(path_TL)
    best = least_crossings(terms.weights(3, 4), 4, 2)
    for form in FORMS:
        found = search_parts(terms, 3, 4, 2, Settings(backend=backend, form=form), 60.0)
        assert (found.cost, found.bound) == (best, best)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(3, 4, 2), (2, 6, 3), (1, 4, 2), (2, 4, 4)]),
    form=st.sampled_from(FORMS),
)
def test_every_placement_satisfies_the_program_and_costs_its_cut(
    seed: int, shape: tuple[int, int, int], form: str
) -> None:
    layers, experts, parts = shape
    terms = Terms.of_paths(paths(layers, 30, experts, seed))
    rng = np.random.default_rng(seed)
    part_LE = rng.permuted(np.tile(np.arange(experts) % parts, (layers, 1)), axis=1)
    program = _program(terms, layers, experts, parts, form)
    value_V = _values(program, terms, _named(part_LE), form)
    for least, most, factors in program.rows:
        total = sum(factor * value_V[v] for factor, v in factors)
        assert least is None or total >= least
        assert most is None or total <= most
    assert not any(value_V[v] for v in program.zero)
    assert program.offset + value_V @ np.array(program.cost_V) == cut_of(terms, part_LE)
    assert count_rows(terms, layers, experts, parts, form) == len(program.rows)


def test_all_pairs_of_a_token_are_the_paper_s_one_at_top_1() -> None:
    trace = random_trace(3, 80, 1, 6, 2)
    problem = make_problem(trace, num_experts=6, cluster=make_cluster(2))
    assert np.array_equal(Terms.of_paths(trace[:, :, 0].T).weights(3, 6), problem.profile.transition_LEE)
    trace = random_trace(3, 80, 2, 6, 2)
    pairs = sum(
        Terms.of_paths(np.stack([trace[layer, :, k], trace[layer + 1, :, m]], axis=1)).weights(2, 6)
        for layer, k, m in itertools.product([0], range(2), range(2))
    )
    problem = make_problem(trace, num_experts=6, cluster=make_cluster(2))
    assert np.array_equal(pairs[0], problem.profile.transition_LEE[0])


def test_a_token_without_an_expert_makes_no_transition() -> None:
    terms = Terms.of_paths(np.array([[0, -1, 1], [0, 1, -1], [1, 1, 0]]))
    assert terms.weights(3, 2).tolist() == [[[0, 1], [0, 1]], [[0, 0], [1, 0]]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", ["aggregated", "colocation"])
def test_never_worse_than_its_start(backend: str, form: str) -> None:
    """A limit in which nothing is found by itself, and a start with other names than the program's."""
    weight_LEE = np.random.default_rng(5).integers(1, 100, size=(3, 8, 8))
    terms = Terms.of_weights(weight_LEE)
    start_LE = 3 - np.tile(np.arange(8) // 2, (4, 1))
    found = search_parts(terms, 4, 8, 4, Settings(backend=backend, form=form), 0.05, start_LE)
    assert found.bound <= found.cost == cut_of(terms, found.part_LE) <= cut_of(terms, start_LE)


@pytest.mark.parametrize("backend", ["highs", "cbc"])
def test_pulp_s_back_ends_take_the_start(backend: str) -> None:
    """A market split: its one solution is seen at once when handed over, and not found in seconds by itself."""
    rng = np.random.default_rng(0)
    factor_RV, planted_V = rng.integers(0, 1000, size=(4, 30)), rng.integers(0, 2, size=30)
    program = pulp.LpProblem("market_split", pulp.LpMinimize)
    x = [program.add_variable(f"x{v:02}", cat=pulp.LpBinary) for v in range(30)]
    program += 0 * x[0]
    for factor_V in factor_RV:
        program += pulp.lpSum(int(f) * v for f, v in zip(factor_V, x, strict=True)) == int(factor_V @ planted_V)
    for variable, value in zip(x, planted_V.tolist(), strict=True):
        variable.setInitialValue(value)
    state, _ = run_program(program, backend, 0.0, 5.0, warm_start=True)
    assert state == "optimal"
    assert [round(value_of(variable)) for variable in x] == planted_V.tolist()


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10**6), stages=st.sampled_from([(2, 2), (2, 4), (4, 2), (8,)]))
def test_stages_refine_an_optimal_first_stage(seed: int, stages: tuple[int, ...]) -> None:
    ranks = int(np.prod(stages))
    terms = Terms.of_paths(paths(2, 80, 8, seed))
    answer = search_stages([terms], 2, 8, stages, Settings(), 60.0)
    assert answer.proven == answer.subproblems == (1 if len(stages) == 1 else 1 + stages[0])
    assert all(np.bincount(row).tolist() == [8 // ranks] * ranks for row in answer.rank_LE)
    first_LE = answer.rank_LE // (ranks // stages[0])
    best = search_parts(terms, 2, 8, stages[0], Settings(), 60.0).cost
    assert cut_of(terms, first_LE) == best == answer.bound
    # inside each part nothing better was left: transitions that left it count in no sub-problem
    inside = cut_of(terms, answer.rank_LE) - best
    alone = 0
    for part in range(stages[0] if len(stages) > 1 else 0):
        member_LN = np.array([np.flatnonzero(row == part) for row in first_LE])
        weight_LNN = terms.within(member_LN, 8).weights(2, member_LN.shape[1])
        alone += least_crossings(weight_LNN, member_LN.shape[1], stages[1])
    assert inside == alone
    joint = search_parts(terms, 2, 8, ranks, Settings(), 60.0).cost
    assert answer.bound <= joint <= cut_of(terms, answer.rank_LE)


def test_members_are_renumbered_by_place() -> None:
    terms = Terms.of_weights(np.arange(16).reshape(1, 4, 4))
    inside = terms.within(np.array([[1, 3], [0, 2]]), 4)
    assert inside.weights(2, 2).tolist() == [[[4, 6], [12, 14]]]


def test_increments_end_at_the_whole() -> None:
    weight_LEE = np.random.default_rng(1).integers(0, 50, size=(2, 4, 4))
    chunks = increments_of(weight_LEE, 3, seed=0)
    sums = [chunk.weights(3, 4) for chunk in chunks]
    assert np.array_equal(sums[-1], weight_LEE)
    assert all((before <= after).all() for before, after in itertools.pairwise(sums))
    assert 0 < sums[0].sum() < sums[1].sum() < sums[2].sum()
    again = [chunk.weights(3, 4) for chunk in increments_of(weight_LEE, 3, seed=0)]
    assert all(map(np.array_equal, sums, again))


@pytest.mark.parametrize("form", FORMS)
def test_token_increments_have_the_optimum_of_all_tokens(form: str) -> None:
    path_TL = paths(3, 90, 4, 7)
    found = search_paths([path_TL[:30], path_TL[30:60], path_TL[60:]], 4, 2, Settings(form=form), 60.0)
    best = least_crossings(Terms.of_paths(path_TL).weights(3, 4), 4, 2)
    assert found.cost == found.bound == crossings(path_TL, found.part_LE) == best


def test_hops_by_hand() -> None:
    weight_LEE = np.array([[[5, 1, 1, 0], [0, 2, 0, 0], [0, 0, 0, 0], [1, 0, 0, 0]]])
    rank_of = np.array([[0, 1, 2, 3], [0, 1, 2, 3]])
    # 7 stay; 0 -> 1 within the node; 0 -> 2 and 3 -> 0 across nodes
    assert mean_hops(weight_LEE, rank_of, np.array([0, 0, 1, 1])) == pytest.approx((1 + 2 + 2) / 10)


@pytest.mark.parametrize("backend", BACKENDS)
def test_through_the_child_process(backend: str) -> None:
    problem = problem_of(3, 6, 2, 3, max_par=1.0)
    result = solve_exflow(problem, time_limit_s=60, backend=backend)
    assert (result.status, result.stopped_by, result.objective_name) == ("solved", "optimal", "cut")
    assert np.array_equal(result.slot_expert_LP, canonical_slots(result.slot_expert_LP, 2))
    weight_LEE = problem.profile.transition_LEE
    found_LE = rank_LE(result.slot_expert_LP, 6, 2)
    total = weight_LEE.sum()
    assert result.objective == pytest.approx(cut_of(Terms.of_weights(weight_LEE), found_LE) / total)
    assert result.objective == result.bound == pytest.approx(least_crossings(weight_LEE, 6, 2) / total)
    assert result.bound_by == f"exflow: {backend}, colocation, joint program"
    assert result.message.startswith("1 of 1 sub-problems proven; ")


@pytest.mark.parametrize("stages", ["staged", "bipartition"])
def test_stages_through_the_child_process(stages: str) -> None:
    problem = problem_of(2, 8, 4, 9, nodes=2)
    start_LP = np.tile(np.arange(8), (2, 1))
    result = solve_exflow(problem, time_limit_s=60, stages=stages, start_LP=start_LP, increments=2, seed=4)
    weight_LEE = problem.profile.transition_LEE
    total = weight_LEE.sum()
    assert result.stopped_by in ("effort", "optimal")
    assert result.bound == pytest.approx(least_crossings(weight_LEE, 8, 2) / total)
    joint = solve_exflow(problem, time_limit_s=60)
    assert result.bound <= joint.objective <= result.objective
    start = cut_of(Terms.of_weights(weight_LEE), np.tile(np.arange(8) // 2, (2, 1))) / total
    assert result.objective <= start
    assert result.bound_by.endswith("first stage, 2 parts")


def test_the_paper_s_own_method_is_staged_on_counts() -> None:
    problem = problem_of(2, 4, 4, 2, nodes=2)
    result = solve_exflow_staged(problem, time_limit_s=60)
    twin = solve_exflow(problem, time_limit_s=60, stages="staged", form="aggregated", backend="highs")
    assert (result.solver, result.bound_by) == ("exflow_staged", "exflow: highs, aggregated, first stage, 2 parts")
    assert (result.objective, result.bound) == (twin.objective, twin.bound)
    assert result.bound == pytest.approx(
        least_crossings(problem.profile.transition_LEE, 4, 2) / problem.profile.transition_LEE.sum()
    )


def test_one_layer_or_one_rank_has_no_cut() -> None:
    for problem in (problem_of(1, 4, 2, 0, with_transitions=False), problem_of(2, 4, 1, 0)):
        result = solve_exflow(problem, time_limit_s=60)
        assert (result.stopped_by, result.objective, result.bound) == ("optimal", 0.0, 0.0)
        rank_LE(result.slot_expert_LP, 4, problem.cluster.num_ranks)


def test_a_killed_run_leaves_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    def killed(*_: Any, **__: Any) -> None:
        raise IsolationTimeoutError("killed")

    monkeypatch.setattr(exflow, "run_isolated", killed)
    problem = problem_of(2, 4, 2, 1)
    start_LP = np.array([[2, 1, 0, 3], [0, 1, 2, 3]])
    for start, kept_LP in ((start_LP, canonical_slots(start_LP, 2)), (None, np.tile(np.arange(4), (2, 1)))):
        result = solve_exflow(problem, time_limit_s=1, start_LP=start)
        assert (result.status, result.stopped_by, result.bound) == ("solved", "time_limit", 0.0)
        assert np.array_equal(result.slot_expert_LP, kept_LP)


def test_a_broken_back_end_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def crashes(*_: Any, **__: Any) -> None:
        raise SolverError("exit status 1")

    monkeypatch.setattr(exflow, "run_isolated", crashes)
    result = solve_exflow(problem_of(2, 4, 2, 1), time_limit_s=1)
    assert (result.status, result.stopped_by, result.slot_expert_LP) == ("error", "error", None)
    assert result.message == "exit status 1"


def test_what_it_refuses() -> None:
    problem = problem_of(2, 6, 3, 0)
    with pytest.raises(UsageError, match="3 is no power of two"):
        solve_exflow(problem, time_limit_s=1, stages="bipartition")
    for option, value in (("stages", "all"), ("backend", "gurobi"), ("form", "per_token"), ("increments", 0)):
        with pytest.raises(UsageError, match=f"{option} is"):
            solve_exflow(problem, time_limit_s=1, **{option: value})
    with pytest.raises(UsageError, match="redundant is 3"):
        solve_exflow(problem_of(2, 6, 3, 0, redundant=3), time_limit_s=1)
    with pytest.raises(UsageError, match="no transitions"):
        solve_exflow(problem_of(2, 6, 3, 0, with_transitions=False), time_limit_s=1)
    for start_LP in (np.zeros((2, 6), dtype=np.int64), np.tile(np.arange(6), (3, 1))):
        with pytest.raises(UsageError, match="start_LP does not hold every expert once"):
            solve_exflow(problem, time_limit_s=1, start_LP=start_LP)
    with pytest.raises(UsageError, match="time_limit_s is"):
        solve_exflow(problem, time_limit_s=0)


def test_a_program_too_large_to_build_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = problem_of(2, 8, 4, 0, nodes=2)
    terms = Terms.of_weights(problem.profile.transition_LEE)
    joint = largest_program(terms, 2, 8, (4,), "colocation")
    assert largest_program(terms, 2, 8, (2, 2), "colocation") < joint
    monkeypatch.setattr(exflow, "MOST_ROWS", joint - 1)
    with pytest.raises(UsageError, match=f"{joint:,} rows"):
        solve_exflow(problem, time_limit_s=60)
    assert solve_exflow(problem, time_limit_s=60, stages="staged").status == "solved"
