"""The dynamic program over layers against brute force, with and without a cap on the mean PAR."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from exact_problems import equal_placements, load_R, make_cluster, make_problem, random_trace, rank_LE
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import UsageError
from placer.core.plan import canonical_slots
from placer.core.problem import PlacementProblem
from solvers.exact import chain_cap
from solvers.exact.chain import solve_chain
from solvers.exact.chain_cap import capped_path, least_cost
from solvers.exact.chain_table import best_matching, kept_table, number_of_partitions, partitions_of
from solvers.papers.exflow import solve_exflow

SHAPES = [(3, 4, 2), (2, 6, 3), (2, 6, 2), (3, 3, 3), (4, 4, 2), (2, 4, 1)]


def problem_of(shape: tuple[int, int, int], seed: int, max_par: float | None = None) -> PlacementProblem:
    layers, experts, ranks = shape
    trace = random_trace(layers, 60, 2, experts, seed)
    return make_problem(trace, num_experts=experts, cluster=make_cluster(ranks), max_par=max_par)


def chained_trace(layers: int, tokens: int, experts: int, seed: int) -> np.ndarray:
    """Top-1 paths that follow a permutation of experts from layer to layer, or not, so that a program closes soon."""
    rng = np.random.default_rng(seed)
    follows_LE = np.array([rng.permutation(experts) for _ in range(layers)])
    path_LT = rng.integers(0, experts, size=(layers, tokens))
    for layer in range(1, layers):
        stays_T = rng.random(tokens) < 0.6
        path_LT[layer, stays_T] = follows_LE[layer, path_LT[layer - 1, stays_T]]
    return path_LT[:, :, None]


def cut(problem: PlacementProblem, found_LE: np.ndarray) -> float:
    """Pair by pair, with nothing of the solver's."""
    weight_LEE = problem.profile.transition_LEE
    lost = 0
    for layer, i, j in zip(*np.nonzero(weight_LEE), strict=True):
        if found_LE[layer, i] != found_LE[layer + 1, j]:
            lost += int(weight_LEE[layer, i, j])
    return lost / max(1, int(weight_LEE.sum()))


def mean_par(problem: PlacementProblem, found_LE: np.ndarray) -> float:
    ranks = problem.cluster.num_ranks
    loads = [load_R(load_E, rank_E, ranks) for load_E, rank_E in zip(problem.profile.load_LE, found_LE, strict=True)]
    return float(np.mean([load.max() / load.mean() if load.any() else 1.0 for load in loads]))


def every_placement(problem: PlacementProblem) -> list[np.ndarray]:
    model, ranks = problem.profile.model, problem.cluster.num_ranks
    one_layer = list(equal_placements(model.num_experts, ranks))
    # ranks may be renamed in all layers at once
    first = [rank_E for rank_E in one_layer if [*dict.fromkeys(rank_E.tolist())] == list(range(ranks))]
    return [np.array(rows) for rows in itertools.product(first, *[one_layer] * (model.num_sites - 1))]


@settings(max_examples=25, deadline=None)
@given(shape=st.sampled_from(SHAPES), seed=st.integers(0, 10**6))
def test_it_is_the_optimum(shape: tuple[int, int, int], seed: int) -> None:
    problem = problem_of(shape, seed)
    result = solve_chain(problem)
    assert (result.status, result.stopped_by, result.objective_name) == ("solved", "optimal", "cut")
    found_LE = rank_LE(result.slot_expert_LP, shape[1], shape[2])
    assert result.objective == pytest.approx(cut(problem, found_LE), abs=1e-12)
    best = min(cut(problem, placed_LE) for placed_LE in every_placement(problem))
    assert result.objective == result.bound == pytest.approx(best, abs=1e-12)
    assert np.array_equal(result.slot_expert_LP, canonical_slots(result.slot_expert_LP, shape[2]))


