"""Starts the ranks of a measured run on this machine, watches them, and leaves nothing behind, however it ends."""

import contextlib
import fcntl
import importlib.util
import os
import re
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from placer.core import errors
from placer.core.errors import DependencyError, ExecutionError, PlacerError, UsageError
from placer.core.timeline import Timeline
from placer.execute.heartbeat import create_heartbeats, read_heartbeats, stage
from placer.execute.protocol import PROGRESS_PREFIX, RunFolder

__all__ = ["WORKER", "Job", "require_torch", "run_ranks"]

WORKER = ("-m", "placer.execute.worker")
GRACE_S = 5.0
KEPT_LINES = 4000
LEFT_BEHIND = re.compile(r"rank\s*: (\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*: (-?\d+)")


class Job(Protocol):
    """What the ranks are given: a file, and where they leave their Timeline."""

    @property
    def result_path(self) -> str:
        """Where rank 0 writes the Timeline."""

    def save(self, path: Path) -> None:
        """Writes the job for `entry` to read."""


def require_torch() -> None:
    """Raises DependencyError where torch is not installed; does not import it."""
    if importlib.util.find_spec("torch") is None:
        raise DependencyError("measured runs need PyTorch, which is not installed; pip install 'placer[torch]'")


def run_ranks(
    jobs: Sequence[Job],
    *,
    num_ranks: int,
    timeout_s: float,
    progress: Callable[[str], None] | None = None,
    entry: Sequence[str] = WORKER,
) -> list[Timeline]:
    """The Timeline of each job, all measured in one launch of `num_ranks` ranks on this machine.

    Starts `torchrun --standalone` in a process group of its own, `entry` being what it runs. `progress` gets a line of
    text now and then. On a failed, dead or hanging rank, at `timeout_s` and on Ctrl-C every process is ended, within
    10 seconds, and all temporary files are removed. Ranks also end by themselves when this process is killed.

    Raises ExecutionError naming the rank and the reason; where a rank refused its input, the rank's own error.
    """
    require_torch()
    if num_ranks < 1 or not timeout_s > 0:
        raise UsageError(f"num_ranks is {num_ranks}, timeout_s {timeout_s}; both must be positive")
    with tempfile.TemporaryDirectory(prefix="placer-run-", ignore_cleanup_errors=True) as name:
        folder = RunFolder(Path(name))
        create_heartbeats(folder.heartbeats, num_ranks)
        paths = [folder.path / f"job-{index}.json" for index in range(len(jobs))]
        for job, path in zip(jobs, paths, strict=True):
            job.save(path)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "localhost"]
        command += ["--nproc-per-node", str(num_ranks), *entry, *map(str, paths)]
        with folder.lock.open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            _supervise(command, folder, num_ranks, timeout_s, progress)
        return [Timeline.load(Path(job.result_path)) for job in jobs]


