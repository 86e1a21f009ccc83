"""The reader's order and the memory's books, by hand."""

import threading
from types import SimpleNamespace

import numpy as np
import pytest
from device_run_cases import make_device_plan, weights_in_memory, write_planes

from placer.execute.device.files import PlaneFile
from placer.execute.device.limit import RateLimit
from placer.execute.device.memory import PlaneMemory
from placer.execute.device.reader import PlaneReader

NONE_EK = np.zeros((5, 3), dtype=bool)


@pytest.fixture(scope="module")
def index(tmp_path_factory):
    return write_planes(tmp_path_factory.mktemp("planes") / "planes.safetensors")


class GatedFile(PlaneFile):
    """Reads when it is let."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.begun, self.let = threading.Semaphore(0), threading.Semaphore(0)

    def read(self, offset, size):
        self.begun.release()
        assert self.let.acquire(timeout=10)
        return super().read(offset, size)


@pytest.fixture
def gated(index):
    """A reader that stands still in each read until it is let."""
    plan = make_device_plan(index, buffer_experts=3)
    memory = PlaneMemory(plan)
    with GatedFile(index.path, max(index.plane_bytes_K)) as file:
        reader = PlaneReader(index, file, memory, RateLimit(None))
        with reader:
            yield SimpleNamespace(reader=reader, file=file, memory=memory, index=index)
            for _ in range(20):
                file.let.release()


def test_what_is_needed_goes_before_what_is_expected_but_not_before_what_is_read(gated) -> None:
    reader, file = gated.reader, gated.file
    reader.expect([(1, 0, 0), (1, 1, 0), (1, 2, 0)])
    assert file.begun.acquire(timeout=10)
    reader.need([(0, 3, 0), (0, 3, 1)], [])
    for _ in range(5):
        file.let.release()
    for plane in ((0, 3, 1), (1, 2, 0)):
        reader.wait(plane)
    assert [plane for plane, _, _ in reader.loads] == [(1, 0, 0), (0, 3, 0), (0, 3, 1), (1, 1, 0), (1, 2, 0)]
    raw = gated.index.path.read_bytes()
    for plane in ((1, 2, 0), (0, 3, 1)):
        first = int(gated.index.offset_LEK[plane])
        size = gated.index.plane_bytes_K[plane[2]]
        assert gated.memory.tensor(plane).numpy().tobytes() == raw[first : first + size]


def test_expected_planes_are_given_up_and_one_in_flight_is_finished(gated) -> None:
    reader, file, memory = gated.reader, gated.file, gated.memory
    reader.expect([(1, 0, 0), (1, 1, 0), (1, 2, 0)])
    assert file.begun.acquire(timeout=10)
    file.let.release()
    reader.wait((1, 0, 0))
    assert file.begun.acquire(timeout=10)
    arrived, reading = reader.settle(1)
    assert (arrived, reading) == ({(1, 0, 0)}, (1, 1, 0))
    # both are unwanted: one goes at once, the other when it is there
    reader.need([(1, 4, 0)], [(1, 0, 0), (1, 1, 0)])
    assert memory.held_bytes == gated.index.plane_bytes_K[0]
    file.let.release()
    file.let.release()
    reader.wait((1, 4, 0))
    assert memory.held_bytes == gated.index.plane_bytes_K[0]
    assert [plane for plane, _, _ in reader.loads] == [(1, 0, 0), (1, 1, 0), (1, 4, 0)]


def test_a_plane_waits_for_room_in_the_buffer(index) -> None:
    plan = make_device_plan(index, buffer_experts=1)
    memory = PlaneMemory(plan)
    with (
        PlaneFile(index.path, max(index.plane_bytes_K)) as file,
        PlaneReader(index, file, memory, RateLimit(None)) as reader,
    ):
        reader.need([(0, 0, 0), (0, 0, 1), (0, 0, 2), (0, 1, 0)], [])
        reader.wait((0, 0, 2))
        with reader.changed:
            assert len(reader.loads) == 3
            memory.expert_done([(0, 0, plane) for plane in range(3)], NONE_EK)
            reader.changed.notify_all()
        reader.wait((0, 1, 0))
    assert memory.peak_bytes == plan.buffer_bytes


def test_kept_planes_go_to_the_cache_when_their_expert_is_done(index) -> None:
    whole, (base, residual, _) = sum(index.plane_bytes_K), index.plane_bytes_K
    plan = make_device_plan(index, cache="lru", cache_bytes=base, buffer_bytes=whole)
    memory = PlaneMemory(plan)
    keep_EK = NONE_EK.copy()
    keep_EK[0, 0] = True
    for plane in range(3):
        memory.add_buffered((0, 0, plane))
    assert not memory.fits((0, 1, 0))
    memory.expert_done([(0, 0, plane) for plane in range(3)], keep_EK)
    assert memory.present_EK(0).tolist() == keep_EK.tolist()
    assert memory.held_bytes == base
    # the cache is full: the next one waits in the buffer, and finds room when the first is thrown out
    memory.add_buffered((0, 1, 0))
    keep_EK[1, 0] = True
    memory.expert_done([(0, 1, 0)], keep_EK)
    assert not memory.present_EK(0)[1, 0]
    assert memory.fits((0, 2, 0))
    memory.expert_done([(0, 0, 0)], np.roll(keep_EK, 1, axis=0))
    assert memory.present_EK(0)[:, 0].tolist() == [False, True, False, False, False]
    # here the buffer needs the room first
    memory.add_buffered((0, 2, 0))
    memory.expert_done([(0, 2, 0)], np.ones_like(keep_EK))
    for plane in range(3):
        memory.add_buffered((0, 3, plane))
    assert memory.lost == 1
    assert memory.held_bytes == memory.peak_bytes == base + base + 2 * residual
    memory.end_site()
    memory.clear()
    assert memory.held_bytes == 0


def test_the_reference_of_these_tests_knows_the_planes(index) -> None:
    load = weights_in_memory(index)
    errors = [float((load(0, 0, level).down_HI - load(0, 0, 3).down_HI).abs().max()) for level in (1, 2, 3)]
    assert errors[0] > errors[1] > errors[2] == 0
