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
from placer.core.evaluate import Evaluation, par
from placer.core.evaluate_profile import distinct
from placer.core.replicas import layer_slots
from placer.core.replicas import serve_sets as core_serve_sets
from placer.pipeline import judge, make_plan, solve
from solvers.registry import run_solver
from solvers.touch.anneal import incidence
from solvers.touch.replica_anneal import anneal_replicas
from solvers.touch.replica_serve import serve_sets
from solvers.touch.replicated import solve_replicated


def least_ranks(expert_K: np.ndarray, held_RC: np.ndarray) -> int:
    """Fewest ranks that hold all experts of a set: what no replica choice can beat."""
    wanted = {int(e) for e in expert_K if e >= 0}
    for count in range(1, len(held_RC) + 1):
        for ranks in itertools.combinations(range(len(held_RC)), count):
            if wanted <= {int(e) for rank in ranks for e in held_RC[rank]}:
                return count
    raise AssertionError


def random_case(seed: int, experts: int = 6, ranks: int = 3, width: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """held_RC of a legal placement, and shares of it that differ."""
    rng = np.random.default_rng(seed)
    while True:
        held = np.stack([rng.permutation(experts)[:width] for _ in range(ranks)])
        if len(np.unique(held)) == experts:
            break
    share_ER = np.zeros((experts, ranks))
    for rank, block in enumerate(held):
        share_ER[block, rank] = rng.uniform(0.1, 1, width)
    return held, share_ER / share_ER.sum(axis=1, keepdims=True)


def random_sets(seed: int, experts: int = 6) -> tuple[np.ndarray, np.ndarray]:
    """Every set of three experts, some of only two (filled up with the id E), with weights."""
    sets = np.array(list(itertools.combinations(range(experts), 3)), dtype=np.int16)
    sets[::4, 2] = experts
    return sets, np.random.default_rng(seed).integers(1, 9, len(sets))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_sets_are_served_by_ranks_that_hold_their_experts(seed: int, visit_first: bool) -> None:
    held, share_ER = random_case(seed)
    sets, weight = random_sets(seed)
    node_R = np.array([0, 0, 1])
    draw = np.zeros(len(sets), dtype=np.int64)
    cost, load_ER = serve_sets(held, share_ER, node_R, sets, weight, draw, visit_first, 0.0)
    with_nodes, _ = serve_sets(held, share_ER, node_R, sets, weight, draw, visit_first, 1.0)
    assert (load_ER[share_ER == 0] == 0).all()
    used = [(sets == expert).any(axis=1) @ weight for expert in range(6)]
    np.testing.assert_allclose(load_ER.sum(axis=1), used)
    least = np.array([least_ranks(np.where(row == 6, -1, row), held) for row in sets])
    # of three experts at most two are left to one rank after the first: the greedy cover is the least
    assert (cost == least).all() if visit_first else (cost >= least - 1e-12).all()
    assert (with_nodes >= cost + 1 - 1e-12).all()
    assert (with_nodes <= 2 * cost + 1e-12).all()


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000))
def test_the_compiled_rule_is_the_core_s(seed: int) -> None:
    """Ranks touched are equal; loads are expectations of what the core draws: six standard deviations are 0.07."""
    held, share_ER = random_case(seed)
    sets, _ = random_sets(seed)
    tokens = 2000
    row_P = held.reshape(-1)
    slots = layer_slots(row_P, 6, 3, 3, share_ER[row_P, np.repeat(np.arange(3), 3)])
    mask_E = [*((share_ER > 0) @ np.array([1, 2, 4])), 0]
    for expert_K in sets[::3]:
        masks = [int(mask_E[expert]) for expert in expert_K if expert < 6]
        visited = sum({mask for mask in masks if mask.bit_count() == 1})
        rest = [mask for mask in masks if not mask & visited]
        if len(rest) > 1 and not np.bitwise_and.reduce(rest):
            continue  # which rank is visited before the last is drawn once per row
        one = np.ones(1, dtype=np.int64)
        cost, load_ER = serve_sets(held, share_ER, np.zeros(3, dtype=np.int64), expert_K[None], one, one, True, 0.0)
        many = np.tile(np.where(expert_K == 6, -1, expert_K), (tokens, 1))
        slot_TK = core_serve_sets(slots, "visit_first", many)
        rank_TK = np.where(slot_TK >= 0, slots.rank_P[slot_TK], -1)
        assert (distinct(rank_TK) == cost[0]).all()
        found_ER = np.zeros((6, 3))
        used = slot_TK >= 0
        np.add.at(found_ER, (many[used], rank_TK[used]), 1 / tokens)
        np.testing.assert_allclose(found_ER, load_ER, atol=0.07)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10_000), st.sampled_from([0.0, 1.0]), st.booleans())
