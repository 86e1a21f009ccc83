"""Lanes: the streams of one rank that carry messages beside its arithmetic, one job after the other.

On a CPU a lane is a thread (the back end's own threads move the bytes meanwhile), on CUDA a side stream; both give a
Ticket that says when the job began and ended. Jobs begin in the order of their submission, whenever their inputs come.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from time import perf_counter_ns
from typing import Any, Protocol

import torch

__all__ = ["DeviceLane", "Lane", "Lanes", "ThreadLane", "Ticket", "stamp"]


def stamp(device: torch.device) -> Any:
    """Now: nanoseconds of the processor's clock, or an event in the device's current stream."""
    if device.type != "cuda":
        return perf_counter_ns()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


@dataclass(eq=False, slots=True)
class Ticket:
    """A job's result and when it ran; `join` waits for it: on CUDA it makes the current stream wait."""

    result: Any = None
    begin: Any = None
    end: Any = None
    future: Future[None] | None = None

    def join(self) -> Any:
        """The job's result. Raises what the job raised."""
        if self.future is not None:
            self.future.result()
        elif not isinstance(self.end, int):
            torch.cuda.current_stream().wait_event(self.end)
        return self.result


class Lane(Protocol):
    """Runs jobs in order."""

    def submit(self, job: Callable[[Any], Any], after: Ticket | None = None) -> Ticket:
        """Queues a job, which gets the result of the job `after` (or None), on this or another lane."""
        ...


class ThreadLane:
    """A thread of its own. After a job has failed, jobs that build on it fail too."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(max_workers=1)

    def submit(self, job: Callable[[Any], Any], after: Ticket | None = None) -> Ticket:
        """Queues a job for the thread."""
        ticket = Ticket()
        ticket.future = self._thread.submit(_run, job, after, ticket)
        return ticket

    def close(self) -> None:
        """Ends the thread once its jobs are done."""
        self._thread.shutdown()


@torch.inference_mode()
def _run(job: Callable[[Any], Any], after: Ticket | None, ticket: Ticket) -> None:
    given = None if after is None else after.join()
    ticket.begin = perf_counter_ns()
    ticket.result = job(given)
    ticket.end = perf_counter_ns()


class DeviceLane:
    """A CUDA stream. Callers keep what a job made or used until the main stream has joined the job's ticket."""

    def __init__(self, device: torch.device) -> None:
        self._device, self._stream = device, torch.cuda.Stream(device)

    def submit(self, job: Callable[[Any], Any], after: Ticket | None = None) -> Ticket:
        """Enqueues the job's kernels after all that the current stream holds now."""
        ticket = Ticket()
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            given = None if after is None else after.join()
            ticket.begin = stamp(self._device)
            ticket.result = job(given)
            ticket.end = stamp(self._device)
        return ticket

    def close(self) -> None:
        """Nothing to end."""


class Lanes:
    """The lane that crosses the network and the one that stays inside nodes; made when first used."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._lanes: dict[bool, ThreadLane | DeviceLane] = {}

    def __getitem__(self, inside: bool) -> Lane:
        if inside not in self._lanes:
            self._lanes[inside] = DeviceLane(self.device) if self.device.type == "cuda" else ThreadLane()
        return self._lanes[inside]

    def close(self) -> None:
        """Ends what was made."""
        for lane in self._lanes.values():
            lane.close()
        self._lanes.clear()
