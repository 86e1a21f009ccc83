"""MoETuner's two programs against brute force, with both back ends."""

import itertools
import types
from collections.abc import Iterator

import isolated_functions
import numpy as np
import pytest
from exact_problems import equal_placements, load_R, make_cluster, make_problem, random_trace, rank_LE
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import DependencyError, UsageError
from placer.core.plan import canonical_slots
from solvers.exact import isolate, pulp_run
from solvers.papers import moetuner
from solvers.papers.moetuner import Settings, assign_ranks, cluster_layer, pair_gbytes_RR, solve_moetuner

BACKENDS = ["highs", "cbc"]


def nonempty_clusters(experts: int, ranks: int, capacity: int) -> Iterator[np.ndarray]:
    for rank_E in itertools.product(range(ranks), repeat=experts):
        counts = [rank_E.count(rank) for rank in range(ranks)]
        if min(counts) >= 1 and max(counts) <= capacity:
            yield np.array(rank_E)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=12, deadline=None)
@given(
    load=st.lists(st.integers(0, 1000), min_size=6, max_size=6),
    ranks=st.sampled_from([2, 3]),
    sizes=st.sampled_from(["equal", "nonempty"]),
    max_par=st.sampled_from([None, 1.02, 1.3]),
)
def test_ilp1_is_brute_force_s(backend: str, load: list[int], ranks: int, sizes: str, max_par: float | None) -> None:
    load_E = np.array(load)
    capacity = 6 // ranks if sizes == "equal" else 4
    asked = Settings(capacity=capacity, max_par=max_par, backend=backend, sizes=sizes)
    stage = cluster_layer(load_E, ranks, asked, 60.0)
    every = equal_placements(6, ranks) if sizes == "equal" else nonempty_clusters(6, ranks, capacity)
    mean = load_E.sum() / ranks
    cap = np.inf if max_par is None else max_par * mean * (1 + 1e-9)
    loads = [load_R(load_E, rank_E, ranks) for rank_E in every]
    best = min((np.abs(tokens - mean).sum() for tokens in loads if tokens.max() <= cap), default=None)
    if best is None:
        assert (stage.state, stage.value) == ("infeasible", None)
        return
    assert stage.state == "optimal"
    assert stage.objective == pytest.approx(best, abs=1e-4 * max(1.0, mean))
    assert stage.bound <= stage.objective
    assert stage.bound == pytest.approx(best, abs=1e-4 * max(1.0, mean))
    tokens = load_R(load_E, stage.value, ranks)
    assert np.abs(tokens - mean).sum() == pytest.approx(stage.objective)
    assert tokens.max() <= cap * (1 + 1e-6) + 1e-6
    assert any(np.array_equal(tokens, other) for other in loads)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=8, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    shape=st.sampled_from([(2, 2, 1), (3, 2, 2), (2, 3, 1), (2, 4, 2), (3, 3, 1)]),
)
def test_ilp2_is_brute_force_s(backend: str, seed: int, shape: tuple[int, int, int]) -> None:
    layers, ranks, nodes = shape
    flow_LCC = np.random.default_rng(seed).integers(0, 1000, size=(layers - 1, ranks, ranks)).astype(float)
    rate_RR = pair_gbytes_RR(make_cluster(ranks, nodes=nodes))
    asked = Settings(capacity=1, backend=backend)
    stage = assign_ranks(flow_LCC, rate_RR, np.ones((layers, ranks), dtype=np.int64), asked, 60.0)

    def slowest(places: tuple[tuple[int, ...], ...]) -> float:
        total = 0.0
        for flow_CC, here, there in zip(flow_LCC, places, places[1:], strict=False):
            pairs = itertools.product(range(ranks), repeat=2)
            total += max(flow_CC[c, d] / rate_RR[here[c], there[d]] for c, d in pairs)
        return total

    best = min(map(slowest, itertools.product(itertools.permutations(range(ranks)), repeat=layers)))
    assert stage.state == "optimal"
    assert stage.objective == pytest.approx(best, rel=1e-5, abs=1e-5)
    assert stage.bound == pytest.approx(best, rel=1e-5, abs=1e-5)
    assert slowest(tuple(map(tuple, stage.value.tolist()))) == pytest.approx(stage.objective)


def test_ilp2_gains_on_a_uniform_node_because_a_rank_s_own_pair_is_free() -> None:
    flow_LCC = np.array([[[0.0, 9.0], [9.0, 0.0]]])
    rate_RR = pair_gbytes_RR(make_cluster(2))
    stage = assign_ranks(flow_LCC, rate_RR, np.ones((2, 2), dtype=np.int64), Settings(capacity=1), 30.0)
    assert stage.objective == 0.0
    assert stage.value.tolist() == [[0, 1], [1, 0]]


