"""Starts the ranks of a measured run on this machine, watches them, and leaves nothing behind, however it ends."""

import contextlib
import fcntl
import importlib.util
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from placer.core import errors
from placer.core.errors import DependencyError, ExecutionError, PlacerError, UsageError
from placer.core.timeline import Timeline
from placer.execute.heartbeat import create_heartbeats, read_heartbeats, stage
from placer.execute.protocol import PROGRESS_PREFIX, RunFolder

__all__ = ["WORKER", "Host", "Job", "launch", "require_torch", "run_ranks"]

WORKER = ("-m", "placer.execute.worker")
GRACE_S = 5.0
VICTIMS_S = 3.0
RENDEZVOUS_S = 120
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


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """One node of a launch: `prefix` puts a command there, `address` and `interface` are how other nodes reach it.

    Hosts share this machine's file system and process ids: they are namespaces (`ip netns exec NAME`).
    """

    prefix: tuple[str, ...]
    address: str
    interface: str
    ranks: int


def run_ranks(
    jobs: Sequence[Job],
    *,
    num_ranks: int,
    timeout_s: float,
    progress: Callable[[str], None] | None = None,
    entry: Sequence[str] = WORKER,
    hosts: Sequence[Host] = (),
) -> list[Timeline]:
    """The Timeline of each job, all measured in one launch of `num_ranks` ranks on this machine.

    `entry` is what every rank runs, on `hosts` where given; see `launch` for how it ends. Raises ExecutionError naming
    the rank and the reason; where a rank refused its input, the rank's own error.
    """
    with _run_folder(num_ranks, timeout_s, hosts) as folder:
        paths = [folder.path / f"job-{index}.json" for index in range(len(jobs))]
        for job, path in zip(jobs, paths, strict=True):
            job.save(path)
        line = [*entry, *map(str, paths)]
        _supervise(_commands(line, num_ranks, hosts), folder, num_ranks, timeout_s, progress)
        return [Timeline.load(Path(job.result_path)) for job in jobs]


def launch(
    command: Sequence[str],
    *,
    num_ranks: int,
    timeout_s: float,
    progress: Callable[[str], None] | None = None,
    hosts: Sequence[Host] = (),
) -> None:
    """Runs `command` (what follows `python` on a command line) once on every rank, and returns when all have ended.

    One torchrun for this machine, or one for each of `hosts`, whose ranks are numbered host by host; each in a process
    group of its own. `progress` gets a line of text now and then. On a failed, dead or hanging rank, at `timeout_s` and
    on Ctrl-C every process is ended, within 10 seconds, and all temporary files are removed. Ranks also end by
    themselves when this process is killed.

    Raises ExecutionError naming the rank and the reason; where a rank gave a reason, the rank's own error.
    """
    with _run_folder(num_ranks, timeout_s, hosts) as folder:
        _supervise(_commands(command, num_ranks, hosts), folder, num_ranks, timeout_s, progress)


