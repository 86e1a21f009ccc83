"""fitting_order against the banker's algorithm written out, and what a prefetch may take."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from order_cases import Case, cases, keeps_chains, least_buffer, make_case

from placer.core.device.buffer import fitting_order, prefetch_planes
from placer.core.device.flowshop import run_in_order
from placer.core.device.items import ORDER_RULES, order_items
from placer.core.device.ladder import LADDERS
from placer.core.errors import InfeasibleError


def can_all_finish(case: Case, done: list[int], buffer_bytes: int) -> bool:
    """Whether, after the items in `done`, the rest has some order that does not get stuck: every order of experts."""
    experts = [int(e) for e in np.unique(case.items.expert_I)]
    size = case.times.bytes_I
    mine = {e: np.flatnonzero(case.items.expert_I == e).tolist() for e in experts}
    held = {e: sum(int(size[i]) for i in mine[e] if i in done) for e in experts if not set(mine[e]) <= set(done)}
    if sum(held.values()) > buffer_bytes:
        return False
    for order in itertools.permutations(held):
        free, fits = buffer_bytes - sum(held.values()), True
        for expert in order:
            missing = sum(int(size[i]) for i in mine[expert] if i not in done)
            fits = fits and missing <= free
            free += held[expert]
        if fits:
            return True
    return False


def bankers_order(case: Case, order_I, buffer_bytes: int) -> list[int]:
    """The first item of the wished order that its chain allows and after which all experts can still finish."""
    result: list[int] = []
    waiting = order_I.tolist()
    size = case.times.bytes_I
    while waiting:
        heads = [i for at, i in enumerate(waiting) if case.items.expert_I[i] not in case.items.expert_I[waiting[:at]]]
        for item in heads:
            expert = case.items.expert_I[item]
            before = sum(
                int(size[i]) for i in result if any(case.items.expert_I[i] == case.items.expert_I[j] for j in waiting)
            )
            if before + size[item] > buffer_bytes and size[item]:
                continue
            last = not any(case.items.expert_I[j] == expert for j in waiting if j != item)
            if last or not size[item] or can_all_finish(case, [*result, item], buffer_bytes):
                break
        result.append(item)
        waiting.remove(item)
    return result


@settings(max_examples=150, deadline=None)
@given(case=cases(4, 3), rule=st.sampled_from(ORDER_RULES), room=st.integers(0, 15))
def test_it_is_the_first_order_from_which_all_can_finish(case: Case, rule, room: int) -> None:
    buffer_bytes = least_buffer(case) + room
    order_I = order_items(case.items, rule, case.times)
    found_I = fitting_order(case.items, case.times, order_I, buffer_bytes)
    assert found_I.tolist() == bankers_order(case, order_I, buffer_bytes)


@settings(max_examples=300, deadline=None)
@given(case=cases(8, 4), rule=st.sampled_from(ORDER_RULES), room=st.integers(0, 30))
def test_the_order_runs_in_the_buffer_and_is_unchanged_where_the_wished_one_does(case: Case, rule, room: int) -> None:
    buffer_bytes = least_buffer(case) + room
    order_I = order_items(case.items, rule, case.times)
    found_I = fitting_order(case.items, case.times, order_I, buffer_bytes)
    assert keeps_chains(case, found_I)
    run_in_order(case.items.taken(found_I), case.times.taken(found_I), buffer_bytes)
    try:
        run_in_order(case.items.taken(order_I), case.times.taken(order_I), buffer_bytes)
    except InfeasibleError:
        assert found_I.tolist() != order_I.tolist()
    else:
        assert found_I.tolist() == order_I.tolist()


def test_an_expert_that_does_not_fit_alone_is_named() -> None:
    case = make_case([[1, 1], [0, 5]])
    with pytest.raises(InfeasibleError, match="expert 0 needs 20 bytes at once and the buffer has 19; give a larger"):
        fitting_order(case.items, case.times, np.arange(4), 19)


def test_many_experts_of_equal_planes_go_one_after_another_in_the_smallest_buffer() -> None:
    """256 experts of four planes, wished plane by plane, with room for one expert: expert by expert it is."""
    case = make_case(np.tile([0, 0, 0, 3], (256, 1)))
    by_plane_I = order_items(case.items, "hebf", case.times)
    found_I = fitting_order(case.items, case.times, by_plane_I, 40)
    assert found_I.tolist() == list(range(1024))
    assert fitting_order(case.items, case.times, by_plane_I, 256 * 40).tolist() == by_plane_I.tolist()


def test_prefetch_takes_the_hottest_missing_planes_that_fit() -> None:
    predicted_EK = np.array([[0, 2, 0], [5, 0, 0], [0, 0, 3]])
    present_EK = np.zeros((3, 3), bool)
    present_EK[1, 0] = True
    plane_bytes_K = (20, 10, 10)
    taken = prefetch_planes(predicted_EK, present_EK, LADDERS["v1"], plane_bytes_K, 55)
    assert taken == [(2, 0), (2, 1), (2, 2)]
    assert prefetch_planes(predicted_EK, present_EK, LADDERS["v1"], plane_bytes_K, 70) == [*taken, (0, 0), (0, 1)]
    assert prefetch_planes(predicted_EK, present_EK, LADDERS["v1"], plane_bytes_K, 19) == []


@settings(max_examples=100, deadline=None)
@given(seed=st.integers(0, 999), room=st.integers(0, 200))
def test_prefetched_planes_fit_are_missing_and_are_usable(seed: int, room: int) -> None:
    """Every plane's lower planes are there or read before it."""
    rng = np.random.default_rng(seed)
    predicted_EK = rng.integers(0, 4, (6, 4))
    present_EK = rng.random((6, 4)) < 0.3
    plane_bytes_K = (20, 10, 5, 5)
    there = {(int(e), int(k)) for e, k in np.argwhere(present_EK)}
    used = 0
    for expert, plane in prefetch_planes(predicted_EK, present_EK, LADDERS["v2"], plane_bytes_K, room):
        assert (expert, plane) not in there
        assert predicted_EK[expert, plane:].sum() > 0
        assert all((expert, lower) in there for lower in range(plane))
        there.add((expert, plane))
        used += plane_bytes_K[plane]
    assert used <= room
