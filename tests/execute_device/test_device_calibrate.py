"""Calibration recovers what it is given, times what a run does, and refuses what is no fit."""

import numpy as np
import pytest
from device_run_cases import make_device, write_planes

from placer.core.errors import ExecutionError, InfeasibleError, UsageError
from placer.execute.device import bench, calibrate
from placer.execute.device.bench import LoopTimes, loop_times, placeholder_device, read_sizes, time_reads
from placer.execute.device.calibrate import calibrate_device, fit_compute

TOKENS = (1, 4, 16, 64)
FFN_US = np.array([30.0, 45.0, 105.0, 345.0])


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_planes(tmp_path_factory.mktemp("planes") / "planes.safetensors", hidden=64, inner=64)


def made_times(*, residual_us=25.0, noise=None):
    expert_KN = 1e3 * (100.0 + FFN_US + residual_us * np.arange(3)[:, None])
    layer_tokens = np.array([2, 8, 32, 128])
    times = LoopTimes(
        expert_KN=expert_KN if noise is None else expert_KN * noise,
        layer_N=1e3 * (200.0 + 3.0 * layer_tokens),
        tokens_N=layer_tokens,
        slowdown=1.25,
    )
    return times, expert_KN


def test_times_of_the_model_are_recovered() -> None:
    times, expert_KN = made_times()
    compute, about = fit_compute(times, TOKENS, nested=True)
    for level in range(3):
        for at, tokens in enumerate(TOKENS):
            planes_ns = 1e3 * (compute.base_us + level * compute.residual_us)
            assert planes_ns + 1e3 * compute.ffn_time_us(tokens) == pytest.approx(expert_KN[level, at], rel=1e-3)
    assert compute.residual_us == pytest.approx(25)
    assert compute.layer_us == pytest.approx(200, rel=1e-3)
    assert compute.layer_token_us == pytest.approx(3, rel=1e-3)
    assert compute.io_slowdown == 1.25
    assert about["layer_r2"] == pytest.approx(1)
    assert about["expert_max_residual"] < 1e-6


def test_copies_have_no_residual_planes() -> None:
    times, _ = made_times()
    compute, _ = fit_compute(times, TOKENS, nested=False)
    assert compute.residual_us == 0
    assert compute.base_us + compute.ffn_time_us(1) == pytest.approx(100 + 30 + 25)


def test_what_is_no_fit_is_refused() -> None:
    times, _ = made_times(noise=np.array([[1, 1, 1, 0.2]] * 3))
    with pytest.raises(ExecutionError, match="quiet machine"):
        fit_compute(times, TOKENS, nested=True)
    times, _ = made_times(noise=np.array([[1, 4, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1]]))
    with pytest.raises(ExecutionError, match="a residual plane leave"):
        fit_compute(times, TOKENS, nested=True)


def test_the_disk_that_reads_are_timed_by_is_the_disk_of_the_device(index, monkeypatch) -> None:
    def reads(of, sizes, *_):
        return np.tile(50e3 + np.array(sizes) / 0.5, (4, 1))

    monkeypatch.setattr(calibrate, "time_reads", reads)
    monkeypatch.setattr(calibrate, "loop_times", lambda *_, **__: made_times()[0])
    # the loop takes 7 us more for every read
    monkeypatch.setattr(
        calibrate, "times_of_loads", lambda *_, **__: {n: np.array([57e3 + n / 0.5]) for n in index.plane_bytes_K}
    )
    device, about = calibrate_device(index, memory_mib=64, tokens=TOKENS, name="mine")
    assert device.disk.gbytes_per_s == pytest.approx(0.5, rel=1e-3)
    assert device.disk.alpha_us == pytest.approx(57, rel=1e-3)
    assert (device.name, device.memory_mib, device.disk_limit_mbytes_per_s) == ("mine", 64, None)
    assert about["disk"]["r2"] == 1
    assert max(abs(value) for value in about["disk"]["loop_residual"].values()) < 1e-3
    monkeypatch.setattr(
        calibrate, "time_reads", lambda of, sizes, *_: np.tile(np.random.default_rng(0).permutation(sizes), (4, 1))
    )
    with pytest.raises(ExecutionError, match="the disk refused"):
        calibrate_device(index, memory_mib=64)


def test_the_loop_is_timed_for_every_level_and_number_of_tokens(index, tmp_path) -> None:
    copies = write_planes(tmp_path / "copies", hidden=64, inner=64, nested=False)
    for planes in (index, copies):
        device = placeholder_device(64, None)
        times = loop_times(planes, device, (1, 3), top_k=2, repetitions=2, seed=0)
        assert times.expert_KN.shape == (3, 2)
        assert (times.expert_KN > 0).all()
        assert (times.layer_N > 0).all()
        # four experts of so many tokens each, two choices a token
        assert times.tokens_N.tolist() == [2, 6]
        assert times.slowdown >= 1
        loads = bench.times_of_loads(planes, device, top_k=2, iterations=2, seed=0)
        assert set(loads) == set(planes.plane_bytes_K)


def test_reads_are_timed_around_the_sizes_of_the_planes(index) -> None:
    sizes = read_sizes(index)
    assert sizes == sorted(set(sizes))
    assert set(index.plane_bytes_K) < set(sizes)
    time_IN = time_reads(index, sizes, 50.0, 3, np.random.default_rng(0))
    # the limit is the least that a read may take, and holds for all together
    assert time_IN.sum() >= 3 * sum(sizes) / 0.05 * 0.999


def test_arguments_that_make_no_sense(index) -> None:
    for tokens in ((4,), (4, 1), (0, 1)):
        with pytest.raises(UsageError, match="tokens is"):
            calibrate_device(index, memory_mib=64, tokens=tokens)
    with pytest.raises(UsageError, match="repetitions is 1"):
        calibrate_device(index, memory_mib=64, repetitions=1)
    with pytest.raises(InfeasibleError, match="larger budget"):
        loop_times(index, make_device(memory_mib=0.001), (1, 2), top_k=2, repetitions=2, seed=0)
