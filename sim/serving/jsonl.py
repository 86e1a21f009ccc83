"""Requests of a Mooncake-style trace: one JSON object a line with `timestamp` (ms), lengths and prefix blocks.

The fields are those of the traces that the Mooncake paper (FAST 2025) published: timestamp, input_length,
output_length, hash_ids (ids of the prompt's leading blocks; optional here). Other fields are left alone.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np

from placer.core.errors import InputFileError
from sim.serving.requests import Workload

__all__ = ["read_workload"]

NS_PER_MS = 1_000_000
MOST_MS = 10**11
MOST_TOKENS = 2**31


def read_workload(path: Path, most: int | None = None) -> Workload:
    """The first `most` requests of the file (None: all), times counted from the first.

    Raises InputFileError naming file, line, field and value.
    """
    arrival: list[float] = []
    inputs: list[float] = []
    outputs: list[float] = []
    prefixes: list[tuple[int, ...]] = []
    try:
        with Path(path).open(encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                if most is not None and len(arrival) >= most:
                    break
                if not line.strip():
                    continue
                where = f"{path} line {number}"
                row = _row(where, line)
                time = _number(where, row, "timestamp", whole=False)
                if arrival and time < arrival[-1]:
                    raise InputFileError(
                        f"{where}: timestamp is {time:g}, the line before has {arrival[-1]:g}; sort it"
                    )
                arrival.append(time)
                inputs.append(_number(where, row, "input_length"))
                outputs.append(_number(where, row, "output_length"))
                prefixes.append(_prefix(where, row))
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror})") from error
    except UnicodeDecodeError as error:
        raise InputFileError(f"{path}: is not text ({error.reason}); give one JSON object a line") from error
    if not arrival:
        raise InputFileError(f"{path}: holds no requests; give one JSON object a line")
    since_first = np.array(arrival, dtype=np.float64) - arrival[0]
    return Workload(
        arrival_ns_Q=np.rint(since_first * NS_PER_MS).astype(np.int64),
        input_Q=np.array(inputs, dtype=np.int64),
        output_Q=np.array(outputs, dtype=np.int64),
        prefix_Q=tuple(prefixes),
    )


def _row(where: str, line: str) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{where}: is not JSON ({error})") from error
    if not isinstance(row, dict):
        raise InputFileError(f"{where}: is a {type(row).__name__}; give an object with timestamp and lengths")
    return row


def _number(where: str, row: dict[str, Any], field: str, *, whole: bool = True) -> float:
    if field not in row:
        raise InputFileError(f"{where}: has no {field}; every request needs one")
    value: Any = row[field]
    if isinstance(value, bool) or not (isinstance(value, int) or (isinstance(value, float) and not whole)):
        raise InputFileError(f"{where}: {field} is {str(value)[:60]!r}; give a {'whole ' if whole else ''}number")
    least, most = (1, MOST_TOKENS) if whole else (0, MOST_MS)
    if not least <= value <= most:
        raise InputFileError(f"{where}: {field} is {str(value)[:60]}; give {least} to {most}")
    return value


def _prefix(where: str, row: dict[str, Any]) -> tuple[int, ...]:
    ids = row.get("hash_ids", [])
    if not isinstance(ids, list) or not all(type(one) is int for one in ids):
        raise InputFileError(f"{where}: hash_ids is {str(ids)[:60]}; give a list of whole numbers or leave it out")
    return tuple(ids)
