"""Chain-Johnson = table = CP-SAT = every order tried; copies, buffers, refusals; HEBF where it is optimal."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from order_cases import Case, cases, keeps_chains, least_buffer, make_case, random_case

from placer.core.device.items import ItemTimes, order_items
from placer.core.errors import UsageError
from solvers.io_order.cpsat import solve_by_cpsat
from solvers.io_order.exhaustive import number_of_orders, solve_exhaustively
from solvers.io_order.result import OrderResult
from solvers.io_order.rule import lag_bound_ns, solve_by_rule
from solvers.io_order.table import solve_by_table


def assert_optimal(case: Case, result: OrderResult) -> None:
    assert (result.status, result.stopped_by, result.gap) == ("solved", "optimal", 0.0)
    assert result.order_I is not None
    assert keeps_chains(case, result.order_I)


@pytest.mark.parametrize("seed", range(100))
def test_four_ways_to_the_optimum_agree(seed: int) -> None:
    rng = np.random.default_rng(seed)
    case = random_case(rng, experts=int(rng.integers(1, 5)), planes=int(rng.integers(1, 4)), longest=30)
    johnson, table = solve_by_rule(case.items, case.times), solve_by_table(case.items, case.times)
    results = [johnson, table, solve_by_cpsat(case.items, case.times, isolated=False)]
    if number_of_orders(case.items) <= 5000:
        results.append(solve_exhaustively(case.items, case.times))
    for result in results:
        assert_optimal(case, result)
        assert result.objective == johnson.objective


@settings(max_examples=100, deadline=None)
@given(case=cases(7, 4))
def test_johnson_is_the_tables_optimum_for_more_experts(case: Case) -> None:
    johnson, table = solve_by_rule(case.items, case.times), solve_by_table(case.items, case.times)
    assert_optimal(case, johnson)
    assert johnson.objective == table.objective


@pytest.mark.parametrize("seed", range(40))
def test_cpsat_knows_the_copy_and_the_buffer(seed: int) -> None:
    """The same optimum as every order tried, never below the one without a limit, never above a rule's."""
    rng = np.random.default_rng(seed)
    case = random_case(rng, copies=bool(seed % 2))
    buffer_bytes = least_buffer(case) + int(rng.integers(0, 6))
    exact = solve_by_cpsat(case.items, case.times, buffer_bytes=buffer_bytes, isolated=False)
    assert_optimal(case, exact)
    assert exact.objective == solve_exhaustively(case.items, case.times, buffer_bytes=buffer_bytes).objective
    assert exact.objective >= solve_exhaustively(case.items, case.times).objective
    for rule in ("by_id", "hebf", "resident_first", "johnson"):
        found = solve_by_rule(case.items, case.times, rule, buffer_bytes=buffer_bytes)
        assert found.bound <= exact.objective <= found.objective


@settings(max_examples=100, deadline=None)
@given(case=cases(3, 3, copies=True))
def test_johnson_is_exact_where_no_copy_is_longer_than_a_read(case: Case) -> None:
    loaded_I = case.times.bytes_I > 0
    shortest = int(case.times.read_ns_I[loaded_I].min(initial=100))
    times = ItemTimes(
        read_ns_I=case.times.read_ns_I,
        copy_ns_I=np.minimum(case.times.copy_ns_I, shortest),
        compute_ns_I=case.times.compute_ns_I,
        bytes_I=case.times.bytes_I,
    )
    found = solve_by_rule(case.items, times)
    assert found.stopped_by == "optimal"
    assert found.objective == solve_exhaustively(case.items, times).objective == lag_bound_ns(case.items, times)


@settings(max_examples=200, deadline=None)
@given(data=st.data(), read=st.integers(1, 60), unit=st.integers(1, 20))
def test_hebf_is_optimal_with_uniform_planes_none_of_them_in_memory(data: st.DataObject, read: int, unit: int) -> None:
    """D2MoE's cost: a plane computes every token that uses it."""
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    experts, planes = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    count_EK = rng.integers(0, 6, (experts, planes))
    bare = make_case(count_EK, read_K=[read] * planes)
    case = make_case(count_EK, read_K=[read] * planes, compute_I=unit * bare.items.heat_I)
    hebf = solve_by_rule(case.items, case.times, "hebf")
    assert_optimal(case, hebf)
    assert hebf.objective == solve_by_table(case.items, case.times).objective


