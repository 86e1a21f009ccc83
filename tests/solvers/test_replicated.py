"""Joint replicas: the kernel's incremental costs against a slow reference, legality, gain over load-only replicas."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import problem_of, random_trace

from placer.core.check import check
from placer.core.errors import UsageError
from placer.core.evaluate import Evaluation
from placer.pipeline import judge, make_plan, solve
from solvers.touch.replica_anneal import serve_sets
from solvers.touch.replicated import solve_replicated


def least_ranks(expert_K: np.ndarray, held_RC: np.ndarray) -> int:
    """Fewest ranks that hold all experts of a set: what no replica choice can beat."""
    wanted = {int(e) for e in expert_K if e >= 0}
    for count in range(1, len(held_RC) + 1):
        for ranks in itertools.combinations(range(len(held_RC)), count):
            if wanted <= {int(e) for rank in ranks for e in held_RC[rank]}:
                return count
    raise AssertionError


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_sets_are_served_by_ranks_that_hold_their_experts(seed: int, visit_first: bool) -> None:
    rng = np.random.default_rng(seed)
    experts, ranks, width = 6, 3, 3
    while True:
        held = np.stack([rng.permutation(experts)[:width] for _ in range(ranks)])
        if len(np.unique(held)) == experts:
            break
    sets = np.array(list(itertools.combinations(range(experts), 3)), dtype=np.int16)
    sets[::4, 2] = -1
    weight = rng.integers(1, 9, len(sets))
    draw = rng.integers(0, 2**32, sets.shape, dtype=np.uint32)
    node_R = np.array([0, 0, 1])
    touched, nodes, load_ER = serve_sets(held, experts, node_R, sets, weight, draw, visit_first)
    holds_ER = np.array([[expert in block for block in held] for expert in range(experts)])
    assert (load_ER[~holds_ER] == 0).all()
    used = np.array([[(sets == expert).any(axis=1) @ weight] for expert in range(experts)])
    np.testing.assert_allclose(load_ER.sum(axis=1, keepdims=True), used)
    least = sum(least_ranks(row, held) * w for row, w in zip(sets, weight, strict=True))
    assert least <= touched <= ((sets >= 0).sum(axis=1) @ weight)
    assert nodes <= touched
    if visit_first:
        # experts with one slot, then replicas on ranks they touch: never more than the single experts and one rank
        # for each of the others
        singles = np.array([holds_ER[e].sum() == 1 for e in range(experts)])
        for h, row in enumerate(sets):
            ids = [int(e) for e in row if e >= 0]
            one, _, _ = serve_sets(held, experts, node_R, sets[h : h + 1], weight[h : h + 1], draw[h : h + 1], True)
            fixed = {int(np.flatnonzero(holds_ER[e])[0]) for e in ids if singles[e]}
            free = [e for e in ids if not singles[e] and not any(holds_ER[e][r] for r in fixed)]
            assert one / weight[h] <= len(fixed) + len(free)


def test_plans_are_legal_and_meet_the_cap() -> None:
    trace = random_trace(3, experts=16, top_k=3, tokens=3000)
    problem = problem_of(trace, 4, redundant=4, max_par=1.25)
    result = solve_replicated(problem, seed=0)
    assert check(problem, make_plan(problem, result, 0)) == []
    assert result.bound is not None
    assert result.objective is not None
    assert result.bound <= result.objective
    assert (result.slot_expert_LP == solve_replicated(problem, seed=0).slot_expert_LP).all()


def test_joint_replicas_touch_fewer_ranks_than_replicas_for_load() -> None:
    trace = random_trace(11, experts=16, top_k=3, tokens=6000)
    train, test = trace.split_by_request(0.5, seed=0)
    cluster = problem_of(trace, 4).cluster
    judged = {}
    for solver in ("lpt", "replicated", "coactivation"):
        redundant = 0 if solver == "coactivation" else 4
        solved = solve(train, cluster, solver=solver, redundant=redundant, max_par=1.25)
        judged[solver] = judge(solved.plan, test, cluster)
    assert all(isinstance(evaluation, Evaluation) for evaluation in judged.values())
    touched = {name: evaluation.ranks_touched for name, evaluation in judged.items()}
    assert touched["replicated"] < touched["lpt"] - 0.1  # type: ignore[operator]
    assert touched["replicated"] < touched["coactivation"]  # type: ignore[operator]


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000))
def test_the_cap_holds_when_the_trace_is_replayed(seed: int) -> None:
    """Up to the source ranks and the hash of each token, which a profile does not know."""
    trace = random_trace(seed, experts=8, top_k=2, tokens=20_000)
    cluster = problem_of(trace, 8).cluster
    solved = solve(trace, cluster, redundant=8, solver="replicated", max_par=1.3)
    assert solved.evaluation.par <= 1.3 + 0.03


def test_ids_in_another_order_are_served_alike() -> None:
    trace = random_trace(5, experts=8, top_k=3, tokens=2000)
    ordered = replace(trace, expert_LTK=np.sort(trace.expert_LTK, axis=2), known_sha256="")
    cluster = problem_of(trace, 4).cluster
    plan = solve(trace, cluster, redundant=4, solver="lpt", max_par=None).plan
    one, two = judge(plan, trace, cluster), judge(plan, ordered, cluster)
    assert (one.ranks_touched, one.par) == (two.ranks_touched, two.par)


def test_heavy_sets_are_split_without_losing_tokens() -> None:
    sets = problem_of(random_trace(0, tokens=9000), 3).profile.sets[0]
    split = sets.split_heavy()
    assert split.weight_H.sum() == sets.weight_H.sum()
    assert split.weight_H.max() <= -(-sets.weight_H.sum() // 4000) + 1
    for row, weight in zip(sets.expert_HK, sets.weight_H, strict=True):
        assert split.weight_H[(split.expert_HK == row).all(axis=1)].sum() == weight


def test_more_than_64_ranks_are_refused() -> None:
    with pytest.raises(UsageError, match="at most 64 ranks"):
        solve_replicated(problem_of(random_trace(0, experts=66, top_k=1), 66))
