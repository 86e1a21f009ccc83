"""Gradient partition: its laws, brute force on few layers, and the two ends that are clear by hand."""

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.errors import UsageError
from solvers.schedule.fsmoe import ChunkTime, LayerTimes, algorithm_1
from solvers.schedule.gradient import AllReduce, BackwardLayer, partition_gradients, slot_ns

MOST = 4
UNITS = 6
chunk_times = st.builds(ChunkTime, st.integers(0, 50), st.integers(0, 3000))
layers = st.builds(
    BackwardLayer,
    times=st.builds(LayerTimes, chunk_times, chunk_times, chunk_times, chunk_times),
    dense_ns=st.integers(0, 500),
    gradient_bytes=st.integers(0, 3000),
)


def total_ns(stack: list[BackwardLayer], slot_bytes: np.ndarray, reduce: AllReduce) -> float:
    inside = sum(
        slot_ns(layer, size, reduce, MOST) for layer, size in zip(stack, slot_bytes[:-1].tolist(), strict=True)
    )
    return inside + reduce.time_ns(float(slot_bytes[-1]))


def legal(stack: list[BackwardLayer], slot_bytes: np.ndarray) -> bool:
    ready = np.concatenate([[0.0], np.cumsum([layer.gradient_bytes for layer in stack])])
    return bool((np.cumsum(slot_bytes) <= ready + 1e-6).all())


@settings(max_examples=60, deadline=None)
@given(
    stack=st.lists(layers, min_size=1, max_size=3),
    alpha=st.sampled_from([0, 40, 400]),
    rate=st.sampled_from([0.5, 2.0]),
)
def test_slices_are_legal_and_no_worse_than_any_in_equal_parts(
    stack: list[BackwardLayer], alpha: float, rate: float
) -> None:
    reduce = AllReduce(alpha, rate)
    found = partition_gradients(stack, reduce, most_chunks=MOST, units=UNITS)
    every = sum(layer.gradient_bytes for layer in stack)
    assert (found.slot_bytes >= 0).all()
    assert found.slot_bytes.sum() == pytest.approx(every)
    assert legal(stack, found.slot_bytes), "a slice starts before its gradient exists"
    assert found.time_ns == pytest.approx(total_ns(stack, found.slot_bytes, reduce))
    assert found.time_ns <= found.at_the_end_ns
    for counts in product(range(UNITS + 1), repeat=len(stack)):
        if sum(counts) <= UNITS:
            other = np.array([*counts, UNITS - sum(counts)]) * (every / UNITS)
            if legal(stack, other):
                assert found.time_ns <= total_ns(stack, other, reduce) + 1e-6


def test_what_fits_beside_compute_is_free() -> None:
    """Two compute-bound layers: the first's gradients vanish beside the second, the second's wait for the end."""
    busy = LayerTimes(ChunkTime(0, 10), ChunkTime(0, 0), ChunkTime(0, 0), ChunkTime(5, 1000))
    stack = [BackwardLayer(times=busy, dense_ns=0, gradient_bytes=size) for size in (500, 300)]
    found = partition_gradients(stack, AllReduce(0, 1.0), most_chunks=1)
    assert found.slot_bytes == pytest.approx([0, 500, 300])
    alone = 2 * algorithm_1(busy, 1).time_ns
    assert found.time_ns == pytest.approx(alone + 300)
    assert found.at_the_end_ns == pytest.approx(alone + 800)


def test_the_dense_part_hides_too_and_a_busy_network_nothing() -> None:
    network = LayerTimes(ChunkTime(0, 1000), ChunkTime(0, 0), ChunkTime(0, 0), ChunkTime(0, 0))
    first = BackwardLayer(times=network, dense_ns=0, gradient_bytes=1000)
    for dense, hidden in ((0, 0), (400, 400)):
        second = BackwardLayer(times=network, dense_ns=dense, gradient_bytes=0)
        found = partition_gradients([first, second], AllReduce(0, 1.0), most_chunks=1)
        assert found.at_the_end_ns - found.time_ns == pytest.approx(hidden)


def test_step_one_is_exact_where_parts_are_coarse() -> None:
    """What the second layer hides, 990 of 1234 bytes, is no multiple of a part."""
    busy = LayerTimes(ChunkTime(0, 10), ChunkTime(0, 0), ChunkTime(0, 0), ChunkTime(0, 990))
    first = BackwardLayer(times=busy, dense_ns=0, gradient_bytes=1234)
    second = BackwardLayer(times=busy, dense_ns=0, gradient_bytes=0)
    found = partition_gradients([first, second], AllReduce(0, 1.0), most_chunks=1, units=2)
    assert found.at_the_end_ns - found.time_ns == pytest.approx(990)


def test_negative_sizes_are_refused() -> None:
    none = ChunkTime(0, 0)
    with pytest.raises(UsageError, match="gradient_bytes is -1"):
        BackwardLayer(times=LayerTimes(none, none, none, none), dense_ns=0, gradient_bytes=-1)
