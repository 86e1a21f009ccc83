"""The one score of all solvers: what the core says of the same plan, and what the solvers say of their own answers."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import cluster, counts_problem, problem_of, random_trace, without_sets

from placer.core.check import check
from placer.core.evaluate_profile import evaluate_profile
from placer.core.problem import PlacementProblem
from placer.pipeline import make_plan
from solvers.bounds.closed_form import closed_form
from solvers.registry import run_solver
from solvers.result import SolveResult
from solvers.score import Goal, goal_of, repeats, score
from solvers.touch.objective import node_price, touch_objective

TRACE = random_trace(0, experts=8, layers=3)


def answer(slots: np.ndarray, share: np.ndarray | None = None) -> SolveResult:
    return SolveResult(solver="x", status="solved", stopped_by="effort", slot_expert_LP=slots, replica_share_LP=share)


def random_slots(problem: PlacementProblem, rng: np.random.Generator) -> np.ndarray:
    """Every expert once, then replicas on ranks that do not hold them yet."""
    experts, ranks = problem.profile.model.num_experts, problem.cluster.num_ranks
    extra = problem.redundant // ranks
    rows = []
    for _ in range(problem.profile.model.num_sites):
        blocks = rng.permutation(experts).reshape(ranks, -1)
        more = [rng.choice(np.setdiff1d(np.arange(experts), block), extra, replace=False) for block in blocks]
        rows.append(np.concatenate([blocks, np.array(more, dtype=np.int64).reshape(ranks, extra)], axis=1).ravel())
    return np.stack(rows)


def random_shares(slots: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    share = rng.random(slots.shape) + 0.1
    for layer, row in enumerate(slots):
        share[layer] /= np.bincount(row, weights=share[layer])[row]
    return share


@settings(max_examples=30, deadline=None)
@given(
    st.integers(0, 10_000),
    st.sampled_from(["per_rank", "per_node", "coherent", "per_expert", "allgather"]),
    st.sampled_from([0, 4]),
    st.booleans(),
    st.floats(1.0, 2.0),
)
def test_the_score_is_what_the_core_says(seed: int, mode: str, redundant: int, shares: bool, cap: float) -> None:
    """Ranks, nodes, kept share and PAR of evaluate_profile; the cap of check."""
    rng = np.random.default_rng(seed)
    nodes = 1 if mode == "coherent" else 2
    problem = problem_of(random_trace(seed, experts=8), 4, nodes=nodes, mode=mode, redundant=redundant, max_par=cap)
    slots = random_slots(problem, rng)
    share = random_shares(slots, rng) if shares else None
    plan = make_plan(problem, answer(slots, share), 0)
    judged, scored = evaluate_profile(plan, problem.profile), score(problem, slots, share)
    assert judged.ranks_touched is not None
    assert judged.nodes_touched is not None
    assert judged.kept is not None
    wanted = {
        "per_rank": judged.ranks_touched,
        "per_node": judged.ranks_touched + node_price(problem) * judged.nodes_touched,
        "coherent": 1 - judged.kept,
    }.get(mode, judged.par)
    assert scored.objective == pytest.approx(wanted, abs=1e-9)
    assert scored.par == pytest.approx(judged.par, abs=1e-9)
    assert scored.feasible == (check(problem, plan) == [])


def test_the_goal_follows_the_mode_and_what_is_known() -> None:
    kinds = {mode: goal_of(problem_of(TRACE, 4, nodes=2, mode=mode)).kind for mode in ("per_rank", "per_node")}
    assert kinds == {"per_rank": "ranks", "per_node": "nodes"}
    assert goal_of(problem_of(TRACE, 4, mode="per_node")).kind == "ranks", "one node: nothing to weigh"
    assert goal_of(problem_of(TRACE, 4, mode="coherent")).kind == "cut"
    assert goal_of(without_sets(problem_of(TRACE, 4, mode="coherent"))).kind == "cut"
    one_layer = problem_of(random_trace(0, layers=1), 3, mode="coherent")
    assert goal_of(one_layer).kind == "ranks", "no transitions to cut"
    for mode in ("per_expert", "allgather"):
        assert goal_of(problem_of(TRACE, 4, mode=mode)).kind == "par"
    assert goal_of(without_sets(problem_of(TRACE, 4))).kind == "par"
    for problem in (problem_of(TRACE, 4), problem_of(TRACE, 4, nodes=2, mode="per_node")):
        assert goal_of(problem).name == touch_objective(problem)[0]
    hops = goal_of(problem_of(TRACE, 4, nodes=2, mode="coherent"))
    assert (hops.kind, hops.name, hops.node_weight) == ("hops", "cut + 1 * cut_nodes", 1.0)


@pytest.mark.parametrize("mode", ["per_rank", "per_node"])
def test_the_searches_say_of_their_own_answers_what_the_score_says(mode: str) -> None:
    for solver, redundant in (("coactivation", 0), ("replicated", 4)):
        problem = problem_of(TRACE, 4, nodes=2, mode=mode, redundant=redundant)
        result = run_solver(solver, problem)
        assert result.slot_expert_LP is not None
        scored = score(problem, result.slot_expert_LP, result.replica_share_LP)
        assert (scored.objective, goal_of(problem).name) == (pytest.approx(result.objective), result.objective_name)


def test_a_cut_by_hand() -> None:
    """Experts 0, 1 | 2, 3 in both layers: what goes from 0 to 3 and back changes rank; on two nodes, node as well."""
    problem = problem_of(random_trace(1, experts=4, top_k=1), 2, mode="coherent")
    across = replace(problem, cluster=cluster(2, nodes=2))
    flow = problem.profile.transition_LEE
    assert flow is not None
    slots = np.tile(np.arange(4), (2, 1))
    cut = float(flow[0][:2, 2:].sum() + flow[0][2:, :2].sum()) / float(flow.sum())
    assert score(problem, slots).objective == pytest.approx(cut)
    assert score(across, slots).objective == pytest.approx(2 * cut)
    assert score(across, slots, goal=Goal("hops", "x", 3.0)).objective == pytest.approx(4 * cut)


def test_a_repeated_expert_is_not_feasible() -> None:
    problem = counts_problem(np.array([[4, 3, 2, 1]]), 2, redundant=2)
    fine, repeated = np.array([[0, 1, 2, 0, 2, 3]]), np.array([[0, 0, 1, 1, 2, 3]])
    assert not repeats(fine, 2)
    assert repeats(repeated, 2)
    assert score(problem, fine).feasible
    assert not score(problem, repeated).feasible
    assert not repeats(np.array([[0, -1, -1, 1, 2, 3]]), 2), "empty slots are not replicas of one another"


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0, 4]))
def test_closed_forms_are_certificates_that_no_placement_beats(seed: int, redundant: int) -> None:
    from placer.core.certificates import verify

    for mode in ("per_rank", "per_node", "per_expert"):
        problem = problem_of(random_trace(seed, experts=8), 4, nodes=2, mode=mode, redundant=redundant)
        certificate = closed_form(problem, goal_of(problem).name)
        assert certificate is not None
        assert verify(problem, certificate) == pytest.approx(certificate.bound, abs=1e-9)
        slots = random_slots(problem, np.random.default_rng(seed))
        assert certificate.bound <= score(problem, slots).objective + 1e-9
        assert closed_form(problem, "cut") is None
