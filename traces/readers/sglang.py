"""Reads the dumps of SGLang's expert distribution recorder (torch.save files), of all its modes.

Legend: T tokens, L layers (all of the model, dense ones blank), K columns (8 in the file), P physical experts,
E logical experts, W windows.

    stat, stat_approx   logical_count (W, L, E)                                            -> LoadCounts
    per_pass            per rank and pass: global_physical_count (L, P)                    -> LoadCounts
    per_token           per rank and pass: topk_ids_of_layer (L, T, 8), positions, ...     -> RoutingTrace
per_pass and per_token files hold physical ids; last_physical_to_logical_map (L, P) turns them into logical ones. A
folder may hold the files of several ranks: their counts are added, their tokens joined.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import InputFileError, MismatchError
from placer.core.model import ModelSpec
from traces.counts import LoadCounts
from traces.readers.logical_count import counts_from_rows
from traces.readers.raw import RawTrace, finish
from traces.readers.requests import infer_requests
from traces.readers.torch_file import load_torch_file
from traces.summarize import Progress
from traces.trace import RoutingTrace

__all__ = ["read_sglang"]

MIXED = 3
"""SGLang's ForwardMode.MIXED: prefill chunks, then decode tokens as chunks of one."""

DECODE = 2
MEND = "give a file that SGLang's recorder wrote"
MAP_NOTE = (
    "ids were physical and were mapped by the last physical_to_logical_map; a rebalance while recording would make the "
    "ids before it wrong"
)


@dataclass(frozen=True, slots=True)
class _Dump:
    """One rank's file: its records and its map (L, P) from physical to logical ids."""

    where: str
    records: list[Mapping[str, Any]]
    logical_LP: npt.NDArray[np.int64]


def read_sglang(
    path: Path, model: ModelSpec | None = None, progress: Progress | None = None
) -> RoutingTrace | LoadCounts:
    """What a dump, or a folder with the dumps of every rank, holds: tokens (per_token) or counts (the other modes).

    Raises DependencyError without torch, InputFileError for files that are no such dumps, MismatchError where ranks or
    model disagree.
    """
    path = Path(path)
    files = sorted(path.glob("*.pt")) if path.is_dir() else [path]
    if not files:
        raise InputFileError(f"{path}: holds no .pt files; give the recorder's output folder or one of its files")
    contents = []
    for done, file in enumerate(files, 1):
        contents.append((str(file), load_torch_file(file)))
        if progress is not None:
            progress(done, len(files))
    kinds = {"stat" if "logical_count" in content else "records" for _, content in contents}
    if len(kinds) > 1:
        raise InputFileError(f"{path}: mixes stat dumps with per_pass or per_token dumps; give one kind")
    if kinds == {"stat"}:
        return _stat(path, contents, model)
    dumps = [_dump(where, content) for where, content in contents]
    shapes = {dump.logical_LP.shape for dump in dumps}
    if len(shapes) > 1:
        raise MismatchError(
            f"{path}: the ranks' physical_to_logical_maps have shapes {sorted(shapes)}; give one run's files"
        )
    if any("topk_ids_of_layer" in record for dump in dumps for record in dump.records):
        return _per_token(path, dumps, model)
    return _per_pass(path, dumps, model)


def _stat(path: Path, contents: Sequence[tuple[str, Mapping[str, Any]]], model: ModelSpec | None) -> LoadCounts:
    parts = [_array(content, "logical_count", where, 3) for where, content in contents]
    if len({part.shape[1:] for part in parts}) > 1:
        raise MismatchError(f"{path}: the dumps' counts have different layers or experts; give one run's files")
    notes = ("counts are summed over all ranks; where ranks see the same tokens (TP) only shares are meaningful",)
    counts = np.concatenate(parts)
    return counts_from_rows(
        counts, model, where=f"{path}: logical_count", notes=notes, provenance=f"sglang stat {path.name}"
    )


