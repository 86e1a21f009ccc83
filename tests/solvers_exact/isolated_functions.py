"""What the tests run in a child process."""

import os
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

from placer.core.errors import InfeasibleError


def add(left: int, right: int) -> int:
    print("a back end that talks on standard output")
    warnings.warn("and warns", stacklevel=1)
    return left + right


def process_facts() -> tuple[int, int]:
    return os.getpid(), os.getsid(0)


def fail() -> None:
    raise ZeroDivisionError("the back end's own bug")


def refuse() -> None:
    raise InfeasibleError("layer 3: no room")


def crash(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def vanish(*_: object) -> None:
    os._exit(3)


def sleep_forever(*_: object) -> None:
    time.sleep(600)


def start_grandchild_and_sleep(note: str) -> None:
    """Writes the process ids of this child and of a program it started, then sleeps."""
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    part = Path(note + ".part")
    part.write_text(f"{os.getpid()} {program.pid}")
    part.rename(note)
    time.sleep(600)


def start_grandchild_and_crash(note: str) -> None:
    program = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    Path(note).write_text(str(program.pid))
    crash()
