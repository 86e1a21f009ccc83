"""Reads are of the disk, as fast as the limit lets them, and into memory that the system sees."""

import os

import numpy as np
import pytest
from device_run_cases import make_device, make_device_plan, make_work, write_planes
from hypothesis import given
from hypothesis import strategies as st

from placer.core.device.ladder import BitLadder, expert_shapes
from placer.core.errors import InputFileError
from placer.execute.device import run_device
from placer.execute.device.arena import Arena
from placer.execute.device.files import BLOCK_BYTES, PlaneFile
from placer.execute.device.limit import RateLimit
from placer.execute.device.system import disk_read_bytes, reset_peak_rss
from traces.plane_store import PlaneFileHeader, save_planes

SLACK_BYTES = 8 << 20


@pytest.fixture
def noise(tmp_path):
    """A file of random bytes, all of them in the page cache and on the disk."""
    path = tmp_path / "noise"
    raw = np.random.default_rng(0).integers(0, 256, 1_000_001, dtype=np.uint8)
    with path.open("wb") as file:
        file.write(raw.tobytes())
        file.flush()
        os.fsync(file.fileno())
    assert path.read_bytes() == raw.tobytes()
    return path, raw


def require_a_real_disk(path):
    """Skips where the page cache or memory answers by design."""
    before = disk_read_bytes()
    if before is None:
        pytest.skip("this system does not count the bytes that a process reads from disks")
    with PlaneFile(path, BLOCK_BYTES) as file:
        file.read(8 * BLOCK_BYTES, BLOCK_BYTES)
        if file.read_mode != "direct" or disk_read_bytes() == before:
            pytest.skip("this file system has no direct reads of a disk")


def test_any_range_is_read_exactly(noise) -> None:
    path, raw = noise
    rng = np.random.default_rng(1)
    with PlaneFile(path, 50_000) as file:
        ranges = [(0, 1), (0, 50_000), (999_999, 2), (4095, 2), (4096, 4096), (1_000_000, 1)]
        ranges += [(int(rng.integers(900_000)), int(rng.integers(1, 50_000))) for _ in range(30)]
        for offset, size in ranges:
            np.testing.assert_array_equal(file.read(offset, size), raw[offset : offset + size])
        assert file.asked_bytes == sum(size for _, size in ranges) <= file.block_bytes
        with pytest.raises(InputFileError, match=r"truncated: ends at byte 1000001, 1000002 needed"):
            file.read(1_000_000, 2)
        with pytest.raises(InputFileError, match="truncated"):
            file.read(2_000_000, 2)


def test_reads_come_from_the_disk_although_the_page_cache_has_the_file(noise) -> None:
    path, _ = noise
    require_a_real_disk(path)
    before = disk_read_bytes()
    with PlaneFile(path, 50_000) as file:
        for offset in range(0, 900_000, 60_000):
            file.read(offset, 50_000)
        assert disk_read_bytes() - before >= file.block_bytes >= file.asked_bytes


def test_without_direct_reads_the_file_is_read_all_the_same(noise, monkeypatch) -> None:
    path, raw = noise
    monkeypatch.delattr(os, "O_DIRECT", raising=False)
    with PlaneFile(path, 50_000) as file:
        assert file.read_mode == "dropped-cache"
        np.testing.assert_array_equal(file.read(123, 45_000), raw[123:45_123])
        with pytest.raises(InputFileError, match="truncated"):
            file.read(1_000_000, 2)


def test_a_run_reads_from_the_disk_what_it_says(tmp_path) -> None:
    index = write_planes(tmp_path / "planes.safetensors", hidden=256, inner=128)
    require_a_real_disk(index.path)
    plan = make_device_plan(index, resident=1, buffer_experts=2)
    timeline = run_device(plan, make_work(index), index, make_device(), warm_up=0)
    about = timeline.about
    assert about["read_mode"] == "direct"
    assert about["asked_bytes"] == plan.resident_bytes + timeline.received_bytes.sum()
    assert about["disk_read_bytes"] >= about["block_bytes"] >= about["asked_bytes"]


class FakeTime:
    """A clock that sleeping moves, always too far."""

    def __init__(self, oversleep_ns=70_000):
        self.now_ns, self.oversleep_ns = 1_000, oversleep_ns

    def clock_ns(self):
        return self.now_ns

    def sleep_s(self, seconds):
        self.now_ns += round(seconds * 1e9) + self.oversleep_ns


