"""Runs one command on every rank of a lab, each in its node's namespace, with torchrun's variables set."""

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import IO

from placer.core.errors import UsageError
from placer.execute.lab.network import Lab
from placer.execute.launch import Host

__all__ = ["require_command", "run_command"]

GRACE_S = 5.0
POLL_S = 0.05
DRAIN_S = 0.5
PR_SET_PDEATHSIG = 1


def require_command(command: Sequence[str]) -> None:
    """Raises UsageError for a command that is empty or does not exist."""
    if not command or shutil.which(command[0]) is None:
        raise UsageError(f"the command {' '.join(command)[:60]!r} is not found; give one after `--`")


def run_command(lab: Lab, command: Sequence[str]) -> int:
    """Exit code: 0, or that of the first rank that failed (128 + signal), after which the others are ended.

    Standard output and error go where this process's go, each line with its rank in front.
    """
    require_command(command)
    ranks: list[_Rank] = []
    port, total = 20_000 + secrets.randbelow(10_000), sum(host.ranks for host in lab.hosts)
    try:
        for host in lab.hosts:
            for local_rank in range(host.ranks):
                variables = {
                    "RANK": str(len(ranks)),
                    "WORLD_SIZE": str(total),
                    "LOCAL_RANK": str(local_rank),
                    "LOCAL_WORLD_SIZE": str(host.ranks),
                    "MASTER_ADDR": lab.hosts[0].address,
                    "MASTER_PORT": str(port),
                    "GLOO_SOCKET_IFNAME": host.interface,
                }
                ranks.append(_Rank(len(ranks), host, command, variables))
        for rank in ranks:
            rank.pass_on()
        return _wait(ranks)
    finally:
        _end(ranks)


class _Rank:
    """One process, and two threads that pass on what it writes."""

    def __init__(self, rank: int, host: Host, command: Sequence[str], variables: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [*host.prefix, *command],
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            preexec_fn=_dying_with_parent(),
        )
        self.prefix = f"[{rank}] "
        self.readers: list[threading.Thread] = []

    def pass_on(self) -> None:
        """Starts the threads; after every rank's fork, which does not go well with threads."""
        for pipe, sink in ((self.process.stdout, sys.stdout), (self.process.stderr, sys.stderr)):
            reader = threading.Thread(target=_pass_on, args=(pipe, sink, self.prefix), daemon=True)
            reader.start()
            self.readers.append(reader)


def _pass_on(pipe: IO[bytes], sink: IO[str], prefix: str) -> None:
    with pipe:
        for line in pipe:
            text = prefix + line.decode("utf-8", "replace").rstrip("\r\n") + "\n"
            # a closed terminal must not make the rank wait for a full pipe
            with contextlib.suppress(OSError, ValueError):
                sink.write(text)
                sink.flush()


def _wait(ranks: Sequence[_Rank]) -> int:
    while True:
        codes = [rank.process.poll() for rank in ranks]
        for code in codes:
            if code:
                return code if code > 0 else 128 - code
        if None not in codes:
            return 0
        time.sleep(POLL_S)


def _end(ranks: Sequence[_Rank]) -> None:
    """Politely, then for certain; and what they wrote is passed on to the end."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for rank in ranks:
            if rank.process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(rank.process.pid, number)
        deadline = time.monotonic() + GRACE_S
        for rank in ranks:
            with contextlib.suppress(subprocess.TimeoutExpired):
                rank.process.wait(max(0.01, deadline - time.monotonic()))
    # a child that left its rank's group may hold a pipe open; it ends with its namespace
    deadline = time.monotonic() + DRAIN_S
    for rank in ranks:
        for reader in rank.readers:
            reader.join(max(0.0, deadline - time.monotonic()))


def _dying_with_parent() -> Callable[[], None]:
    """For `preexec_fn`: the kernel ends the child when this process ends, even by SIGKILL."""
    prctl = ctypes.CDLL(None).prctl

    def set_it() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)

    return set_it
