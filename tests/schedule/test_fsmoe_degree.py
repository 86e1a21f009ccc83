"""FSMoE's Algorithm 1 against brute force, forward and backward."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from solvers.schedule.fsmoe import ChunkTime, LayerTimes, algorithm_1, best_degree

MOST = 32
ALPHAS = st.integers(0, 300)
VOLUMES = st.integers(0, 20_000)
chunk_times = st.builds(ChunkTime, ALPHAS, VOLUMES)
layers = st.builds(LayerTimes, chunk_times, chunk_times, chunk_times, chunk_times)


@settings(max_examples=200, deadline=None)
@given(times=layers, gar=st.sampled_from([0.0, 500.0, 20_000.0]))
def test_algorithm_1_is_as_fast_as_brute_force_forward_and_backward(times: LayerTimes, gar: float) -> None:
    for way in (times, times.backward()):
        found, brute = algorithm_1(way, MOST, gar), best_degree(way, MOST, gar)
        assert found.time_ns == pytest.approx(brute.time_ns, rel=1e-9, abs=1e-6)
        assert found.time_ns == way.time_ns(found.degree, gar)


@settings(max_examples=100, deadline=None)
@given(times=layers, gar=st.sampled_from([0.0, 500.0, 20_000.0]), degree=st.integers(1, MOST))
def test_with_equal_collectives_inside_the_time_is_the_largest_case(times: LayerTimes, gar: float, degree: int) -> None:
    times = LayerTimes(times.a2a, times.ag, times.ag, times.exp)
    chunk = times.at(degree)
    a2a, ag, rs, exp = chunk.a2a_ns, chunk.gather_ns, chunk.scatter_ns, chunk.experts_ns
    cases = (
        2 * degree * a2a + gar,
        2 * a2a + ag + rs + degree * exp,
        2 * degree * a2a + ag + rs,
        2 * a2a + degree * (ag + rs),
    )
    assert times.time_ns(degree, gar) == pytest.approx(max(cases), rel=1e-9, abs=1e-6)
    # so the best real degree is no slower than any degree
    found = algorithm_1(times, MOST, gar)
    real = times.time_ns(found.real_degree, gar)
    for other in np.linspace(1, MOST, 100):
        assert real <= times.time_ns(other, gar) * (1 + 1e-9) + 1e-6


def test_forward_and_backward_often_differ() -> None:
    """912 of the paper's 1458 configurations have two optimal degrees; in such a grid most do."""
    differ = total = 0
    for volume in (2_000.0, 10_000.0, 50_000.0):
        for inside in (1_000.0, 5_000.0):
            for expert in (2_000.0, 10_000.0, 40_000.0):
                times = LayerTimes(
                    ChunkTime(150.0, volume), ChunkTime(40.0, inside), ChunkTime(40.0, inside), ChunkTime(60.0, expert)
                )
                forward, back = (algorithm_1(way, MOST) for way in (times, times.backward()))
                assert forward.time_ns == best_degree(times, MOST).time_ns
                differ += forward.degree != back.degree
                total += 1
    assert differ > total / 2


def test_without_alpha_more_chunks_are_never_worse_and_with_it_the_optimum_is_the_square_root() -> None:
    """Compute-bound: 2 a2a + ag + rs + r exp is least at sqrt((2 n_a2a + n_ag + n_rs) / alpha_exp)."""
    times = LayerTimes(ChunkTime(0, 900), ChunkTime(0, 100), ChunkTime(0, 100), ChunkTime(20, 50_000))
    found = algorithm_1(times, MOST)
    assert found.real_degree == pytest.approx(10)
    assert found.degree == 10
    free = LayerTimes(ChunkTime(0, 900), ChunkTime(0, 100), ChunkTime(0, 100), ChunkTime(0, 50_000))
    assert algorithm_1(free, MOST).degree == MOST
