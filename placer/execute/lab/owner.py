"""Who owns which namespaces: one locked file for each lab, so that what a killed owner left can be found and removed.

The kernel drops the lock when the owner's process ends, however it ends: a file that can be locked has no owner. Only
namespaces that such a file names are ever touched.
"""

import contextlib
import fcntl
import json
import os
import secrets
import signal
import subprocess
import time
from pathlib import Path
from typing import IO

from placer.core.errors import ExecutionError

__all__ = ["Claim", "clean_leftovers", "remove_namespaces"]

FOLDER = Path("/run/placer-lab")
PREFIX = "placer-"
PATIENCE_S = 5.0


class Claim:
    """A fresh token, and the lock that says its namespaces are in use. Close it when they are gone."""

    def __init__(self) -> None:
        try:
            FOLDER.mkdir(mode=0o700, exist_ok=True)
            self.token = secrets.token_hex(4)
            self.path = FOLDER / f"{self.token}.json"
            self._file = self.path.open("x", encoding="utf-8")
        except OSError as error:
            raise ExecutionError(f"{FOLDER}: the lab cannot keep its records there ({error.strerror})") from error
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def names(self, count: int) -> list[str]:
        """`count` names of namespaces that are ours from now on; written down before any is made."""
        names = [f"{PREFIX}{self.token}-{index}" for index in range(count)]
        json.dump({"pid": os.getpid(), "namespaces": names}, self._file)
        self._file.flush()
        return names

    def close(self) -> None:
        """Forgets the record."""
        self.path.unlink(missing_ok=True)
        self._file.close()


def clean_leftovers() -> list[str]:
    """Removes namespaces, and ends processes in them, whose owner is gone; the names of those removed."""
    removed: list[str] = []
    for path in sorted(FOLDER.glob("*.json")):
        # it may vanish any time: its owner ends, or somebody else cleans
        with contextlib.suppress(FileNotFoundError), path.open("r+", encoding="utf-8") as file:
            if not _lock(file):
                continue
            removed += remove_namespaces(_names_in(path, file))
            path.unlink(missing_ok=True)
    return removed


def _lock(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    # a record that was closed between open and lock is no record any more
    return os.fstat(file.fileno()).st_nlink > 0


def _names_in(path: Path, file: IO[str]) -> list[str]:
    """The namespaces of a record; none where its owner died before writing it, and none that are not its own."""
    try:
        names = json.loads(file.read())["namespaces"]
    except (ValueError, KeyError, TypeError):
        return []
    return [name for name in names if str(name).startswith(f"{PREFIX}{path.stem}-")]


def remove_namespaces(names: list[str]) -> list[str]:
    """Ends every process in these namespaces, then deletes them; those that existed. Raises ExecutionError."""
    present = [name for name in names if Path("/run/netns", name).exists()]
    deadline = time.monotonic() + PATIENCE_S
    while pids := [pid for name in present for pid in _pids(name)]:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if time.monotonic() > deadline:
            raise ExecutionError(f"process {pids[0]} in a namespace of the lab does not end; end it by hand")
        time.sleep(0.02)
    for name in present:
        done = subprocess.run(["ip", "netns", "delete", name], capture_output=True, text=True, check=False)
        if done.returncode and Path("/run/netns", name).exists():
            raise ExecutionError(f"namespace {name} cannot be removed: {done.stderr.strip()}")
    return present


def _pids(name: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=False)
    return [int(pid) for pid in done.stdout.split()]