def test_the_printed_ilp1_does_not_put_all_experts_in_one_cluster() -> None:
    stage = cluster_layer(np.full(6, 10), 2, Settings(capacity=5, sizes="nonempty"), 30.0)
    assert stage.objective == 0.0
    assert np.bincount(stage.value).tolist() == [3, 3]


def test_bandwidth_is_free_on_a_rank_and_the_uplink_s_between_nodes() -> None:
    inf = np.inf
    assert pair_gbytes_RR(make_cluster(4, nodes=2, uplink_gbytes_per_s=5.0)).tolist() == [
        [inf, 100, 5, 5],
        [100, inf, 5, 5],
        [5, 5, inf, 100],
        [5, 5, 100, inf],
    ]
    assert pair_gbytes_RR(make_cluster(2, nodes=2, uplink_gbytes_per_s=50.0))[0, 1] == 20


@pytest.mark.parametrize("backend", BACKENDS)
def test_through_the_child_process(backend: str) -> None:
    trace = random_trace(3, 200, 2, 8, 5)
    cluster = make_cluster(4, nodes=2)
    problem = make_problem(trace, num_experts=8, cluster=cluster)
    result = solve_moetuner(problem, time_limit_s=60, backend=backend)
    assert (result.status, result.stopped_by, result.objective_name) == ("solved", "effort", "slowest_pair_ns")
    assert result.bound is None
    assert np.array_equal(result.slot_expert_LP, canonical_slots(result.slot_expert_LP, 4))
    found_LE = rank_LE(result.slot_expert_LP, 8, 4)
    rate_RR = pair_gbytes_RR(cluster) / problem.profile.model.token_bytes
    slowest = 0.0
    for layer, flow_EE in enumerate(problem.profile.transition_LEE):
        flow_RR = np.zeros((4, 4))
        np.add.at(flow_RR, (found_LE[layer][:, None], found_LE[layer + 1][None, :]), flow_EE)
        slowest += (flow_RR / rate_RR).max()
    assert result.objective == pytest.approx(slowest)
    deviation = sum(
        np.abs(load_R(load_E, rank_E, 4) - load_E.sum() / 4).sum()
        for load_E, rank_E in zip(problem.profile.load_LE, found_LE, strict=True)
    )
    assert result.message.startswith(f"ILP 1: deviation {deviation:.0f} tokens, bound ")
    assert "3 of 3 layers proven" in result.message


def test_one_layer_needs_no_transitions() -> None:
    problem = make_problem(random_trace(1, 50, 2, 6, 1), num_experts=6, cluster=make_cluster(3), with_transitions=False)
    result = solve_moetuner(problem, time_limit_s=60)
    assert (result.status, result.objective) == ("solved", 0.0)
    rank_LE(result.slot_expert_LP, 6, 3)


def test_the_paper_s_sizes_leave_slots_empty_and_share_the_model_evenly() -> None:
    trace = np.concatenate([np.full((2, 30, 1), 0), np.arange(30).reshape(1, 30, 1).repeat(2, axis=0) % 4], axis=1)
    trace[1] = 3 - trace[1]
    problem = make_problem(trace, num_experts=4, cluster=make_cluster(2), redundant=2, allow_empty_slots=True)
    result = solve_moetuner(problem, time_limit_s=60, sizes="nonempty")
    assert result.status == "solved", result.message
    found_LE = rank_LE(result.slot_expert_LP, 4, 2)
    assert [np.bincount(row).tolist() for row in found_LE] == [[1, 3], [3, 1]]
    assert (result.slot_expert_LP == -1).sum() == 4


def test_the_paper_s_whole_model_memory_may_have_no_answer() -> None:
    trace = np.concatenate([np.zeros(30, dtype=int), np.arange(30) % 4]).reshape(1, 60, 1)
    problem = make_problem(trace, num_experts=4, cluster=make_cluster(2), redundant=2, allow_empty_slots=True)
    result = solve_moetuner(problem, time_limit_s=60, sizes="nonempty")
    assert (result.status, result.stopped_by) == ("error", "infeasible")
    assert "use equal sizes" in result.message


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_impossible_cap_of_one_layer_is_infeasible(backend: str) -> None:
    problem = make_problem(np.zeros((1, 8, 1), dtype=int), num_experts=4, cluster=make_cluster(2), max_par=1.25)
    result = solve_moetuner(problem, time_limit_s=60, backend=backend)
    assert (result.status, result.stopped_by, result.slot_expert_LP) == ("infeasible", "infeasible", None)
    assert "ILP 1, layer 0 (row 0)" in result.message


