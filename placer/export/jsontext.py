"""JSON bytes with one line per row of a map, so that `diff` of two exported plans reads well."""

import json
from typing import Any

from placer.core.errors import InputFileError

__all__ = ["json_bytes_of_rows", "parse_json"]


def json_bytes_of_rows(rows: list[Any], *, before: str = "[\n", after: str = "\n]\n") -> bytes:
    """UTF-8 text of `rows`, each on its own line, between `before` and `after`."""
    return (before + ",\n".join(json.dumps(row) for row in rows) + after).encode()


def parse_json(payload: bytes) -> Any:
    """The value in `payload`. Raises InputFileError when it is not JSON."""
    try:
        return json.loads(payload.decode("utf-8"))
    except (UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputFileError(f"is not JSON ({error})") from error
