"""The frontier's knapsack, rank alignment and the registry: brute-force oracles, `check` on every solver's answer."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_problems import counts_problem, problem_of, random_trace

from placer.core.check import check
from placer.core.errors import UsageError
from placer.core.plan import canonical_slots
from placer.pipeline import BASELINES, make_plan
from solvers.affinity.relabel import align_ranks
from solvers.ranks import relabel_ranks
from solvers.registry import SOLVERS, run_solver
from solvers.touch.frontier import Candidate, cheapest_under_cap, cheapest_under_caps

figures = st.tuples(st.floats(1, 4), st.floats(1, 2))
pools_of = st.lists(st.lists(figures, min_size=1, max_size=4), min_size=1, max_size=4)


def pools_from(rows: list[list[tuple[float, float]]]) -> list[list[Candidate]]:
    none = np.zeros(1, dtype=np.int64)
    return [[Candidate(touched=t, par=p, par_seen=p, placement=none) for t, p in row] for row in rows]


@settings(deadline=None)
@given(pools_of, st.floats(1, 2))
def test_the_cheapest_choice_meets_the_cap_whenever_one_exists(
    rows: list[list[tuple[float, float]]], cap: float
) -> None:
    pools = pools_from(rows)
    chosen = cheapest_under_cap(pools, cap)
    possible = [c for c in itertools.product(*pools) if np.mean([x.par for x in c]) <= cap]
    if not possible:
        assert [c.par for c in chosen] == [min(x.par for x in pool) for pool in pools]
        return
    assert np.mean([c.par for c in chosen]) <= cap + 1e-9
    best = min(sum(x.touched for x in c) for c in possible)
    # greedy after the multiplier: at most one layer's whole range above the optimum (the knapsack's usual guarantee)
    widest = max(max(x.touched for x in pool) - min(x.touched for x in pool) for pool in pools)
    assert best - 1e-9 <= sum(c.touched for c in chosen) <= best + widest + 1e-9


def test_a_second_cap_on_what_was_seen_is_met_too() -> None:
    none = np.zeros(1, dtype=np.int64)
    pool = [Candidate(1.0, 1.1, 1.4, none), Candidate(1.5, 1.1, 1.1, none), Candidate(2.0, 1.0, 1.0, none)]
    chosen = cheapest_under_caps([pool, pool], cap=1.2, cap_seen=1.2)
    assert np.mean([c.par_seen for c in chosen]) <= 1.2


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10_000), st.booleans())
def test_alignment_keeps_the_most_transitions_for_fixed_groups(seed: int, replicas: bool) -> None:
    rng = np.random.default_rng(seed)
    ranks, experts, layers = 3, 6, 3
    slots = np.stack([rng.permutation(experts) for _ in range(layers)])
    if replicas:
        blocks = slots.reshape(layers, ranks, -1)
        extra = [[rng.choice(np.setdiff1d(np.arange(experts), block)) for block in row] for row in blocks]
        slots = np.concatenate([blocks, np.array(extra)[:, :, None]], axis=2).reshape(layers, -1)
    transition = rng.integers(0, 50, (layers - 1, experts, experts))

    def kept(rows: np.ndarray) -> float:
        held = np.zeros((layers, ranks, experts))
        for layer, rank in itertools.product(range(layers), range(ranks)):
            held[layer, rank, rows.reshape(layers, ranks, -1)[layer, rank]] = 1
        held /= held.sum(axis=1, keepdims=True)
        return sum(float((held[i] @ transition[i] @ held[i + 1].T).trace()) for i in range(layers - 1))

    aligned = canonical_slots(relabel_ranks(slots, align_ranks(slots, transition, ranks)), ranks)
    blocks = slots.reshape(layers, ranks, -1)
    orders = itertools.product(itertools.permutations(range(ranks)), repeat=layers - 1)
    best = max(kept(np.stack([blocks[0], *(blocks[i + 1][list(o)] for i, o in enumerate(order))])) for order in orders)
    assert kept(aligned) == pytest.approx(best)
    groups = [{tuple(sorted(block)) for block in row} for row in blocks.tolist()]
    assert groups == [{tuple(block) for block in row} for row in aligned.reshape(layers, ranks, -1).tolist()]


@pytest.mark.parametrize("name", SOLVERS)
@pytest.mark.parametrize("mode", ["per_rank", "coherent"])
def test_every_answer_passes_check_and_never_beats_its_bound(name: str, mode: str) -> None:
    problem = problem_of(random_trace(0), 3, mode=mode)
    result = run_solver(name, problem, time_limit_s=30)
    assert result.status == "solved"
    assert result.objective is not None
    assert (result.bound is None) == (name == "moetuner")
    assert result.bound is None or result.bound <= result.objective + 1e-9
    assert check(problem, make_plan(problem, result, 0)) == []


@pytest.mark.parametrize("name", [name for name, info in SOLVERS.items() if info.replicas and name != "replicated"])
def test_replicas_pass_check(name: str) -> None:
    problem = counts_problem(np.random.default_rng(0).integers(1, 100, (3, 8)), 4, redundant=4)
    broken = {violation.code for violation in check(problem, make_plan(problem, run_solver(name, problem), 0))}
    assert broken <= ({"same-rank-replicas"} if name in BASELINES else set())


def test_a_solver_that_is_not_known() -> None:
    with pytest.raises(UsageError, match="use auto or one of"):
        run_solver("gurobi", problem_of(random_trace(0), 3))


def test_baselines_are_not_relabelled_in_coherent_mode() -> None:
    problem = problem_of(random_trace(0, experts=8, layers=3), 4, mode="coherent")
    linear = run_solver("linear", problem).slot_expert_LP
    assert linear is not None
    assert (linear == np.arange(8)).all()