@contextlib.contextmanager
def _run_folder(num_ranks: int, timeout_s: float, hosts: Sequence[Host]) -> Iterator[RunFolder]:
    """The folder of one launch, its lock held, after what can be refused beforehand was."""
    require_torch()
    if num_ranks < 1 or not timeout_s > 0:
        raise UsageError(f"num_ranks is {num_ranks}, timeout_s {timeout_s}; both must be positive")
    if hosts and sum(host.ranks for host in hosts) != num_ranks:
        raise UsageError(f"num_ranks is {num_ranks}, the hosts have {sum(h.ranks for h in hosts)}; start as many")
    with tempfile.TemporaryDirectory(prefix="placer-run-", ignore_cleanup_errors=True) as name:
        folder = RunFolder(Path(name))
        create_heartbeats(folder.heartbeats, num_ranks)
        with folder.lock.open("wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield folder


def _commands(command: Sequence[str], num_ranks: int, hosts: Sequence[Host]) -> list[tuple[list[str], dict[str, str]]]:
    """The command line of each torchrun, and the variables that it needs beside everybody's."""
    torchrun = [sys.executable, "-m", "torch.distributed.run"]
    # all ranks are on this machine: a host name that does not resolve must not matter
    if not hosts:
        line = [*torchrun, "--standalone", "--local-addr", "localhost", "--nproc-per-node", str(num_ranks), *command]
        return [(line, {"GLOO_SOCKET_IFNAME": "lo0" if sys.platform == "darwin" else "lo"})]
    port = 20_000 + secrets.randbelow(10_000)
    shared = ["--nnodes", str(len(hosts)), "--master-addr", hosts[0].address, "--master-port", str(port)]
    shared += ["--rdzv-backend", "static", "--rdzv-conf", f"timeout={RENDEZVOUS_S}"]
    lines = []
    for index, host in enumerate(hosts):
        own = ["--node-rank", str(index), "--nproc-per-node", str(host.ranks), "--local-addr", host.address]
        line = [*host.prefix, *torchrun, *shared, *own, *command]
        lines.append((line, {"GLOO_SOCKET_IFNAME": host.interface}))
    return lines


class _Torchrun:
    """One torchrun and what it has written so far."""

    def __init__(self, line: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            line,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        assert self.process.stdout is not None
        self.pipe = self.process.stdout
        self.open = True
        self._rest = ""

    def fileno(self) -> int:
        """For select."""
        return self.pipe.fileno()

    def read(self) -> list[str]:
        """The lines that have come; call it when there is something to read."""
        chunk = os.read(self.fileno(), 1 << 16).decode("utf-8", "replace")
        self.open = bool(chunk)
        *whole, self._rest = (self._rest + chunk + ("" if chunk else "\n")).split("\n")
        return whole

    @property
    def ended(self) -> bool:
        """Whether it has ended and everything that it wrote was read (or is held open by somebody else)."""
        return self.process.poll() is not None and not (self.open and select.select([self], [], [], 0)[0])


def _supervise(
    commands: list[tuple[list[str], dict[str, str]]],
    folder: RunFolder,
    num_ranks: int,
    timeout_s: float,
    progress: Callable[[str], None] | None,
) -> None:
    """Waits for the ranks; whatever ends the wait, no process is left when this returns or raises."""
    lines: deque[str] = deque(maxlen=KEPT_LINES)
    deadline = time.monotonic() + timeout_s
    environment = _environment(folder, num_ranks)
    running: list[_Torchrun] = []
    victims_until: float | None = None
    try:
        for command, variables in commands:
            running.append(_Torchrun(command, variables | environment))
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise ExecutionError(_hanging(folder, num_ranks, timeout_s))
            readable = select.select([one for one in running if one.open], [], [], min(0.1, left_s))[0]
            for one in readable:
                for line in one.read():
                    _keep(line, lines, progress)
            if readable:
                continue
            failed = [one.process.returncode for one in running if one.ended and one.process.returncode]
            if all(one.ended for one in running):
                break
            if failed:
                # a host that lost contact may end before the one where it began
                victims_until = victims_until or time.monotonic() + VICTIMS_S
                if _root_cause(folder, list(lines)) or time.monotonic() > victims_until:
                    break
            if not any(one.open for one in running):
                time.sleep(0.05)
        if failed:
            raise _diagnose(folder, failed[0], list(lines))
    finally:
        _end(running, folder)


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
    return environment


def _end(running: Sequence[_Torchrun], folder: RunFolder) -> None:
    """Ends torchrun and its ranks: politely, then for certain. torchrun gives every rank a session of its own."""
    ranks = [int(pid) for pid in read_heartbeats(folder.heartbeats)[:, 0] if pid]
    deadline = time.monotonic() + GRACE_S
    for one in running:
        if one.process.poll() is None:
            _signal_group(one.process.pid, signal.SIGTERM)
    while any(one.process.poll() is None for one in running) and time.monotonic() < deadline:
        # a full pipe would keep torchrun from ending
        for one in select.select([one for one in running if one.open], [], [], 0.05)[0]:
            one.read()
        if not any(one.open for one in running):
            time.sleep(0.05)
    for one in running:
        if one.process.poll() is None:
            _signal_group(one.process.pid, signal.SIGKILL)
        one.process.wait()
        one.pipe.close()
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


def _root_cause(folder: RunFolder, lines: list[str]) -> PlacerError | None:
    """The error of the rank where it began, if that is known by now."""
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
    return None


def _diagnose(folder: RunFolder, code: int, lines: list[str]) -> PlacerError:
    """The error that explains why torchrun ended with `code`, blaming the first cause and not its victims."""
    if cause := _root_cause(folder, lines):
        return cause
    if reports := folder.reports():
        return ExecutionError(f"rank {reports[0].rank} lost contact with the others: {reports[0].message}")
    rows = read_heartbeats(folder.heartbeats)
    last = next((line.strip() for line in reversed(lines) if line.strip(" =-")), "it printed nothing")
    behind = np.flatnonzero(rows[:, 0] == 0)
    started = f"rank {behind[0]} never started" if len(behind) else "all ranks had started"
    return ExecutionError(f"torchrun ended with code {code}, {started}: {last}")


def _cause(exit_code: int) -> str:
    if exit_code >= 0:
        return f"exit code {exit_code}"
    name = signal.Signals(-exit_code).name
    return f"{name}; the kernel does that when memory runs out" if name == "SIGKILL" else name