def test_the_limit_is_kept_and_oversleeping_does_not_add_up() -> None:
    time = FakeTime()
    limit = RateLimit(20.0, clock_ns=time.clock_ns, sleep_s=time.sleep_s)
    begin_ns, total = time.now_ns, 0
    for read in range(400):
        at_ns = time.now_ns
        time.now_ns += 100_000  # the disk itself
        limit.hold(10_000, at_ns, follows=read > 0)
        total += 10_000
    assert total / (time.now_ns - begin_ns) * 1e3 == pytest.approx(20.0, rel=0.001)


def test_idle_time_is_no_credit_and_a_slow_disk_is_not_hurried() -> None:
    time = FakeTime(oversleep_ns=0)
    limit = RateLimit(10.0, clock_ns=time.clock_ns, sleep_s=time.sleep_s)
    limit.hold(10_000, time.now_ns, follows=False)
    time.now_ns += 50_000_000
    at_ns = time.now_ns
    limit.hold(10_000, at_ns, follows=False)
    assert time.now_ns - at_ns == 1_000_000
    # the disk took 5 ms for 1 ms' worth: the next read has its full millisecond
    at_ns = time.now_ns
    time.now_ns += 5_000_000
    limit.hold(10_000, at_ns, follows=True)
    assert time.now_ns - at_ns == 5_000_000
    limit.hold(10_000, time.now_ns, follows=True)
    assert time.now_ns - at_ns == 6_000_000


def test_a_limited_read_ends_when_the_run_stops() -> None:
    time = FakeTime(oversleep_ns=0)
    limit = RateLimit(0.001, clock_ns=time.clock_ns, sleep_s=time.sleep_s)
    limit.hold(10_000_000, time.now_ns, follows=False, stopped=lambda: time.now_ns > 200_000_000)
    assert time.now_ns < 300_000_000


@given(
    sizes=st.lists(st.integers(64, 700), min_size=1, max_size=3),
    planes=st.integers(1, 6),
    seed=st.integers(0, 1000),
)
def test_the_arena_has_room_for_every_mixture_of_its_bytes(sizes, planes, seed) -> None:
    rng = np.random.default_rng(seed)
    arena = Arena(sizes, planes * max(sizes))
    held, data, used = {}, {}, 0
    for step in range(40):
        kind = int(rng.integers(len(sizes)))
        if used + sizes[kind] <= planes * max(sizes):
            held[step] = (kind, arena.take(kind))
            data[step] = rng.integers(0, 256, sizes[kind], dtype=np.uint8)
            arena.write(held[step][1], data[step])
            used += sizes[kind]
        elif held:
            gone = int(rng.choice(list(held)))
            kind, units_U = held.pop(gone)
            np.testing.assert_array_equal(arena.read(units_U, kind).numpy(), data[gone])
            arena.give_back(units_U)
            used -= sizes[kind]
    for step, (kind, units_U) in held.items():
        np.testing.assert_array_equal(arena.read(units_U, kind).numpy(), data[step])


def write_noise_planes(path, experts):
    """Planes of plain noise: their weights are no numbers worth having, but they are written fast."""
    header = PlaneFileHeader(
        model="noise",
        num_hidden_layers=2,
        moe_layers=(0, 1),
        num_experts=experts,
        ladder=BitLadder(bits_K=(2, 3, 4)),
        shapes=expert_shapes(512, 512),
        about={},
    )
    rng = np.random.default_rng(0)
    sizes = header.ladder.plane_bytes_K(header.shapes)
    keys = np.ndindex(2, experts, 3)
    return save_planes(path, header, ((*key, rng.integers(0, 256, sizes[key[2]], dtype=np.uint8)) for key in keys))


def test_the_system_sees_the_budget(tmp_path) -> None:
    if not reset_peak_rss():
        pytest.skip("this system does not let the peak of resident memory be reset")
    index = write_noise_planes(tmp_path / "planes.safetensors", experts=80)
    assert index.total_bytes > 64 << 20
    work = make_work(index, iterations=1, tokens=1, top_k=1)
    grown = {}
    for name, resident in (("hold", 3), ("half", [[3] * 40 + [0] * 40] * 2)):
        plan = make_device_plan(index, resident=resident, buffer_experts=0 if name == "hold" else 1)
        about = run_device(plan, work, index, make_device(), warm_up=1, verify=name == "hold").about
        assert about["arena_bytes"] == plan.resident_bytes + plan.buffer_bytes
        grown[name] = about["peak_rss_bytes"] - about["rss_before_bytes"], about["arena_bytes"]
    saved = grown["hold"][0] - grown["half"][0]
    assert abs(saved - (grown["hold"][1] - grown["half"][1])) < SLACK_BYTES
