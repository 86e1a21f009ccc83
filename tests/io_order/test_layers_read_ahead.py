"""Layers in a row: run_layers against one layer and by hand, CP-SAT against every order, and the bound at scale."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from order_cases import cases, keeps_chains, least_buffer, make_case, random_case

from placer.core.device.flowshop import run_in_order
from placer.core.device.items import order_items
from placer.core.errors import InfeasibleError, UsageError
from solvers.io_order.cpsat import solve_layers_by_cpsat
from solvers.io_order.layers import LayerLoad, most_from_reading_ahead, read_ahead_bound_ns, run_layers

HORIZONS = (0, 1, None)


def load(case, attention_ns: int = 0) -> LayerLoad:
    return LayerLoad(items=case.items, times=case.times, attention_ns=attention_ns)


def random_layers(seed: int, count: int, *, experts: int = 2, planes: int = 2, copies: bool = False):
    """Layers, and a buffer in which each can run."""
    rng = np.random.default_rng(seed)
    all_cases = [random_case(rng, experts=experts, planes=planes, copies=copies) for _ in range(count)]
    room = max(least_buffer(case) for case in all_cases) + int(rng.integers(0, 6))
    return all_cases, [load(case, int(rng.integers(0, 8))) for case in all_cases], room


def every_order(case):
    for order in itertools.permutations(range(len(case.items))):
        if keeps_chains(case, np.array(order)):
            yield np.array(order)


@settings(max_examples=100, deadline=None)
@given(case=cases(4, 3, copies=True), attention=st.integers(0, 9), room=st.integers(0, 9), limited=st.booleans())
def test_one_layer_ends_as_its_flow_shop_does(case, attention: int, room: int, limited: bool) -> None:
    order_I = order_items(case.items, "by_id", case.times)
    buffer_bytes = least_buffer(case) + room if limited else None
    alone = run_in_order(case.items.taken(order_I), case.times.taken(order_I), buffer_bytes).makespan_ns
    assert run_layers([load(case, attention)], [order_I], buffer_bytes=buffer_bytes) == attention + alone
    assert run_layers([load(case, attention)], [order_I], ahead=1, buffer_bytes=buffer_bytes) == attention + alone


def test_two_layers_by_hand() -> None:
    """Each: attention 5, a plane read in 10, computed in 20. Ahead, the second read ends at 25, before 35 + 5."""
    case = make_case([[20]])
    layers, orders = [load(case, 5), load(case, 5)], [np.array([0])] * 2
    assert run_layers(layers, orders, ahead=0) == 35 + 5 + 10 + 20
    assert run_layers(layers, orders, ahead=1) == 35 + 5 + 20
    assert run_layers(layers, orders, ahead=None) == 10 + 20 + 5 + 20
    # with room for one plane the second is read when the first is computed
    assert run_layers(layers, orders, ahead=1, buffer_bytes=10) == 35 + 10 + 20
    gain = most_from_reading_ahead(layers)
    assert (gain.none_ns, gain.one_layer_ns, gain.everything_ns) == (70, 60, 55)
    assert gain.most_gain == pytest.approx(70 / 60)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("ahead", HORIZONS)
def test_cpsat_finds_the_best_of_all_orders_of_two_layers(seed: int, ahead: int | None) -> None:
    all_cases, layers, room = random_layers(seed, 2, copies=seed % 3 == 0)
    buffer_bytes = None if seed % 2 else room
    ends = []
    for orders in itertools.product(*(every_order(case) for case in all_cases)):
        try:
            ends.append(run_layers(layers, orders, ahead=ahead, buffer_bytes=buffer_bytes))
        except InfeasibleError:
            continue
    found = solve_layers_by_cpsat(layers, ahead=ahead, buffer_bytes=buffer_bytes, isolated=False)
    assert found.proven
    assert found.objective == min(ends)
    assert read_ahead_bound_ns(layers, ahead=ahead) <= found.objective


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ahead", HORIZONS)
def test_the_bound_is_the_optimum_of_three_layers_without_copies_and_limit(seed: int, ahead: int | None) -> None:
    _, layers, _ = random_layers(seed, 3, experts=3)
    assert solve_layers_by_cpsat(layers, ahead=ahead, isolated=False).objective == read_ahead_bound_ns(
        layers, ahead=ahead
    )


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6), count=st.integers(1, 5), copies=st.booleans(), rule=st.sampled_from(["hebf", "by_id"])
)
def test_no_orders_of_many_layers_end_before_the_bound(seed: int, count: int, copies: bool, rule) -> None:
    _, layers, _ = random_layers(seed, count, experts=5, planes=3, copies=copies)
    orders = [order_items(each.items, rule, each.times) for each in layers]
    johnson = [order_items(each.items, "johnson", each.times) for each in layers]
    for ahead in HORIZONS:
        bound = read_ahead_bound_ns(layers, ahead=ahead)
        assert bound <= run_layers(layers, orders, ahead=ahead)
        if not copies:
            assert bound == run_layers(layers, johnson, ahead=ahead)
    gain = most_from_reading_ahead(layers)
    assert gain.none_ns >= gain.one_layer_ns >= gain.everything_ns
    assert gain.everything_ns >= sum(each.attention_ns + int(each.times.compute_ns_I.sum()) for each in layers)
    assert gain.everything_ns >= sum(int(each.times.read_ns_I.sum()) for each in layers)


def test_a_horizon_below_nothing_is_refused() -> None:
    layers = [load(make_case([[1]]))]
    with pytest.raises(UsageError, match="ahead is -1"):
        read_ahead_bound_ns(layers, ahead=-1)
    with pytest.raises(UsageError, match="ahead is -1"):
        solve_layers_by_cpsat(layers, ahead=-1)
    with pytest.raises(UsageError, match="ahead is -2"):
        run_layers(layers, [np.array([0])], ahead=-2)
