"""run_in_order against three machines that look for work whenever something ends; the bounds against every order."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from order_cases import Case, cases, least_buffer, make_case, run_by_events

from placer.core.device.buffer import fitting_order
from placer.core.device.flowshop import ItemSpans, makespan_bound_ns, run_in_order
from placer.core.device.items import ORDER_RULES, order_items
from placer.core.errors import InfeasibleError
from solvers.io_order.exhaustive import solve_exhaustively
from solvers.io_order.rule import lag_bound_ns


def spans_of(case: Case, order_I, buffer_bytes: int | None) -> ItemSpans:
    return run_in_order(case.items.taken(order_I), case.times.taken(order_I), buffer_bytes)


@settings(max_examples=300, deadline=None)
@given(
    case=cases(4, 4, copies=True),
    rule=st.sampled_from(ORDER_RULES),
    room=st.integers(0, 20) | st.none(),
    fit=st.booleans(),
)
def test_spans_are_those_of_three_machines_that_take_the_items_in_order(case, rule, room, fit) -> None:
    """Also where an order that was not made to fit gets stuck: then run_in_order refuses it."""
    buffer_bytes = None if room is None else least_buffer(case) + room
    order_I = order_items(case.items, rule, case.times)
    if fit and buffer_bytes is not None:
        order_I = fitting_order(case.items, case.times, order_I, buffer_bytes)
    expected = run_by_events(case, order_I, buffer_bytes)
    if expected is None:
        assert not fit
        with pytest.raises(InfeasibleError, match="give a larger buffer"):
            spans_of(case, order_I, buffer_bytes)
        return
    spans = spans_of(case, order_I, buffer_bytes)
    for stage in ("read", "copy", "compute"):
        got = zip(getattr(spans, f"{stage}_start_ns_I"), getattr(spans, f"{stage}_end_ns_I"), strict=True)
        assert [(int(a), int(b)) for a, b in got] == expected[stage], stage


def test_an_expert_gives_its_bytes_back_when_its_last_plane_is_computed() -> None:
    """Two experts of two planes of 10 bytes, room for three: B's second read waits for A's end at 10 + 10 + 7."""
    case = make_case([[0, 7], [0, 7]], compute_I=[0, 7, 0, 7])
    spans = run_in_order(case.items, case.times, 30)
    assert spans.read_start_ns_I.tolist() == [0, 10, 20, 30]
    assert run_in_order(case.items, case.times, 20).read_start_ns_I.tolist() == [0, 10, 27, 37]
    assert run_in_order(case.items, case.times, 20).makespan_ns == 47 + 7


def test_a_plane_in_memory_is_ready_at_once_but_waits_for_its_turn() -> None:
    case = make_case([[3], [4]], present_EK=[[False], [True]])
    assert run_in_order(case.items, case.times).compute_start_ns_I.tolist() == [10, 13]
    turned = np.array([1, 0])
    assert run_in_order(case.items.taken(turned), case.times.taken(turned)).compute_start_ns_I.tolist() == [0, 10]


def test_no_items_take_no_time() -> None:
    case = make_case([[0, 0]])
    assert run_in_order(case.items, case.times, 0).makespan_ns == 0
    assert makespan_bound_ns(case.times) == 0
    assert lag_bound_ns(case.items, case.times) == 0


@settings(max_examples=100, deadline=None)
@given(case=cases(3, 3, copies=True), room=st.integers(0, 20) | st.none())
def test_no_order_ends_before_the_bounds(case: Case, room: int | None) -> None:
    buffer_bytes = None if room is None else least_buffer(case) + room
    optimum = solve_exhaustively(case.items, case.times, buffer_bytes=buffer_bytes).objective
    assert makespan_bound_ns(case.times) <= optimum
    assert lag_bound_ns(case.items, case.times) <= optimum


@settings(max_examples=100, deadline=None)
@given(case=cases(6, 4, copies=True), seed=st.integers(0, 999))
def test_no_order_of_many_items_ends_before_the_bounds_nor_after_twice_the_work(case: Case, seed: int) -> None:
    """SEEDS' form of the machine bound for all-missing items included: sum of reads + shortest computing, and so on."""
    keys = np.random.default_rng(seed).random(len(case.items))
    order_I = np.lexsort([keys, np.zeros(len(keys))])
    by_expert = {e: sorted(np.flatnonzero(case.items.expert_I == e)) for e in np.unique(case.items.expert_I)}
    order_I = np.array([by_expert[case.items.expert_I[i]].pop(0) for i in order_I])
    makespan = spans_of(case, order_I, None).makespan_ns
    times = case.times
    assert max(makespan_bound_ns(times), lag_bound_ns(case.items, times)) <= makespan
    assert makespan <= times.read_ns_I.sum() + times.copy_ns_I.sum() + times.compute_ns_I.sum()
    if not case.items.present_I.any():
        assert makespan >= times.compute_ns_I.sum() + times.read_ns_I.min()
        assert makespan >= times.read_ns_I.sum() + times.compute_ns_I.min()


@settings(max_examples=100, deadline=None)
@given(case=cases(4, 3, copies=True), room=st.integers(0, 20), more=st.integers(0, 20))
def test_a_larger_buffer_never_makes_an_order_later(case: Case, room: int, more: int) -> None:
    small = least_buffer(case) + room
    order_I = fitting_order(case.items, case.times, order_items(case.items, "hebf", case.times), small)
    ends = [spans_of(case, order_I, size).makespan_ns for size in (small, small + more, None)]
    assert ends == sorted(ends, reverse=True)
