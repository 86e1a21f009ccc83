"""Runs the command line in this process; what would be a traceback is an exception that escapes and fails the test."""

import contextlib
import io
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

from placer.cli import main

__all__ = ["Outcome", "placer", "refused", "run_json"]


@dataclass(frozen=True)
class Outcome:
    """Exit code and both outputs of one call; what readers noticed is kept apart from the errors."""

    code: int
    out: str
    err: str
    notes: str = ""


def placer(*arguments: object) -> Outcome:
    """What `placer arguments...` does. Anything but SystemExit that leaves `main` is a bug and is let through."""
    out, err = io.StringIO(), io.StringIO()
    code: Any = 0
    with (
        mock.patch.object(sys, "argv", ["placer", *map(str, arguments)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code or 0
    lines = err.getvalue().splitlines(keepends=True)
    errors = "".join(line for line in lines if not line.startswith("note: "))
    return Outcome(code, out.getvalue(), errors, "".join(line for line in lines if line.startswith("note: ")))


def run_json(*arguments: object) -> dict[str, Any]:
    """The one object that `--json` prints; nothing else is on standard output."""
    outcome = placer(*arguments, "--json")
    assert outcome.code == 0, outcome.err
    assert outcome.out.count("\n") == 1, "one line"
    assert outcome.out.endswith("\n")
    data = json.loads(outcome.out, parse_constant=lambda name: (_ for _ in ()).throw(ValueError(name)))
    assert isinstance(data, dict)
    return data


def refused(code: int, *arguments: object, says: tuple[str, ...] | str = (), folder: Path | None = None) -> str:
    """The one line on standard error of a call that ends with `code`, prints nothing else and leaves no new file."""
    before = contents(folder)
    outcome = placer(*arguments)
    assert outcome.code == code, f"exit code {outcome.code}: {outcome.err}"
    assert outcome.out == ""
    lines = [line for line in outcome.err.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith("placer: ")
    assert "Traceback" not in outcome.err
    for text in (says,) if isinstance(says, str) else says:
        assert text in lines[0]
    assert contents(folder) == before, "a refusal writes nothing"
    return lines[0]


def contents(folder: Path | None) -> dict[str, bytes]:
    """Every file below `folder`, hidden ones too."""
    if folder is None:
        return {}
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
