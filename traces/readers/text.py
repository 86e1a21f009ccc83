"""JSON and JSON-lines files, read with every way they can be damaged turned into one line for the user."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from placer.core.errors import InputFileError

__all__ = ["first_line", "json_lines", "load_json", "parse_json"]

BAD_TEXT = (UnicodeDecodeError, ValueError, RecursionError)


def load_json(path: Path) -> Any:
    """The value in a JSON file. Raises InputFileError."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    except BAD_TEXT as error:
        raise InputFileError(f"{path}: is not JSON ({first_line(error)}); write it again") from error


def json_lines(path: Path) -> Iterator[tuple[int, Any, int]]:
    """(line number, value, bytes read so far) of each line that is not empty. Raises InputFileError."""
    done = 0
    try:
        with Path(path).open("rb") as file:
            for number, line in enumerate(file, 1):
                done += len(line)
                if line.strip():
                    yield number, parse_json(line, f"{path}: line {number}"), done
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror or error})") from error


def parse_json(text: bytes | str, where: str) -> Any:
    """The value of one JSON text. Raises InputFileError naming `where`."""
    try:
        return json.loads(text)
    except BAD_TEXT as error:
        raise InputFileError(f"{where}: is not JSON ({first_line(error)}); write it again") from error


def first_line(error: BaseException) -> str:
    """What an error says, in one line of bearable length."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]
