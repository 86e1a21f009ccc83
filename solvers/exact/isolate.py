"""Runs an exact back end in a process of its own that can be killed.

Exact solvers overshoot their time limits several times over, and two of them bring copies of the same native library
that may not meet in one process. The child is a fresh interpreter that leads a session of its own: whatever it starts
(CBC is a program) dies with it, and Ctrl-C in the terminal reaches only the parent, which then kills the child.
A `multiprocessing` child would run the caller's main module again; this one imports the function's module only, so a
script may call a solver without a main guard.
"""

import contextlib
import importlib
import json
import math
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from placer.core.errors import PlacerError, SolverError, UsageError

__all__ = ["IsolationTimeoutError", "run_isolated"]

Result = TypeVar("Result")

GRACE_FACTOR = 1.5
GRACE_S = 5.0
START_CHILD = (
    "import json, pathlib, sys; folder = pathlib.Path(sys.argv[1]); "
    "sys.path[:] = json.loads((folder / 'path.json').read_text()); "
    "from solvers.exact.isolate import _child; _child(folder)"
)


class IsolationTimeoutError(SolverError):
    """The back end ran past its time limit and the grace after it, and was killed; what it had found is lost."""


def run_isolated(function: Callable[..., Result], arguments: tuple[Any, ...], *, time_limit_s: float) -> Result:
    """What `function(*arguments)` returns, computed in a child process.

    The child is killed, with everything it started, at time_limit_s * 1.5 + 5 seconds, and whenever the parent leaves
    this call by an exception (Ctrl-C included); if the parent itself is killed, the child notices and ends.
    `function` must live in an importable module, and arguments and result must be picklable.

    Raises IsolationTimeoutError (a SolverError) when it had to be killed for time, SolverError when it crashed or
    raised anything unexpected (the message ends with the last line it printed), the child's own PlacerError unchanged,
    and UsageError for a function that a fresh interpreter cannot import or a limit that is no positive number.
    """
    if not math.isfinite(time_limit_s) or time_limit_s <= 0:
        raise UsageError(f"time_limit_s is {time_limit_s!r}; give a positive number of seconds")
    name = getattr(function, "__qualname__", "")
    if function.__module__ == "__main__" or not name.isidentifier():
        raise UsageError(f"{function!r} cannot run in another process; define it at the top of an importable module")
    with tempfile.TemporaryDirectory(prefix="placer-", ignore_cleanup_errors=True) as temporary:
        folder = Path(temporary)
        search = [str(Path(entry).resolve()) for entry in sys.path]
        (folder / "path.json").write_text(json.dumps(search), encoding="utf-8")
        (folder / "request").write_bytes(pickle.dumps((function.__module__, name, arguments)))
        status = _run_child(folder, time_limit_s * GRACE_FACTOR + GRACE_S, what=name, time_limit_s=time_limit_s)
        return _answer(folder, status, name)


def _run_child(folder: Path, kill_after_s: float, *, what: str, time_limit_s: float) -> int:
    environment = dict(os.environ, TMPDIR=str(folder))
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-c", START_CHILD, str(folder)],
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env=environment,
        )
        try:
            status = process.wait(timeout=kill_after_s)
        except subprocess.TimeoutExpired as error:
            raise IsolationTimeoutError(
                f"{what}: still running {kill_after_s:.0f} s after its start with a time limit of {time_limit_s:g} s; "
                "it was killed: give it more time or a smaller problem"
            ) from error
        finally:
            _kill_session(process)
    return status


def _kill_session(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() != 0:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _answer(folder: Path, status: int, name: str) -> Any:
    if status == 0 and (folder / "answer").is_file():
        kind, value = pickle.loads((folder / "answer").read_bytes())  # noqa: S301 - our own child wrote it
        if kind == "raised":
            raise value
        return value
    lines = (folder / "log").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    how = f"signal {signal.Signals(-status).name}" if status < 0 else f"exit status {status}"
    raise SolverError(f"{name}: the back end's process ended with {how}" + (f": {lines[-1]}" if lines else ""))


def _child(folder: Path) -> None:
    threading.Thread(target=_end_with_parent, args=(folder,), daemon=True).start()
    module, name, arguments = pickle.loads((folder / "request").read_bytes())  # noqa: S301 - our own parent wrote it
    function = getattr(importlib.import_module(module), name)
    try:
        answer = ("returned", function(*arguments))
    except PlacerError as error:
        answer = ("raised", error)
    payload = pickle.dumps(answer)
    (folder / "answer.part").write_bytes(payload)
    (folder / "answer.part").rename(folder / "answer")


def _end_with_parent(folder: Path) -> None:
    # the parent holds the other end of this pipe for as long as it lives; at EOF nobody waits for an answer any more
    # (the plain descriptor, since a thread inside sys.stdin would keep the interpreter from ending in order)
    os.read(0, 1)
    shutil.rmtree(folder, ignore_errors=True)
    os.killpg(0, signal.SIGKILL)