def _dump(where: str, content: Mapping[str, Any]) -> _Dump:
    logical_LP = _array(content, "last_physical_to_logical_map", where, 2).astype(np.int64)
    if not logical_LP.size or int(logical_LP.min()) < 0 or int(logical_LP.max()) >= logical_LP.shape[1]:
        raise InputFileError(
            f"{where}: last_physical_to_logical_map {logical_LP.shape} names experts that have no slot; {MEND}"
        )
    records = content.get("records")
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise InputFileError(
            f"{where}: has neither logical_count nor records; give a file that SGLang's recorder wrote"
        )
    return _Dump(where, records, logical_LP)


def _per_pass(path: Path, dumps: Sequence[_Dump], model: ModelSpec | None) -> LoadCounts:
    experts = model.num_experts if model is not None else max(int(dump.logical_LP.max(initial=0)) for dump in dumps) + 1
    layers, _ = dumps[0].logical_LP.shape
    passes: dict[int, npt.NDArray[np.int64]] = defaultdict(lambda: np.zeros((layers, experts), dtype=np.int64))
    rows = np.arange(layers)[:, None]
    for dump in dumps:
        if int(dump.logical_LP.max(initial=0)) >= experts:
            raise MismatchError(f"{dump.where}: maps to expert {int(dump.logical_LP.max())}; the model has {experts}")
        for number, record in enumerate(dump.records):
            where = f"{dump.where}: record {number}"
            counts_LP = _array(record, "global_physical_count", where, 2)
            if counts_LP.shape != dump.logical_LP.shape:
                raise InputFileError(f"{where}: counts {counts_LP.shape}, the map is {dump.logical_LP.shape}")
            np.add.at(passes[_integer(record, "forward_pass_id", where)], (rows, dump.logical_LP), counts_LP)
    if not passes:
        raise InputFileError(f"{path}: holds no forward pass; record some requests first")
    counts = np.stack([passes[number] for number in sorted(passes)])
    notes = (MAP_NOTE, "one window per forward pass, summed over the ranks' files")
    return counts_from_rows(counts, model, where=str(path), notes=notes, provenance=f"sglang per_pass {path.name}")


def _per_token(path: Path, dumps: Sequence[_Dump], model: ModelSpec | None) -> RoutingTrace:
    chunks: list[npt.NDArray[np.uint16]] = []
    columns: dict[str, list[npt.NDArray[np.int32]]] = defaultdict(list)
    notes = [MAP_NOTE, "request ids are inferred from chunks and positions"]
    seen: set[tuple[int, bytes]] = set()
    repeats = 0
    batches = sorted(
        (_integer(record, "forward_pass_id", dump.where), _integer(record, "rank", dump.where), index, number)
        for index, dump in enumerate(dumps)
        for number, record in enumerate(dump.records)
    )
    for forward_pass, rank, index, number in batches:
        dump, record = dumps[index], dumps[index].records[number]
        where = f"{dump.where}: record {number}"
        position_T = _integers(record, "positions", where)
        token_id_T = _integers(record, "input_ids", where)
        expert_LTK = _logical(record, dump.logical_LP, where)
        if not len(position_T) == len(token_id_T) == expert_LTK.shape[1]:
            raise InputFileError(
                f"{where}: {len(token_id_T)} input_ids, {len(position_T)} positions and {expert_LTK.shape[1]} rows of "
                "ids differ; the recorder's buffer (chunked_prefill_size x 8 tokens) was too small, or it is damaged"
            )
        # ranks of one tensor-parallel group record the same tokens again
        twin = (
            forward_pass,
            b"%d" % len(token_id_T) + token_id_T.tobytes() + position_T.tobytes() + expert_LTK.tobytes(),
        )
        if len(token_id_T) == 0 or twin in seen:
            repeats += len(token_id_T)
            continue
        seen.add(twin)
        mode = _integer(record, "forward_mode", where)
        lengths = record.get("extend_seq_lens")
        segment_T, phase_T = _segments(lengths, mode, len(position_T), where)
        chunks.append(expert_LTK)
        for name, values in (
            ("position_T", position_T),
            ("token_id_T", token_id_T),
            ("source_rank_T", np.full(len(position_T), rank, dtype=np.int32)),
            ("step_T", np.full(len(position_T), forward_pass, dtype=np.int32)),
            ("segment_T", segment_T),
            ("phase_T", phase_T),
        ):
            columns[name].append(values)
    if not chunks:
        raise InputFileError(f"{path}: holds no tokens; record some requests first")
    if repeats:
        notes.append(f"{repeats} tokens that several ranks recorded alike are kept once")
    flat = {name: np.concatenate(parts) for name, parts in columns.items()}
    request_id_T = infer_requests(flat["source_rank_T"], flat["step_T"], flat.pop("segment_T"), flat["position_T"])
    raw = RawTrace(
        where=str(path),
        expert_LTK=np.concatenate(chunks, axis=1),
        request_id_T=request_id_T,
        layer_ids=tuple(range(chunks[0].shape[0])),
        num_experts=max(int(dump.logical_LP.max()) for dump in dumps) + 1,
        columns={**flat, "phase_T": flat["phase_T"].astype(np.uint8)},
        notes=tuple(notes),
        provenance=f"sglang per_token {path.name}",
    )
    return finish(raw, model)


