"""ExpertFlow's split of two batches against every split, and what holds for any."""

import numpy as np
import pytest
from batching_cases import cheapest_split, cost_of_split, random_routes, seeds
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import UsageError
from solvers.batching import split_exact
from solvers.batching.routes import pack_routes
from solvers.batching.split import split_cost, split_tokens
from solvers.batching.split_exact import search_split, solve_split
from solvers.exact.isolate import IsolationTimeoutError


def columns_of(route_TW):
    bit_TX = np.unpackbits(route_TW.view(np.uint8), axis=1).astype(bool)
    return np.unique(bit_TX[:, bit_TX.any(axis=0)].T, axis=0, return_counts=True)


@settings(max_examples=30, deadline=None)
@given(seeds, st.integers(0, 24), st.floats(0, 1))
def test_never_worse_than_given_and_no_swap_is_better(seed, tokens, share):
    rng = np.random.default_rng(seed)
    expert_LTK = random_routes(rng, tokens)
    route_TW = pack_routes(expert_LTK, 5)
    given_T = rng.random(tokens) < share
    found_T = split_tokens(route_TW, np.random.default_rng(seed), given_T=given_T)
    cost = split_cost(route_TW, found_T)
    assert cost == cost_of_split(expert_LTK, found_T)
    assert found_T.sum() == given_T.sum()
    assert cost <= split_cost(route_TW, given_T)
    for one in np.flatnonzero(found_T):
        for other in np.flatnonzero(~found_T):
            swapped_T = found_T.copy()
            swapped_T[[one, other]] = False, True
            assert split_cost(route_TW, swapped_T) >= cost


@settings(max_examples=12, deadline=None)
@given(seeds, st.integers(2, 12), st.integers(1, 3))
def test_cp_sat_finds_the_best_of_all_splits(seed, tokens, sites):
    """Up to 12 tokens every split can be tried. The model is solved without its process, which is slow to start."""
    expert_LTK = random_routes(np.random.default_rng(seed), tokens, sites)
    route_TW = pack_routes(expert_LTK, 5)
    size = tokens // 2
    hint_T = np.arange(tokens) >= tokens - size
    optimum = cheapest_split(expert_LTK, size)
    found_T, bound = search_split(*columns_of(route_TW), size, hint_T, 20.0, 0, 1)
    assert found_T.sum() == size
    assert cost_of_split(expert_LTK, found_T) == bound == optimum
    assert split_cost(route_TW, split_tokens(route_TW, np.random.default_rng(0))) >= optimum


def test_solved_in_its_process():
    expert_LTK = random_routes(np.random.default_rng(3), 10)
    result = solve_split(pack_routes(expert_LTK, 5), time_limit_s=20)
    assert result.objective == result.bound == cheapest_split(expert_LTK, 5)
    assert result.gap == 0
    assert cost_of_split(expert_LTK, result.second_T) == result.objective


def test_a_back_end_killed_for_time_leaves_the_heuristic_s_split(monkeypatch):
    def killed(*_, **__):
        raise IsolationTimeoutError("killed")

    monkeypatch.setattr(split_exact, "run_isolated", killed)
    expert_LTK = random_routes(np.random.default_rng(5), 12)
    result = solve_split(pack_routes(expert_LTK, 5), time_limit_s=1)
    assert result.bound <= cheapest_split(expert_LTK, 6) <= result.objective
    assert result.objective == cost_of_split(expert_LTK, result.second_T)


def test_two_kinds_of_tokens_are_told_apart():
    expert_LTK = np.array([[[0, 1], [2, 3], [0, 1], [2, 3], [0, 1], [2, 3]]], dtype=np.uint8)
    route_TW = pack_routes(expert_LTK, 4)
    second_T = split_tokens(route_TW, np.random.default_rng(0))
    assert split_cost(route_TW, np.arange(6) >= 3) == 8
    assert split_cost(route_TW, second_T) == 4
    assert len(set(second_T[::2])) == len(set(second_T[1::2])) == 1


def test_what_makes_no_sense_is_refused():
    route_TW = pack_routes(random_routes(np.random.default_rng(0), 4), 5)
    with pytest.raises(UsageError, match="given_T"):
        split_tokens(route_TW, np.random.default_rng(0), given_T=np.zeros(3, dtype=bool))
    with pytest.raises(UsageError, match="time_limit_s is 0"):
        solve_split(route_TW, time_limit_s=0)
