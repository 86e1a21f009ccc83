"""What the verbs share: flags, numbers with units, progress on standard error, output for people and machines."""

import json
import os
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from placer.core.errors import UsageError

if TYPE_CHECKING:
    from placer.core.model import ModelSpec
    from placer.report.tables import DataTable

__all__ = [
    "ClusterFlag",
    "ConfigFlag",
    "JsonFlag",
    "ModelFlag",
    "OutFlag",
    "emit",
    "load_model",
    "parse_bytes",
    "parse_share",
    "parse_time",
    "progress_line",
    "read_source",
    "require_distinct",
    "require_parent",
    "status_line",
    "warn",
]

ClusterFlag = Annotated[
    str,
    typer.Option(
        "--cluster",
        help="nodeN (one node of N ranks), NxM (N nodes of M ranks), a preset (h100, h200-2x8, gb200-nvl72, "
        "cpu-4x1-200mbit, cpu-4) or a YAML file.",
    ),
]
ConfigFlag = Annotated[
    Path | None,
    typer.Option("--config", help="YAML with sections profile, solve, run, schedule, calibrate and device."),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="One JSON object on standard output, nothing else.")]
ModelFlag = Annotated[
    str | None,
    typer.Option("--model", help="Model preset (gpt-oss-20b, deepseek-v3, ...), a config.json or its folder."),
]
OutFlag = Annotated[Path, typer.Option("-o", "--output", help="File to write, whole or not at all.")]


def load_model(name: str | None) -> "ModelSpec | None":
    """The model a flag names, or None. Raises UsageError, InputFileError."""
    if name is None:
        return None
    from traces.hf_config import MODELS, model_from_hf_config

    if name in MODELS:
        return MODELS[name]
    path = Path(name)
    # os.path is False for a name too long, where pathlib raises
    if os.path.isdir(path):  # noqa: PTH112
        path = path / "config.json"
    if os.path.exists(path):  # noqa: PTH110
        return model_from_hf_config(path)
    raise UsageError(f"model {name!r} is neither a file nor a preset; presets: {', '.join(sorted(MODELS))}")


def parse_time(text: str) -> float:
    """Seconds in `60`, `60s`, `5m` or `1h`. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m|h)?", text.strip())
    if not match or float(match[1]) <= 0:
        raise UsageError(f"--time {text!r} is not a duration; write 60s, 5m or 1h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600, None: 1}[match[2]]


def parse_bytes(text: str, flag: str) -> int:
    """Bytes in `512MiB`, `4GiB`, `200MB` or `1000000`. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kKMGT]i?B|B)?", text.strip())
    if not match:
        raise UsageError(f"{flag} {text!r} is not an amount; write 512MiB, 4GiB or 200MB")
    unit = (match[2] or "B").upper()
    power = "BKMGT".index(unit[0])
    return int(float(match[1]) * (1024 if "I" in unit else 1000) ** power)


def parse_share(text: str, flag: str) -> float:
    """A fraction in `1%` or `0.01`. Raises UsageError."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(%)?", text.strip())
    value = float(match[1]) * (0.01 if match[2] else 1) if match else -1.0
    if not 0 <= value < 1:
        raise UsageError(f"{flag} {text!r} is not a share; write 1% or 0.01")
    return value


def require_parent(path: Path) -> None:
    """Refuses an output whose folder is missing before any long work starts. Raises UsageError."""
    if not os.path.isdir(path.parent):  # noqa: PTH112
        raise UsageError(f"{path}: the folder {path.parent} does not exist; create it first")


def require_distinct(*outputs: Path | None, inputs: tuple[Path | None, ...] = ()) -> None:
    """Refuses an output that is an input or another output, of which only the second would be left. UsageError."""
    read = {os.path.realpath(path) for path in inputs if path is not None}
    names = [os.path.realpath(path) for path in outputs if path is not None]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise UsageError(f"{name}: is named for two outputs; give each a file of its own")
        if name in read:
            raise UsageError(f"{name}: is read by this command and would be replaced; give the output another name")


def read_source(path: Path, model: str | None, *, tokens: bool = False) -> Any:
    """The trace, counts or profile in `path` (`tokens`: a trace only); what its reader noticed is told."""
    from placer.pipeline import open_source, open_trace

    source = (open_trace if tokens else open_source)(path, load_model(model), progress_line("reading"))
    for note in getattr(source, "notes", ()):
        status_line(f"note: {note}")
    return source


def warn(messages: list[str] | tuple[str, ...]) -> None:
    """Lines for a person, on standard error."""
    for message in messages:
        sys.stderr.write(f"warning: {message}\n")


def progress_line(what: str) -> Callable[[int, int], None]:
    """A progress callback: one line rewritten on a terminal, a line every ten seconds elsewhere; standard error."""
    terminal = sys.stderr.isatty()
    started = time.monotonic()
    last = started

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < (0.2 if terminal else 10.0) and not (terminal and done >= total):
            return
        last = now
        share = 100 * done / max(1, total)
        text = f"{what}: {share:3.0f} % after {now - started:.0f} s"
        sys.stderr.write(f"\r{text}\033[K" + ("\n" if done >= total else "") if terminal else text + "\n")
        sys.stderr.flush()

    return show


def status_line(text: str) -> None:
    """One line of progress on standard error, in place of a progress line half-written on a terminal."""
    sys.stderr.write(("\r\033[K" if sys.stderr.isatty() else "") + text.rstrip("\n") + "\n")
    sys.stderr.flush()


def emit(as_json: bool, data: dict[str, Any], tables: "tuple[DataTable, ...]", lines: tuple[str, ...] = ()) -> None:
    """Prints `data` as one JSON object, or the tables and lines for a person."""
    if as_json:
        sys.stdout.write(json.dumps(data, allow_nan=False) + "\n")
        return
    from rich.console import Console

    from placer.report.tables import render

    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=False)
    for table in tables:
        render(table, console)
    for line in lines:
        sys.stdout.write(line + "\n")
