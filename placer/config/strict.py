"""Strict YAML: every key must be known, every value of the right type, and the error names the nearest known key."""

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from placer.core.errors import InputFileError, PlacerError

__all__ = ["from_mapping", "read_yaml"]

T = TypeVar("T")
MAX_BYTES = 256 << 10


def read_yaml(path: Path) -> Any:
    """The plain data in a YAML file. Raises InputFileError naming the file and the line."""
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror})") from error
    if len(raw) > MAX_BYTES:
        raise InputFileError(f"{path}: {len(raw)} bytes is no configuration; is this the right file?")
    try:
        return yaml.safe_load(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputFileError(f"{path}: is not text ({error.reason}); give a YAML file") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        why = " ".join(str(getattr(error, "problem", None) or error).split())
        raise InputFileError(f"{path}:{where} is not YAML ({why})") from error


def from_mapping(kind: type[T], data: Any, *, where: str) -> T:
    """A `kind` (frozen dataclass) from plain data. Raises InputFileError naming `where`, the key and the mend."""
    _refuse_unknown(kind, data, where, "")
    try:
        return msgspec.convert(data, type=kind)
    except msgspec.ValidationError as error:
        raise InputFileError(f"{where}: {error}".replace(" - at `$.", ", at `").replace(" - at `$`", "")) from error
    except PlacerError as error:
        raise InputFileError(f"{where}: {error}") from error


def _refuse_unknown(kind: Any, data: Any, where: str, prefix: str) -> None:
    if not isinstance(data, Mapping):
        # never the value itself: aliases can make a small file's text fill the memory
        kept = prefix.removesuffix(".") or "the file"
        raise InputFileError(f"{where}: {kept} must be a mapping of keys to values, got a {type(data).__name__}")
    hints = typing.get_type_hints(kind)
    for key, value in data.items():
        if key not in hints:
            short = str(key)[:60] if isinstance(key, str | int | float) else f"<{type(key).__name__}>"
            near = difflib.get_close_matches(short, list(hints), n=1, cutoff=0.4)
            mend = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(hints)}"
            raise InputFileError(f"{where}: unknown key {prefix + short!r}; {mend}")
        inner = _dataclass_of(hints[key])
        if inner is not None and value is not None:
            _refuse_unknown(inner, value, where, f"{prefix}{key}.")
    for field in fields(kind):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in data:
            raise InputFileError(f"{where}: key {prefix + field.name!r} is missing; add it")


def _dataclass_of(hint: Any) -> Any:
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    return next((option for option in options if is_dataclass(option)), None)
