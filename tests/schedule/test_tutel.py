"""Tutel's dictionary: brute force for every key, in the paper's number of trials; r falls as capacity grows."""

from dataclasses import replace

import pytest
from choosing_cases import cluster_of
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import UsageError
from solvers.schedule.tutel import (
    DEGREES,
    WINDOW,
    FlexLayer,
    Triple,
    best_triple,
    most_trials,
    tutel_dictionary,
    valid_r,
)


def layer_of(
    nodes: int, each: int, experts: int, *, expert_bytes: int = 32 << 20, **links: tuple[float, ...]
) -> FlexLayer:
    return FlexLayer(
        cluster=cluster_of(nodes, each, **links),
        num_experts=experts,
        copy_bytes=4096,
        expert_bytes=expert_bytes,
        expert_params=expert_bytes // 2,
    )


def brute(layer: FlexLayer, capacity: int) -> tuple[float, Triple]:
    return min(
        (layer.time_ns(capacity, (r, degree, algorithm)), (r, degree, algorithm))
        for r in (0, *valid_r(layer.shards))
        for degree in DEGREES
        for algorithm in ("linear", "2dh")
    )


@pytest.mark.parametrize(
    ("nodes", "each", "experts"), [(1, 8, 1), (1, 8, 2), (4, 8, 4), (4, 8, 8), (8, 4, 8), (2, 12, 2), (4, 4, 16)]
)
def test_the_dictionary_equals_brute_force_for_every_key(nodes: int, each: int, experts: int) -> None:
    layer = layer_of(nodes, each, experts, intra=(300.0, 3.0), inter=(40.0, 8.0))
    found = tutel_dictionary(layer, 40 * WINDOW)
    assert list(found) == list(range(41))
    for key, triple in found.items():
        capacity = key * WINDOW + WINDOW // 2
        assert layer.time_ns(capacity, triple) == pytest.approx(brute(layer, capacity)[0], rel=1e-9)


@settings(max_examples=100, deadline=None)
@given(
    shards=st.integers(1, 8),
    expert_bytes=st.integers(1 << 10, 1 << 30),
    capacity=st.integers(1, 10_000),
    alpha=st.sampled_from([0.0, 3.0, 50.0]),
)
def test_search_equals_brute_force_where_groups_stay_inside_a_node(
    shards: int, expert_bytes: int, capacity: int, alpha: float
) -> None:
    layer = layer_of(3, shards, 3, expert_bytes=expert_bytes, intra=(300.0, alpha), inter=(40.0, alpha))
    _, value, trials = best_triple(shards, lambda triple: layer.time_ns(capacity, triple))
    # whole bytes and nanoseconds of a message make the convex sum uneven by as much
    assert value == pytest.approx(brute(layer, capacity)[0], rel=1e-6, abs=20)
    assert trials <= most_trials(shards)


@given(st.integers(1, 5000))
def test_trials_stay_within_the_papers_number(shards: int) -> None:
    """(log_1.5 ceil(W / E) + 2) * 4 * 2."""
    seen: list[Triple] = []

    def time(triple: Triple) -> float:
        seen.append(triple)
        return float((triple[0] - shards / 3) ** 2)

    _, _, trials = best_triple(shards, time)
    assert trials == len(seen) == len(set(seen)) <= most_trials(shards)
    assert most_trials(1) == 16


@settings(max_examples=200)
@given(shards=st.sampled_from([1, 2, 12, 64, 360, 720]), valley=st.floats(0.5, 800), slope=st.floats(0.1, 10))
def test_any_valley_is_found(shards: int, valley: float, slope: float) -> None:
    def time(triple: Triple) -> float:
        r = triple[0]
        return (1e6 if r == 0 else abs(r - valley) * (slope if r < valley else 1.0)) + triple[1]

    (_, degree, algorithm), value, _ = best_triple(shards, time)
    assert value == min(time((one, 1, "linear")) for one in valid_r(shards))
    assert (degree, algorithm) == (1, "linear")


def test_where_the_time_has_two_valleys_the_search_may_miss_the_better() -> None:
    """Small r gather across nodes, larger ones inside: the time falls, rises, drops at that edge and rises again."""
    layer = replace(layer_of(4, 3, 1, expert_bytes=12 << 20, intra=(300.0, 0.0), inter=(1.0, 0.0)), expert_params=1)
    capacity = round(2.3 * (1 << 20) / 6144)
    times = [layer.time_ns(capacity, (r, 1, "linear")) for r in (1, 2, 3, 4, 6)]
    assert times[0] > times[1] < times[2] > times[3] < times[4]
    _, found, _ = best_triple(layer.shards, lambda triple: layer.time_ns(capacity, triple))
    assert found > brute(layer, capacity)[0]


def test_r_falls_as_capacity_grows_and_data_parallelism_comes_last() -> None:
    """Figure 12: few tokens travel more cheaply than weights; many are best left where they are (r = 0)."""
    layer = layer_of(1, 16, 2, expert_bytes=8 << 20, intra=(50.0, 1.0))
    chosen = [
        best_triple(8, lambda triple, c=c: layer.time_ns(c, triple))[0][0] for c in (8, 64, 256, 1024, 4096, 65536)
    ]
    order = [99 if r == 0 else -r for r in chosen]
    assert order == sorted(order)
    assert chosen[0] == 8
    assert chosen[-1] == 0
    assert len(set(chosen)) >= 4


def test_2dh_and_deeper_pipelines_are_chosen_where_they_pay() -> None:
    layer = layer_of(8, 8, 64, expert_bytes=1 << 22, intra=(370.0, 1.0), inter=(45.0, 8.0))
    few, many = (brute(layer, capacity)[1] for capacity in (1, 500))
    assert few[2] == "2dh"
    assert many[1] > few[1]
    larger = replace(layer, expert_bytes=1 << 26, expert_params=1 << 25)
    assert brute(larger, 20_000)[1][2] == "linear"


def test_experts_that_do_not_divide_the_ranks_are_refused() -> None:
    with pytest.raises(UsageError, match="num_experts is 3"):
        layer_of(1, 8, 3)
