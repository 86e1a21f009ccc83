"""Reads JSON lines: one object per token or per request.

Legend: T tokens, L layers, K columns (the most experts of any row).

    {"request_id": "a", "position": 0, "experts": [[5, 3], [1], []], "weights": [[0.7, 0.3], [1.0], []], "lang": "de"}
    {"request_id": "b", "position": [0, 1], "experts": [[[5, 3], [1, 2], []], [[4, 2], [0, 7], []]], "lang": "en"}

`experts` is a list of ids per layer (a token) or a list of those (a request's tokens); lists may be of any length and
-1 means unset. `weights` has the same shape. position, token_id, phase (0, 1, "prefill" or "decode"), step, source_rank
and arrival_ns are a number for all tokens of the line or a list with one per token. Every other key is a tag: a text
or number for the whole line. A line without `experts` may stand first: {"layers": [1, 2, 4]} names the absolute layers
of the rows.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import InputFileError
from placer.core.model import ModelSpec
from traces.readers.raw import RawTrace, as_ids, as_requests, as_tag, as_weights, column, finish
from traces.readers.text import json_lines
from traces.summarize import Progress
from traces.trace import COLUMN_DTYPES, RoutingTrace

__all__ = ["read_jsonl"]

PHASES = {"prefill": 0, "decode": 1}
COLUMNS = {name.removesuffix("_T"): name for name in COLUMN_DTYPES}
MISSING = object()


@dataclass(slots=True)
class _Lines:
    """What the lines read so far hold; one entry per line, except `columns`: per line and column."""

    expert_TLK: list[npt.NDArray[Any]] = field(default_factory=list)
    weight_TLK: list[npt.NDArray[Any]] = field(default_factory=list)
    requests: list[Any] = field(default_factory=list)
    columns: dict[str, list[npt.NDArray[Any]]] = field(default_factory=dict)
    labels: dict[str, list[str]] = field(default_factory=dict)


def read_jsonl(path: Path, model: ModelSpec | None = None, progress: Progress | None = None) -> RoutingTrace:
    """The trace in a JSON-lines file. Raises InputFileError naming the line, or MismatchError."""
    path = Path(path)
    lines = _Lines()
    layer_ids: tuple[int, ...] | None = None
    for number, record, done in json_lines(path):
        where = f"{path}: line {number}"
        if not isinstance(record, dict):
            raise InputFileError(f"{where}: is not an object; give one JSON object per line")
        if "experts" not in record and not lines.expert_TLK and isinstance(record.get("layers"), list):
            layer_ids = _layers(record["layers"], where)
            continue
        _add(lines, record, where)
        if progress is not None:
            progress(done, path.stat().st_size)
    if not lines.expert_TLK:
        raise InputFileError(f"{path}: holds no tokens; give one JSON object per token or request")
    counts = [len(part) for part in lines.expert_TLK]
    if layer_ids is not None and len(layer_ids) != lines.expert_TLK[0].shape[1]:
        raise InputFileError(
            f"{path}: the first line names {len(layer_ids)} layers, the others have "
            f"{lines.expert_TLK[0].shape[1]}; name each layer once"
        )
    notes = []
    tags = {}
    for name, labels in lines.labels.items():
        tags[name] = as_tag(np.repeat(np.array(labels), counts), None, f"{path}: tag {name}")
    columns = {}
    for name, parts in lines.columns.items():
        if len(parts) == len(counts):
            columns[name] = column(name, np.concatenate(parts), f"{path}: {name.removesuffix('_T')}")
        else:
            notes.append(f"{name} left out: {len(counts) - len(parts)} lines lack it")
    if lines.weight_TLK and len(lines.weight_TLK) != len(counts):
        notes.append(f"weights left out: {len(counts) - len(lines.weight_TLK)} lines lack them")
        lines.weight_TLK = []
    weight_LTK = None
    if lines.weight_TLK:
        weight_LTK = _stack(lines.weight_TLK, 0, f"{path}: weights")
    request_id_T, numbered = _requests(lines.requests, counts)
    if numbered:
        notes.append("no request ids: every line counts as one request")
    raw = RawTrace(
        where=str(path),
        expert_LTK=_stack(lines.expert_TLK, 65535, f"{path}: experts"),
        weight_LTK=weight_LTK,
        request_id_T=request_id_T,
        layer_ids=layer_ids,
        columns=columns,
        tags=tags,
        notes=tuple(notes),
        provenance=f"jsonl {path.name}",
    )
    return finish(raw, model)


def _add(lines: _Lines, record: Mapping[str, Any], where: str) -> None:
    expert_TLK = as_ids(_cube(record.get("experts"), -1, "iu", f"{where}: experts"), f"{where}: experts")
    if lines.expert_TLK and expert_TLK.shape[1] != lines.expert_TLK[0].shape[1]:
        raise InputFileError(
            f"{where}: experts has {expert_TLK.shape[1]} layers, the lines before have "
            f"{lines.expert_TLK[0].shape[1]}; give [] for a layer that a token skips"
        )
    lines.expert_TLK.append(expert_TLK)
    if record.get("weights") is not None:
        weight_TLK = _cube(record["weights"], 0.0, "fiu", f"{where}: weights")
        if weight_TLK.shape != expert_TLK.shape:
            raise InputFileError(f"{where}: weights {weight_TLK.shape} and experts {expert_TLK.shape} differ in shape")
        lines.weight_TLK.append(as_weights(weight_TLK, f"{where}: weights"))
    lines.requests.append(record.get("request_id", MISSING))
    for key, value in record.items():
        if key in COLUMNS:
            values = _values(key, value, len(expert_TLK), where)
            lines.columns.setdefault(COLUMNS[key], []).append(values)
        elif key not in ("experts", "weights", "request_id"):
            if not isinstance(value, str | int | float | bool) and value is not None:
                raise InputFileError(f"{where}: tag {key} is a {type(value).__name__}; give a text or a number")
            labels = lines.labels.setdefault(key, [""] * (len(lines.expert_TLK) - 1))
            labels.append("" if value is None else str(value))
    for labels in lines.labels.values():
        labels.extend([""] * (len(lines.expert_TLK) - len(labels)))


def _cube(value: Any, fill: float, kinds: str, where: str) -> npt.NDArray[Any]:
    """`value` as (tokens, layers, columns): lists of lists (a token) or of lists of lists (a request)."""
    if not isinstance(value, list) or not value or not isinstance(value[0], list):
        raise InputFileError(f"{where}: give a list of ids per layer, or one of those per token")
    tokens = value if value[0] and isinstance(value[0][0], list) else [value]
    try:
        width = max(1, max(len(ids) for layers in tokens for ids in layers))
        if not all(len(layers) == len(tokens[0]) for layers in tokens):
            raise InputFileError(f"{where}: the tokens have different numbers of layers; give [] for a skipped layer")
        _room(len(tokens) * len(tokens[0]) * width, sum(len(ids) + 1 for layers in tokens for ids in layers), where)
        cube = np.array([[ids + [fill] * (width - len(ids)) for ids in layers] for layers in tokens])
    except (TypeError, ValueError, OverflowError) as error:
        raise InputFileError(f"{where}: is not a list of numbers per layer ({error})") from error
    if cube.ndim != 3 or cube.dtype.kind not in kinds:
        raise InputFileError(f"{where}: is {cube.ndim}-deep with {cube.dtype}; give a list of numbers per layer")
    return cube


def _room(cells: int, given: int, where: str) -> None:
    # one long row among many short ones would otherwise make a small file fill the memory
    if cells > max(1_000_000, 256 * given):
        raise InputFileError(f"{where}: rows of very different lengths; no router chooses so many experts at once")


def _values(key: str, value: Any, tokens: int, where: str) -> npt.NDArray[np.int64]:
    values = value if isinstance(value, list) else [value] * tokens
    if key == "phase":
        values = [PHASES.get(item, item) if isinstance(item, str) else item for item in values]
    if len(values) != tokens or not all(type(item) is int and -(2**63) <= item < 2**63 for item in values):
        raise InputFileError(
            f"{where}: {key} is {str(value)[:60]}; give an integer, or one for each of {tokens} tokens"
        )
    return np.array(values, dtype=np.int64)


def _layers(value: list[Any], where: str) -> tuple[int, ...]:
    if not all(type(layer) is int and 0 <= layer < 2**20 for layer in value) or len(set(value)) != len(value):
        raise InputFileError(f"{where}: layers is {str(value)[:60]}; give different layer numbers")
    return tuple(value)


def _requests(requests: list[Any], counts: list[int]) -> tuple[npt.NDArray[np.int32], bool]:
    """Request id of each token, and whether they had to be made up."""
    if all(request is MISSING for request in requests):
        return np.repeat(np.arange(len(counts), dtype=np.int32), counts), True
    if all(type(request) is int and 0 <= request < 2**31 for request in requests):
        return np.repeat(np.array(requests, dtype=np.int32), counts), False
    texts = np.array(["" if request is MISSING else f"{type(request).__name__}:{request}" for request in requests])
    return as_requests(np.repeat(texts, counts), "request_id"), False


def _stack(parts: list[npt.NDArray[Any]], fill: int, where: str) -> npt.NDArray[Any]:
    """The parts (tokens, layers, columns) one behind the other as (layers, tokens, most columns)."""
    tokens, layers, columns = sum(len(part) for part in parts), parts[0].shape[1], max(part.shape[2] for part in parts)
    _room(tokens * layers * columns, sum(part.size for part in parts), where)
    stacked = np.full((layers, tokens, columns), fill, dtype=parts[0].dtype)
    start = 0
    for part in parts:
        stacked[:, start : start + len(part), : part.shape[2]] = part.transpose(1, 0, 2)
        start += len(part)
    return stacked