def _logical(record: Mapping[str, Any], logical_LP: npt.NDArray[np.int64], where: str) -> npt.NDArray[np.uint16]:
    """Logical ids (L, T, K) uint16 of a record's physical ones, the sentinel where they are negative."""
    physical_LTK = _array(record, "topk_ids_of_layer", where, 3)
    if len(physical_LTK) != len(logical_LP):
        raise InputFileError(f"{where}: ids have {len(physical_LTK)} layers, the map {len(logical_LP)}")
    if physical_LTK.size and int(physical_LTK.max()) >= logical_LP.shape[1]:
        raise InputFileError(
            f"{where}: physical id {int(physical_LTK.max())}; the map has {logical_LP.shape[1]} physical experts"
        )
    expert_LTK = np.full(physical_LTK.shape, 65535, dtype=np.uint16)
    for layer, physical_TK in enumerate(physical_LTK):
        used = physical_TK >= 0
        expert_LTK[layer][used] = logical_LP[layer][physical_TK[used]]
    return expert_LTK


def _segments(lengths: Any, mode: int, tokens: int, where: str) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int32]]:
    """Index in the batch of the sequence each token belongs to, and its phase."""
    if lengths is None:
        return np.arange(tokens, dtype=np.int32), np.full(tokens, int(mode == DECODE), dtype=np.int32)
    if not isinstance(lengths, list) or not all(type(n) is int and 0 <= n <= tokens for n in lengths):
        raise InputFileError(f"{where}: extend_seq_lens is not a list of lengths")
    if sum(lengths) > tokens:
        raise InputFileError(f"{where}: extend_seq_lens adds up to {sum(lengths)}, the batch has {tokens} tokens")
    # what the lengths leave over are decode tokens, one of each sequence
    filled = np.array([*lengths, *[1] * (tokens - sum(lengths))], dtype=np.int64)
    decode = (filled == 1) & ((np.arange(len(filled)) >= len(lengths)) | (mode == MIXED))
    segment_T = np.repeat(np.arange(len(filled), dtype=np.int32), filled)
    return segment_T, decode[segment_T].astype(np.int32)


def _array(content: Mapping[str, Any], name: str, where: str, axes: int) -> npt.NDArray[Any]:
    array = content.get(name)
    if not isinstance(array, np.ndarray) or array.ndim != axes or array.dtype.kind not in "iu":
        found = f"{array.dtype} {array.shape}" if isinstance(array, np.ndarray) else type(array).__name__
        raise InputFileError(f"{where}: {name} is {found}; give integers with {axes} axes, as SGLang's recorder writes")
    return array


def _integer(record: Mapping[str, Any], name: str, where: str) -> int:
    value = record.get(name)
    if type(value) is not int or not 0 <= value < 2**31:
        raise InputFileError(f"{where}: {name} is {value!r}; give a number, as SGLang's recorder writes")
    return value


def _integers(record: Mapping[str, Any], name: str, where: str) -> npt.NDArray[np.int32]:
    values = record.get(name)
    if not isinstance(values, list) or not all(type(value) is int and -(2**31) <= value < 2**31 for value in values):
        raise InputFileError(f"{where}: {name} is not a list of numbers")
    return np.array(values, dtype=np.int32)