def test_one_layer_may_exceed_the_cap_that_the_mean_meets() -> None:
    trace = np.zeros((2, 8, 1), dtype=int)  # PAR 2 in layer 1 whatever is done, 1 in layer 0
    trace[0, :, 0] = np.arange(8) % 4
    for max_par, status, stopped_by in ((1.5, "solved", "effort"), (1.45, "error", "infeasible")):
        problem = make_problem(trace, num_experts=4, cluster=make_cluster(2), max_par=max_par)
        result = solve_moetuner(problem, time_limit_s=60)
        assert (result.status, result.stopped_by) == (status, stopped_by), result.message
    assert "mean PAR of 1.5000 and the cap is 1.45" in result.message


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_program_stopped_by_its_limit_is_not_called_optimal(backend: str) -> None:
    load_E = np.random.default_rng(0).lognormal(8, 1, size=40).astype(np.int64)
    stage = cluster_layer(load_E, 4, Settings(capacity=10, backend=backend), 1.0)
    assert stage.state == "feasible"
    assert 0.0 <= stage.bound < stage.objective


def test_a_stopped_stage_is_reported_as_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moetuner, "run_isolated", lambda function, arguments, *, time_limit_s: function(*arguments))
    trace = np.random.default_rng(0).integers(0, 40, size=(1, 4001, 1))
    problem = make_problem(trace, num_experts=40, cluster=make_cluster(4))
    result = solve_moetuner(problem, time_limit_s=1.5)
    assert (result.status, result.stopped_by) == ("solved", "time_limit"), result.message
    assert "0 of 1 layers proven" in result.message


@pytest.mark.parametrize(
    ("function", "stopped_by", "says"),
    [("sleep_forever", "time_limit", "it was killed"), ("crash", "error", "SIGSEGV")],
)
def test_a_back_end_that_hangs_or_dies_is_an_error_result(
    function: str, stopped_by: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolate, "GRACE_S", 0.0)
    monkeypatch.setattr(isolate, "GRACE_FACTOR", 1.0)
    monkeypatch.setattr(moetuner, "solve_stages", getattr(isolated_functions, function))
    problem = make_problem(random_trace(1, 5, 1, 4, 0), num_experts=4, cluster=make_cluster(2))
    result = solve_moetuner(problem, time_limit_s=1.5)
    assert (result.status, result.stopped_by, result.slot_expert_LP) == ("error", stopped_by, None)
    assert says in result.message


def test_what_makes_no_sense_is_refused() -> None:
    trace = random_trace(2, 5, 1, 4, 0)
    cluster = make_cluster(2)
    plain = make_problem(trace, num_experts=4, cluster=cluster)
    for problem, arguments, says in (
        (plain, {"backend": "gurobi"}, "use one of highs, cbc"),
        (plain, {"sizes": "any"}, "use one of equal, nonempty"),
        (plain, {"relative_gap": 1.0}, "less than 1"),
        (plain, {"sizes": "nonempty"}, "set allow_empty_slots"),
        (make_problem(trace, num_experts=4, cluster=cluster, redundant=2), {}, "redundant is 2"),
        (make_problem(trace, num_experts=4, cluster=cluster, with_transitions=False), {}, "no transitions"),
    ):
        with pytest.raises(UsageError, match=says):
            solve_moetuner(problem, time_limit_s=1, **arguments)


def test_without_cbc_the_mend_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(DependencyError, match=r"pip install 'pulp\[cbc\]'"):
        cluster_layer(np.array([1, 2]), 2, Settings(capacity=1, backend="cbc"), 1.0)


@pytest.mark.parametrize(
    ("name", "has_solution", "state"),
    [
        ("Optimal", True, "optimal"),
        ("TimeLimit", True, "feasible"),
        ("TimeLimit", False, "none"),
        ("Infeasible", False, "infeasible"),
    ],
)
def test_the_answer_of_pulp_4_is_understood(name: str, has_solution: bool, state: str) -> None:
    answer = types.SimpleNamespace(
        status=types.SimpleNamespace(name=name), has_solution=has_solution, best_bound=1.5 if has_solution else None
    )
    assert pulp_run._state(None, answer) == state
    if has_solution:
        assert pulp_run._lower_bound(None, answer, "") == 1.5