def _supervise(
    command: list[str], folder: RunFolder, num_ranks: int, timeout_s: float, progress: Callable[[str], None] | None
) -> None:
    """Waits for the ranks; whatever ends the wait, no process is left when this returns or raises."""
    lines: deque[str] = deque(maxlen=KEPT_LINES)
    deadline = time.monotonic() + timeout_s
    process = subprocess.Popen(
        command,
        env=_environment(folder, num_ranks),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        rest = ""
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise ExecutionError(_hanging(folder, num_ranks, timeout_s))
            if select.select([process.stdout], [], [], min(0.1, left_s))[0]:
                chunk = os.read(process.stdout.fileno(), 1 << 16).decode("utf-8", "replace")
                *whole, rest = (rest + chunk).split("\n")
                for line in whole:
                    _keep(line, lines, progress)
                if chunk:
                    continue
            if process.poll() is not None:
                break
            if not select.select([process.stdout], [], [], 0)[0]:
                continue
            time.sleep(0.05)  # the pipe is closed, but torchrun has not ended yet
        _keep(rest, lines, progress)
        if process.returncode:
            raise _diagnose(folder, process.returncode, list(lines))
    finally:
        _end(process, folder)


def _keep(line: str, lines: deque[str], progress: Callable[[str], None] | None) -> None:
    if line.startswith(PROGRESS_PREFIX):
        if progress is not None:
            progress(line.removeprefix(PROGRESS_PREFIX))
    elif line.strip():
        lines.append(line)


def _environment(folder: RunFolder, num_ranks: int) -> dict[str, str]:
    environment = folder.environment()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    # more threads than cores would make ranks wait for each other inside the experts
    environment.setdefault("OMP_NUM_THREADS", str(max(1, cores // num_ranks)))
    # all ranks are on this machine: a host name that does not resolve must not matter
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo0" if sys.platform == "darwin" else "lo")
    return environment


def _end(process: subprocess.Popen[bytes], folder: RunFolder) -> None:
    """Ends torchrun and its ranks: politely, then for certain. torchrun gives every rank a session of its own."""
    ranks = [int(pid) for pid in read_heartbeats(folder.heartbeats)[:, 0] if pid]
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.communicate(timeout=GRACE_S)
    if process.poll() is None:
        _signal_group(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdout is not None:
        process.stdout.close()
    left = [pid for pid in ranks if _is_ours(pid, folder)]
    for pid in left:
        _signal_group(pid, signal.SIGKILL)
    deadline = time.monotonic() + GRACE_S
    while any(_is_ours(pid, folder) for pid in left) and time.monotonic() < deadline:
        time.sleep(0.02)


def _signal_group(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, number)


def _is_ours(pid: int, folder: RunFolder) -> bool:
    """Whether this process id still belongs to one of our ranks and not, by now, to somebody else."""
    try:
        if not Path("/proc/self/environ").exists():
            return os.getpgid(pid) == pid
        return f"{RunFolder.VARIABLE}={folder.path}".encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return False


def _hanging(folder: RunFolder, num_ranks: int, timeout_s: float) -> str:
    rows = read_heartbeats(folder.heartbeats)
    progress = [(row[0] != 0, *row[1:]) for row in rows.tolist()]
    behind = min(range(num_ranks), key=lambda rank: progress[rank])
    if len(set(progress)) == 1:
        where = f"every rank is at: {stage(rows[0])}"
    else:
        where = f"rank {behind} is furthest behind, at: {stage(rows[behind])}"
    return f"{num_ranks} ranks did not finish within {timeout_s:g} s; {where}; raise the timeout or look at that rank"


def _diagnose(folder: RunFolder, code: int, lines: list[str]) -> PlacerError:
    """The error that explains why torchrun ended with `code`, blaming the first cause and not its victims."""
    reports = folder.reports()
    for report in reports:
        if not report.lost_contact:
            kind = getattr(errors, report.error) if report.error in errors.__all__ else ExecutionError
            error = kind(f"rank {report.rank}: {report.message}")
            assert isinstance(error, PlacerError)
            return error
    rows = read_heartbeats(folder.heartbeats)
    explained = {report.rank for report in reports}
    for rank_text, exit_text in LEFT_BEHIND.findall("\n".join(lines)):
        rank, exit_code = int(rank_text), int(exit_text)
        if exit_code != -signal.SIGTERM and rank not in explained and rank < len(rows):
            return ExecutionError(f"rank {rank} died ({_cause(exit_code)}) at: {stage(rows[rank])}")
    if reports:
        return ExecutionError(f"rank {reports[0].rank} lost contact with the others: {reports[0].message}")
    last = next((line.strip() for line in reversed(lines) if line.strip(" =-")), "it printed nothing")
    behind = np.flatnonzero(rows[:, 0] == 0)
    started = f"rank {behind[0]} never started" if len(behind) else "all ranks had started"
    return ExecutionError(f"torchrun ended with code {code}, {started}: {last}")


def _cause(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"{name}; the kernel does that when memory runs out" if name == "SIGKILL" else name