def test_the_cost_kept_while_annealing_is_that_of_its_answer(seed: int, node_weight: float, visit_first: bool) -> None:
    held, share_ER = random_case(seed, experts=8, ranks=4)
    sets, weight = random_sets(seed, experts=8)
    rng = np.random.default_rng(seed)
    node_R = np.array([0, 0, 1, 1])
    draw = rng.integers(0, 2**32, len(sets))
    used_E = np.array([(sets == expert).any(axis=1) @ weight for expert in range(8)], dtype=np.float64)
    draw_EB = used_E[:, None] * rng.uniform(0.5, 1.5, (8, 3))
    first_E, set_I = incidence(np.where(sets == 8, -1, sets).astype(np.int16), 8)
    price_B = np.full(3, 50.0)
    found = anneal_replicas(
        held, share_ER, node_R, draw_EB, price_B, sets, weight, draw, first_E, set_I, visit_first, node_weight,
        30_000.0, 20.0, 0.5, 0.1, 0.3, 1.0, np.random.default_rng(seed),
    )  # fmt: skip
    held_RC, found_ER, cost = found
    np.testing.assert_allclose(found_ER.sum(axis=1), 1.0)
    assert ((found_ER > 0) == [[expert in block for block in held_RC] for expert in range(8)]).all()
    cost_H, load_ER = serve_sets(held_RC, found_ER, node_R, sets, weight, draw, visit_first, node_weight)
    part_ER = load_ER / load_ER.sum(axis=1, keepdims=True)
    assert cost == pytest.approx(cost_H @ weight + price_B @ par(draw_EB.T @ part_ER))


def test_the_search_finds_the_least_ranks_touched_of_a_tiny_instance() -> None:
    """Four experts and two replicas on two ranks of three slots: all placements tried."""
    trace = random_trace(4, layers=1, experts=4, top_k=2, tokens=500)
    problem = problem_of(trace, 2, redundant=2)
    sets = problem.profile.sets[0]
    best = np.inf
    for one, two in itertools.product(itertools.combinations(range(4), 3), repeat=2):
        held = np.array([one, two])
        if len(np.unique(held)) == 4:
            least = np.array([least_ranks(row, held) for row in sets.expert_HK])
            best = min(best, float(least @ sets.weight_H / sets.weight_H.sum()))
    assert solve_replicated(problem).objective == pytest.approx(best)


def test_plans_are_legal_and_meet_the_cap() -> None:
    trace = random_trace(3, experts=16, top_k=3, tokens=3000)
    problem = problem_of(trace, 4, redundant=4, max_par=1.25)
    result = solve_replicated(problem, seed=0)
    assert check(problem, make_plan(problem, result, 0)) == []
    assert result.bound is not None
    assert result.objective is not None
    assert result.bound <= result.objective
    again = solve_replicated(problem, seed=0)
    assert (result.slot_expert_LP == again.slot_expert_LP).all()
    assert result.replica_share_LP is not None
    assert again.replica_share_LP is not None
    assert (result.replica_share_LP == again.replica_share_LP).all()


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


@settings(max_examples=3, deadline=None)
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


def test_in_coherent_mode_replicas_and_their_shares_are_aligned_over_layers() -> None:
    problem = problem_of(random_trace(4, layers=4, experts=8, tokens=600), 4, mode="coherent", redundant=4)
    alone, aligned = solve_replicated(problem), run_solver("replicated", problem)
    assert alone.slot_expert_LP is not None
    assert aligned.slot_expert_LP is not None
    assert aligned.replica_share_LP is not None
    transitions = problem.profile.transition_LEE
    assert transitions is not None

    def kept(slots_LP: np.ndarray, share_LP: np.ndarray) -> float:
        share_LRE = np.zeros((4, 4, 8))
        layer, slot = np.indices(slots_LP.shape)
        np.add.at(share_LRE, (layer, slot // 3, slots_LP), share_LP)
        assert np.allclose(share_LRE.sum(axis=1), 1.0), "each expert's shares follow its slots"
        return float(np.einsum("lre,lef,lrf->", share_LRE[:-1], transitions, share_LRE[1:]))

    alone_share_LP = alone.replica_share_LP
    assert alone_share_LP is not None
    assert kept(aligned.slot_expert_LP, aligned.replica_share_LP) > kept(alone.slot_expert_LP, alone_share_LP)
    before, after = (
        [sorted(tuple(block) for block in row.reshape(4, 3).tolist()) for row in one.slot_expert_LP]
        for one in (alone, aligned)
    )
    assert before == after, "the same groups"
    assert check(problem, make_plan(problem, aligned, 0)) == []


def test_ctrl_c_ends_the_search_with_what_it_found(monkeypatch: pytest.MonkeyPatch) -> None:
    import solvers.touch.replicated as replicated

    calls = itertools.count()
    real = replicated.anneal_replicas

    def interrupted(*arguments: object) -> object:
        if next(calls) == 4:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(replicated, "anneal_replicas", interrupted)
    problem = problem_of(random_trace(4, experts=8, tokens=600), 4, redundant=4)
    result = solve_replicated(problem)
    assert (result.status, result.stopped_by) == ("solved", "interrupt")
    assert check(problem, make_plan(problem, result, 0)) == []
