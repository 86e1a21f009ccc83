"""A plan brought to life: planes checked, memory taken, resident planes read, the reader started; and what was seen."""

import contextlib
import gc
from collections.abc import Callable, Iterator
from time import perf_counter_ns
from typing import Any

import numpy as np
import torch

from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex
from placer.core.device.spec import DeviceSpec
from placer.execute.device.checks import check_run
from placer.execute.device.files import PlaneFile
from placer.execute.device.limit import RateLimit
from placer.execute.device.memory import PlaneMemory
from placer.execute.device.reader import Load, PlaneReader
from placer.execute.device.site import SiteRunner, Span
from placer.execute.device.system import disk_read_bytes, peak_rss_bytes, reset_peak_rss, rss_bytes
from traces.plane_store import verify_planes

__all__ = ["Session", "open_session"]


class Session:
    """What runs on a device: `runner` for one site after the other, and iterations to put their spans under."""

    def __init__(
        self,
        plan: DevicePlan,
        hidden_size: int,
        file: PlaneFile,
        memory: PlaneMemory,
        reader: PlaneReader,
        runner: SiteRunner,
    ) -> None:
        self.plan, self.runner, self.hidden_size = plan, runner, hidden_size
        self._file, self._memory, self._reader = file, memory, reader
        self.iterations: list[tuple[list[Span], list[Load]]] = []
        self.system: dict[str, Any] = {}

    def start_over(self) -> None:
        """After warming up: forgets what was measured, and drops every plane that is not resident."""
        self.runner.start_over()
        self.runner.spans.clear()
        self._reader.loads.clear()
        self.iterations.clear()
        self._memory.peak_bytes = self._memory.held_bytes
        self._memory.lost = 0

    def begin(self) -> None:
        """An iteration begins now."""
        self.runner.spans = []
        self.runner.begin_ns = perf_counter_ns()

    def end(self) -> None:
        """The iteration is over; a read ahead that nobody needed counts to the iteration in which it ends."""
        with self._reader.changed:
            loads = self._reader.loads[:]
            self._reader.loads.clear()
        self.iterations.append((self.runner.spans, loads))

    def about(self) -> dict[str, Any]:
        """How bytes were read and held; see `run_device`."""
        return {
            "read_mode": self._file.read_mode,
            "asked_bytes": self._file.asked_bytes,
            "block_bytes": self._file.block_bytes,
            "arena_bytes": self._memory.arena.nbytes,
            "scratch_bytes": self._memory.arena.scratch_bytes,
            "peak_plane_bytes": self._memory.peak_bytes,
            "lost_from_cache": self._memory.lost,
            "prefetched": self.runner.prefetched,
            "prefetch_used": self.runner.prefetch_used,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            **self.system,
        }


@contextlib.contextmanager
def open_session(
    plan: DevicePlan,
    index: PlaneIndex,
    device: DeviceSpec,
    *,
    verify: bool = True,
    progress: Callable[[str], None] | None = None,
) -> Iterator[Session]:
    """A session in which the resident planes are in memory; one torch thread computes until it ends.

    `verify`: compare every plane's checksum before. Raises what `check_run`, `verify_planes` and PlaneFile raise.
    """
    say = progress or (lambda _: None)
    check_run(plan, index, device)
    if verify:
        say(f"checking {index.total_bytes >> 20} MiB of planes")
        verify_planes(index)
    gc.collect()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    reset = reset_peak_rss()
    before_bytes, read_before = rss_bytes(), disk_read_bytes()
    try:
        with PlaneFile(index.path, max(index.plane_bytes_K)) as file:
            memory = PlaneMemory(plan)
            reader = PlaneReader(index, file, memory, RateLimit(device.disk_limit_mbytes_per_s))
            resident = [(int(s), int(e), int(k)) for s, e, k in np.argwhere(plan.present_LEK)]
            say(f"reading {plan.resident_bytes >> 20} MiB of resident planes ({file.read_mode})")
            begin_ns = perf_counter_ns()
            reader.read_resident(resident)
            load_ns = perf_counter_ns() - begin_ns
            runner = SiteRunner(plan, index, device, memory, reader)
            with reader, torch.inference_mode():
                session = Session(plan, index.shapes[0][1], file, memory, reader, runner)
                gc.disable()
                yield session
            read_after = disk_read_bytes()
            session.system.update(
                resident_load_ns=load_ns,
                rss_before_bytes=before_bytes,
                peak_rss_bytes=peak_rss_bytes() if reset else None,
                disk_read_bytes=None if read_before is None or read_after is None else read_after - read_before,
            )
    finally:
        gc.enable()
        torch.set_num_threads(threads)