def test_hebf_wastes_time_beside_a_resident_base_plane_and_resident_first_does_not() -> None:
    """A is hotter and must be read; B's planes are in memory and could be computed meanwhile: 10 + 11 against 11."""
    case = make_case([[11], [10]], present_EK=[[False], [True]])
    assert order_items(case.items, "hebf", case.times).tolist() == [0, 1]
    assert solve_by_rule(case.items, case.times, "hebf").objective == 10 + 11 + 10
    assert solve_by_rule(case.items, case.times, "resident_first").objective == 10 + 11
    assert solve_by_rule(case.items, case.times).objective == 21


def test_hebf_can_take_nearly_twice_the_optimum_where_reads_differ() -> None:
    """The hottest expert takes as long to read as a hundred others take to compute; nothing takes more than twice."""
    case = make_case([[11]] + [[10]] * 100, read_EK=[[1000]] + [[1]] * 100)
    hebf, best = solve_by_rule(case.items, case.times, "hebf"), solve_by_rule(case.items, case.times)
    assert hebf.objective == 1000 + 11 + 1000
    assert best.objective == 100 + 1000 + 11
    assert 1.8 < hebf.objective / best.objective <= 2


def test_any_rule_says_how_far_from_the_optimum_it_may_be() -> None:
    case = make_case([[11], [10]], present_EK=[[False], [True]])
    hebf = solve_by_rule(case.items, case.times, "hebf")
    assert (hebf.stopped_by, hebf.bound, hebf.gap) == ("effort", 21, pytest.approx(10 / 31))


def test_a_process_of_its_own_gives_the_same_order() -> None:
    case = random_case(np.random.default_rng(5), copies=True)
    here = solve_by_cpsat(case.items, case.times, buffer_bytes=30, isolated=False)
    there = solve_by_cpsat(case.items, case.times, buffer_bytes=30, time_limit_s=20.0)
    assert there.order_I is not None
    assert here.order_I is not None
    assert there.order_I.tolist() == here.order_I.tolist()
    assert there.objective == here.objective


def test_no_time_is_said_to_be_no_time() -> None:
    case = random_case(np.random.default_rng(1), experts=8, planes=4, copies=True)
    result = solve_by_cpsat(case.items, case.times, time_limit_s=1e-9, isolated=False)
    assert (result.status, result.stopped_by, result.order_I) == ("error", "time_limit", None)
    assert "give it more time" in result.message


@pytest.mark.parametrize("solve", [solve_by_rule, solve_exhaustively, solve_by_cpsat])
def test_an_expert_that_does_not_fit_makes_it_infeasible(solve) -> None:
    case = make_case([[1, 1], [0, 5]])
    result = solve(case.items, case.times, buffer_bytes=19)
    assert (result.status, result.stopped_by, result.objective, result.gap) == ("infeasible", "infeasible", None, None)
    assert "expert 0 needs 20 bytes at once and the buffer has 19" in result.message


def test_a_layer_without_items_takes_no_time() -> None:
    case = make_case([[0, 0]])
    results = [solve(case.items, case.times) for solve in (solve_by_rule, solve_exhaustively, solve_by_table)] + [
        solve_by_cpsat(case.items, case.times, isolated=False)
    ]
    assert [result.objective for result in results] == [0] * 4


def test_what_is_too_large_for_an_oracle_is_refused() -> None:
    case = random_case(np.random.default_rng(0), experts=40, planes=4, copies=True)
    with pytest.raises(UsageError, match="orders, above the 2000000"):
        solve_exhaustively(case.items, case.times)
    with pytest.raises(UsageError, match="table takes no copies"):
        solve_by_table(case.items, case.times)
    plain = random_case(np.random.default_rng(0), experts=40, planes=4)
    with pytest.raises(UsageError, match="states, above the 20000000"):
        solve_by_table(plain.items, plain.times)