@settings(max_examples=25, deadline=None)
@given(
    shape=st.sampled_from(SHAPES),
    seed=st.integers(0, 10**6),
    max_par=st.floats(1.0, 1.8),
    limits=st.sampled_from([(1,), (300, 5000)]),
)
def test_under_a_cap_it_lies_between_bound_and_brute_force(
    shape: tuple[int, int, int], seed: int, max_par: float, limits: tuple[int, ...]
) -> None:
    problem = problem_of(shape, seed, max_par)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain_cap, "LABEL_LIMITS", limits)
        result = solve_chain(problem)
    within = [placed for placed in every_placement(problem) if mean_par(problem, placed) <= max_par + 1e-9]
    if not within:
        assert (result.status, result.stopped_by, result.slot_expert_LP) == ("infeasible", "infeasible", None)
        return
    found_LE = rank_LE(result.slot_expert_LP, shape[1], shape[2])
    assert mean_par(problem, found_LE) <= max_par + 1e-9
    assert result.objective == pytest.approx(cut(problem, found_LE), abs=1e-12)
    best = min(cut(problem, placed_LE) for placed_LE in within)
    assert result.bound - 1e-12 <= best <= result.objective + 1e-12
    if limits != (1,):
        assert result.stopped_by == "optimal"
        assert result.objective == result.bound
    else:
        assert (result.stopped_by == "optimal") == (result.objective == result.bound)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    layers=st.integers(1, 5),
    states=st.integers(1, 4),
    slack=st.floats(0.0, 1.0),
    limits=st.sampled_from([(1,), (2, 3), (300, 5000)]),
    spread=st.sampled_from([3, 1000]),
)
def test_capped_paths_by_enumeration(
    seed: int, layers: int, states: int, slack: float, limits: tuple[int, ...], spread: int
) -> None:
    rng = np.random.default_rng(seed)
    gain_LBB = rng.integers(0, spread, size=(layers - 1, states, states))
    cost_LB = rng.integers(0, spread, size=(layers, states)) / 8
    cap = least_cost(cost_LB) + slack * float(cost_LB.max(axis=1).sum() - least_cost(cost_LB))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chain_cap, "LABEL_LIMITS", limits)
        path = capped_path(gain_LBB, cost_LB, cap)

    def gain(states_L: tuple[int, ...]) -> int:
        return sum(int(gain_LBB[layer, a, b]) for layer, (a, b) in enumerate(itertools.pairwise(states_L)))

    def cost(states_L: tuple[int, ...]) -> float:
        return sum(float(cost_LB[layer, b]) for layer, b in enumerate(states_L))

    best = max(gain(s) for s in itertools.product(range(states), repeat=layers) if cost(s) <= cap)
    found = tuple(path.state_L.tolist())
    assert cost(found) <= cap
    assert gain(found) == path.gain <= best <= path.bound
    if limits[-1] == 5000:
        assert path.gain == path.bound


def test_dropped_labels_stay_in_the_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """With room for one label the search cannot prove what it finds on some of these."""
    monkeypatch.setattr(chain_cap, "LABEL_LIMITS", (1,))
    open_ones = sum(solve_chain(problem_of((4, 6, 2), seed, 1.1)).stopped_by == "effort" for seed in range(10))
    assert open_ones > 0


@pytest.mark.parametrize("layers", [3, 4])
def test_it_agrees_with_the_integer_program(layers: int) -> None:
    problem = make_problem(chained_trace(layers, 200, 8, layers), num_experts=8, cluster=make_cluster(4))
    exact = solve_exflow(problem, time_limit_s=60)
    result = solve_chain(problem)
    assert exact.stopped_by == "optimal"
    assert result.objective == pytest.approx(exact.objective, abs=1e-12)


