"""Reads the project's npz layout: expert_TLK and friends.

Legend: T tokens, L layers, K top-k.

    expert_TLK    integers; unset entries are the type's largest value (unsigned) or -1 (signed). expert_LTK also does.
    weight_TLK    router weights, optional
    request_id_T  integers or texts, optional (without it all tokens are one request)
    position_T, token_id_T, phase_T, step_T, source_rank_T, arrival_ns_T   optional integers
    <tag>_T       codes, with their names in <tag>s (dataset_T with datasets), or the labels themselves
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import InputFileError
from placer.core.model import ModelSpec
from traces.readers.npy import Member, open_members
from traces.readers.raw import RawTrace, as_ids, as_requests, as_tag, as_weights, column, finish
from traces.summarize import Progress
from traces.trace import COLUMN_DTYPES, RoutingTrace, Tag

__all__ = ["read_npz"]


def read_npz(path: Path, model: ModelSpec | None = None, progress: Progress | None = None) -> RoutingTrace:
    """The trace in an .npz file; members are read and transposed in pieces. Raises InputFileError or MismatchError."""
    path = Path(path)
    with open_members(path) as members:
        experts, layer_major = _cube(path, members, "expert")
        if experts is None:
            raise InputFileError(f"{path}: has no array expert_TLK; it has {', '.join(sorted(members)) or 'none'}")
        layers, tokens = _axes(experts, layer_major)
        weights, weights_layer_major = _cube(path, members, "weight")
        if weights is not None and _axes(weights, weights_layer_major) != (layers, tokens):
            raise InputFileError(
                f"{weights.where}: shape {weights.header.shape}; expert ids have {experts.header.shape}"
            )
        if weights is not None and weights.header.shape[2] != experts.header.shape[2]:
            raise InputFileError(
                f"{weights.where}: shape {weights.header.shape}; expert ids have {experts.header.shape}"
            )
        expert_LTK = _layer_major(experts, layer_major, as_ids, progress)
        weight_LTK = None
        if weights is not None:
            weight_LTK = _layer_major(weights, weights_layer_major, as_weights, None)
        columns, tags, notes = _columns(path, members, tokens)
    request_id_T = columns.pop("request_id_T", None)
    if request_id_T is None:
        request_id_T = np.zeros(tokens, dtype=np.int32)
        notes = (*notes, "no request ids: all tokens count as one request")
    raw = RawTrace(
        where=str(path),
        expert_LTK=expert_LTK,
        weight_LTK=weight_LTK,
        request_id_T=request_id_T,
        columns=columns,
        tags=tags,
        notes=notes,
        provenance=f"npz {path.name}",
    )
    return finish(raw, model)


def _cube(path: Path, members: Mapping[str, Member], stem: str) -> tuple[Member | None, bool]:
    for name, layer_major in ((f"{stem}_TLK", False), (f"{stem}_LTK", True)):
        if name in members:
            if len(members[name].header.shape) != 3:
                raise InputFileError(f"{path}: {name} has shape {members[name].header.shape}; give (tokens, layers, k)")
            return members[name], layer_major
    return None, False


def _axes(member: Member, layer_major: bool) -> tuple[int, int]:
    first, second = member.header.shape[:2]
    return (first, second) if layer_major else (second, first)


def _layer_major(member: Member, layer_major: bool, convert: Any, progress: Progress | None) -> npt.NDArray[Any]:
    layers, tokens = _axes(member, layer_major)
    top_k = member.header.shape[2]
    if not tokens or not layers or not top_k:
        raise InputFileError(f"{member.where}: shape {member.header.shape} holds nothing; record some requests first")
    result: npt.NDArray[Any] | None = None
    for start, rows in member.rows():
        part = convert(rows, member.where)
        if result is None:
            result = np.empty((layers, tokens, top_k), dtype=part.dtype)
        if layer_major:
            result[start : start + len(part)] = part
        else:
            result[:, start : start + len(part)] = part.transpose(1, 0, 2)
        if progress is not None:
            progress(start + len(part), member.header.shape[0])
    assert result is not None
    return result


def _columns(
    path: Path, members: Mapping[str, Member], tokens: int
) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Tag], tuple[str, ...]]:
    columns: dict[str, npt.NDArray[Any]] = {}
    tags: dict[str, Tag] = {}
    used = {"expert_TLK", "expert_LTK", "weight_TLK", "weight_LTK"}
    for name, member in members.items():
        if not name.endswith("_T"):
            continue
        if member.header.shape != (tokens,):
            raise InputFileError(f"{member.where}: shape {member.header.shape}; the file has {tokens} tokens")
        values = member.read()
        used.add(name)
        if name == "request_id_T":
            columns[name] = as_requests(values, member.where)
        elif name in COLUMN_DTYPES:
            columns[name] = column(name, values, member.where)
        else:
            tag = name.removesuffix("_T")
            names = members[f"{tag}s"].read() if f"{tag}s" in members else None
            used.add(f"{tag}s")
            tags[tag] = as_tag(values, names, member.where)
    ignored = sorted(set(members) - used)
    return columns, tags, (f"arrays left out: {', '.join(ignored)}",) if ignored else ()
