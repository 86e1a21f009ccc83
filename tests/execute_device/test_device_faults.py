"""What goes wrong ends a run with one line, and never leaves a thread behind or waiting."""

import errno
import os
import signal
import threading
from dataclasses import replace

import numpy as np
import pytest
from device_run_cases import make_device, make_device_plan, make_work, write_planes

from placer.core.cluster import LinkClass
from placer.core.device.work import DeviceWork
from placer.core.errors import ExecutionError, InfeasibleError, InputFileError, MismatchError, UsageError
from placer.execute.device import run_device
from placer.execute.device.reader import PlaneReader


@pytest.fixture
def index(tmp_path):
    return write_planes(tmp_path / "planes.safetensors")


@pytest.fixture(autouse=True)
def no_thread_is_left():
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def attempt(index, plan=None, work=None, device=None, **options):
    plan = make_device_plan(index, buffer_experts=2) if plan is None else plan
    return run_device(plan, make_work(index) if work is None else work, index, device or make_device(), **options)


def refused(error, *arguments, **options):
    with pytest.raises(error) as caught:
        attempt(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_damaged_plane_is_named_before_the_run(index) -> None:
    raw = bytearray(index.path.read_bytes())
    raw[int(index.offset_LEK[1, 2, 1]) + 5] ^= 1
    index.path.write_bytes(raw)
    assert "layer 1 expert 2 plane 1" in refused(InputFileError, index)


def test_a_truncated_file(index) -> None:
    index.path.write_bytes(index.path.read_bytes()[:-100])
    assert "ends" in refused(InputFileError, index) or "truncated" in refused(InputFileError, index)
    # cut after the check
    message = refused(InputFileError, index, make_device_plan(index, resident=3, buffer_experts=0), verify=False)
    assert "truncated" in message


def test_a_file_cut_while_running(index) -> None:
    size = index.path.stat().st_size

    def cut(iteration, _):
        assert iteration == 0
        os.truncate(index.path, size // 3)

    assert "truncated" in refused(InputFileError, index, on_output=cut)


def test_a_file_that_is_gone(index) -> None:
    index.path.unlink()
    assert "cannot be read" in refused(InputFileError, index)
    assert "cannot be read" in refused(InputFileError, index, verify=False)


def test_a_file_unlinked_while_running_is_still_read(index) -> None:
    timeline = attempt(index, on_output=lambda *_: index.path.unlink(missing_ok=True))
    assert timeline.num_iterations == 3


@pytest.mark.parametrize("resident", [0, 3])
def test_an_error_of_the_disk(index, monkeypatch, resident) -> None:
    real, calls = os.preadv, []

    def failing(handle, buffers, offset):
        calls.append(offset)
        if len(calls) > 4:
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", failing)
    plan = make_device_plan(index, resident=resident, buffer_experts=1)
    assert "Input/output error" in refused(ExecutionError, index, plan)


def test_a_reader_that_dies_does_not_hang_the_processor(index, monkeypatch) -> None:
    def dies(self, plane, follows):
        raise ZeroDivisionError("a mistake in the reader")

    monkeypatch.setattr(PlaneReader, "_read", dies)
    assert "a mistake in the reader" in refused(ExecutionError, index)


def test_ctrl_c_ends_the_reader_in_the_middle_of_a_slow_read(index) -> None:
    device = make_device(disk_limit_mbytes_per_s=0.01)

    def interrupt(text):
        if text.startswith("reading"):
            # as the signal would come: while the processor waits
            threading.Timer(0.3, lambda: signal.raise_signal(signal.SIGINT)).start()

    # a shell gives its background jobs an ignored SIGINT
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            attempt(index, device=device, progress=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)


def test_an_expert_larger_than_the_buffer(index) -> None:
    plan = make_device_plan(index, buffer_bytes=index.plane_bytes_K[0] + 1)
    assert "larger memory budget" in refused(InfeasibleError, index, plan)
    assert "buffer has 0" in refused(InfeasibleError, index, make_device_plan(index, buffer_bytes=0))


def test_a_plan_beyond_its_budget_or_the_device(index) -> None:
    plan = make_device_plan(index, buffer_experts=2)
    needed = plan.buffer_bytes
    assert str(needed) in refused(InfeasibleError, index, replace(plan, memory_bytes=needed - 1))
    assert "the device allows" in refused(InfeasibleError, index, plan, device=make_device(memory_mib=0.001))
    assert attempt(index, replace(plan, memory_bytes=needed)).num_iterations == 3


def test_a_plan_for_other_planes(index, tmp_path) -> None:
    plan = make_device_plan(index, buffer_experts=2)
    for other, word in (
        (write_planes(tmp_path / "seed", seed=1), "sha256"),
        (write_planes(tmp_path / "experts", experts=4), "experts"),
        (write_planes(tmp_path / "layers", layers=2), "layers"),
        (write_planes(tmp_path / "copies", nested=False), "ladder"),
        (write_planes(tmp_path / "inner", inner=32), "plane_bytes_K"),
    ):
        assert word in refused(MismatchError, other, plan, make_work(index))


def test_work_and_arguments_that_do_not_fit(index, tmp_path) -> None:
    work = make_work(index)
    other = make_work(write_planes(tmp_path / "four", experts=4))
    assert "(3, 4, 3)" in refused(MismatchError, index, work=other)
    crowded = DeviceWork(tokens_B=np.ones_like(work.tokens_B), count_BLEK=work.count_BLEK)
    assert "expert once" in refused(UsageError, index, work=crowded)
    empty = DeviceWork(tokens_B=work.tokens_B[:0], count_BLEK=work.count_BLEK[:0])
    assert "no iterations" in refused(UsageError, index, work=empty)
    assert "iterations is 4" in refused(UsageError, index, iterations=4)
    assert "warm_up is -1" in refused(UsageError, index, warm_up=-1)
    accelerator = make_device(to_device=LinkClass(gbytes_per_s=10, alpha_us=5))
    assert "to_device" in refused(UsageError, index, device=accelerator)