@pytest.mark.parametrize(("experts", "ranks", "count"), [(8, 4, 105), (8, 2, 35), (9, 3, 280), (5, 5, 1), (6, 1, 1)])
def test_partitions_are_all_there_once(experts: int, ranks: int, count: int) -> None:
    partitions = partitions_of(experts, ranks)
    assert number_of_partitions(experts, ranks) == count
    rows = {tuple(partitions.rank_E(b).tolist()) for b in range(len(partitions.group_BR))}
    assert len(rows) == len(partitions.group_BR) == count
    assert all(np.bincount(row).tolist() == [experts // ranks] * ranks for row in rows)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), shape=st.sampled_from([(4, 2), (6, 3), (6, 2), (4, 4), (3, 1)]))
def test_the_table_is_the_best_naming_of_groups(seed: int, shape: tuple[int, int]) -> None:
    experts, ranks = shape
    weight_EE = np.random.default_rng(seed).integers(0, 1000, size=(experts, experts))
    partitions = partitions_of(experts, ranks)
    table = kept_table(weight_EE, partitions)
    for before, after in itertools.product(range(len(table)), repeat=2):
        here_E, there_E = partitions.rank_E(before), partitions.rank_E(after)
        named = [np.array(names)[there_E] for names in itertools.permutations(range(ranks))]
        assert table[before, after] == max(weight_EE[here_E[:, None] == there[None, :]].sum() for there in named)


def test_matching_by_enumeration() -> None:
    block_RR = np.random.default_rng(0).integers(0, 2**40, size=(5, 5))
    found = best_matching(block_RR)
    assert sorted(found.tolist()) == list(range(5))
    best = max(sum(block_RR[r, p[r]] for r in range(5)) for p in itertools.permutations(range(5)))
    assert block_RR[np.arange(5), found].sum() == best


def test_one_expert_a_rank_is_a_matching_at_any_size() -> None:
    problem = problem_of((3, 24, 24), 4)
    result = solve_chain(problem)
    kept = sum(weight[np.arange(24), best_matching(weight)].sum() for weight in problem.profile.transition_LEE)
    assert result.objective == pytest.approx(1 - kept / problem.profile.transition_LEE.sum())
    assert result.stopped_by == "optimal"


def test_mixtral_s_size_with_a_cap_that_binds() -> None:
    free = solve_chain(problem_of((32, 8, 4), 1))
    par = mean_par(problem_of((32, 8, 4), 1), rank_LE(free.slot_expert_LP, 8, 4))
    capped = solve_chain(problem_of((32, 8, 4), 1, max_par=1 + 0.8 * (par - 1)))
    problem = problem_of((32, 8, 4), 1, max_par=1 + 0.8 * (par - 1))
    assert capped.status == "solved"
    assert mean_par(problem, rank_LE(capped.slot_expert_LP, 8, 4)) <= problem.max_par + 1e-9
    assert free.objective < capped.objective
    assert free.bound < capped.bound <= capped.objective


def test_one_layer_needs_no_transitions_and_keeps_its_cap() -> None:
    trace = random_trace(1, 60, 2, 6, 3)
    problem = make_problem(trace, num_experts=6, cluster=make_cluster(3), with_transitions=False)
    result = solve_chain(problem)
    assert (result.status, result.objective, result.bound) == ("solved", 0.0, 0.0)
    least = min(mean_par(problem, rank_E[None]) for rank_E in equal_placements(6, 3))
    tight = replace(problem, max_par=least)
    assert mean_par(problem, rank_LE(solve_chain(tight).slot_expert_LP, 6, 3)) == pytest.approx(least)


def test_progress_counts_layers() -> None:
    seen: list[tuple[int, int]] = []
    solve_chain(problem_of((3, 4, 2), 0), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(2, 3), (3, 3)]


def test_what_it_refuses() -> None:
    trace = random_trace(2, 30, 2, 4, 0)
    with pytest.raises(UsageError, match="redundant is 2"):
        solve_chain(make_problem(trace, num_experts=4, cluster=make_cluster(2), redundant=2))
    with pytest.raises(UsageError, match="no transitions"):
        solve_chain(make_problem(trace, num_experts=4, cluster=make_cluster(2), with_transitions=False))
    for experts, ranks in ((12, 4), (256, 64)):
        wide = make_problem(random_trace(2, 30, 2, experts, 0), num_experts=experts, cluster=make_cluster(ranks))
        with pytest.raises(UsageError, match=f"{experts} experts on {ranks} ranks have more than"):
            solve_chain(wide)
