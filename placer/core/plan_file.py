"""What the files of all kinds of plans have in common: JSON with a format and a version, and fields of plain types."""

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from placer.core.errors import InputFileError

__all__ = ["read_plan_fields", "refuse_wrong_types"]

LARGEST = 1e300


def read_plan_fields(
    path: Path, format_: str, version: int, fields: Collection[str], *, what: str, kind: str, maker: str
) -> dict[str, Any]:
    """The fields in a plan's file, without format, version and gap (which is derived); values are not looked at.

    what, kind, maker   of the messages: "a device plan", "device plan", and the command that writes such files
    Raises InputFileError for a file that cannot be read, another format or version, or a field not among `fields`.
    """
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror})") from error
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputFileError(f"{path}: is not JSON ({error}); give a plan that placer wrote") from error
    if not isinstance(data, dict) or data.pop("format", None) != format_:
        raise InputFileError(f"{path}: is not {what} (no format: {format_!r}); give what `{maker}` wrote")
    if (found := data.pop("version", None)) != version:
        raise InputFileError(f"{path}: {kind} version {found!r}; this placer reads version {version}")
    data.pop("gap", None)
    if unknown := sorted(set(data) - set(fields)):
        raise InputFileError(f"{path}: unknown field {unknown[0]!r}; remove it or use a newer placer")
    return data


def refuse_wrong_types(data: dict[str, Any], *, texts: Sequence[str], numbers: Sequence[str]) -> None:
    """Raises ValueError for what JSON may hold in fields that a plan's constructor does not look at.

    `texts` default to "", `numbers` may be null; `hashes` is a table of texts.
    """
    for name in texts:
        if not isinstance(data.get(name, ""), str):
            raise ValueError(f"{name} is {data[name]!r}; give a text")
    for name in numbers:
        value = data.get(name)
        if value is not None and (type(value) not in (int, float) or not abs(value) < LARGEST):
            raise ValueError(f"{name} is {str(value)[:60]!r}; give a number or null")
    hashes = data.get("hashes", {})
    if not isinstance(hashes, dict) or not all(isinstance(value, str) for value in hashes.values()):
        raise ValueError(f"hashes is {str(hashes)[:60]!r}; give a table of texts")
