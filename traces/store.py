"""The trace store: one safetensors file per trace, layer-major, memory-mapped when loaded.

Legend: L routing sites, T tokens, K top-k.
Schema 1: arrays named as in RoutingTrace (tags as tag_<name>); the header's texts are format, schema, sha256, model
(JSON), tags (JSON: name to list of names), notes (JSON list) and provenance.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from placer.core.errors import InputFileError, UsageError
from placer.core.model import ModelSpec
from traces.ids import IdDType
from traces.model_json import model_from_json
from traces.tensorfile import TensorFile, TensorSpec, read_tensor_file, write_tensor_file
from traces.trace import COLUMN_DTYPES, RoutingTrace, Tag, array_digests, content_hash

__all__ = ["FORMAT", "Verify", "load_trace", "save_trace", "save_trace_by_layer"]

FORMAT = "placer-trace"
SCHEMA = "1"
CUBES = ("expert_LTK", "weight_LTK", "bits_LTK")
MEND = "write it anew with `placer trace import`"

Verify = Literal["ids", "hash", "none"]
"""What `load_trace` looks at beyond the header: ids and weights (default), those and the content hash, nothing."""


def save_trace(trace: RoutingTrace, path: Path, *, tokens: npt.NDArray[np.bool_] | None = None) -> None:
    """Writes `trace` (or the tokens of the mask `tokens`) to `path`, layer by layer, whole or not at all.

    A part of a memory-mapped trace is so written without ever being in memory. Raises InputFileError.
    """
    pick: Any = slice(None) if tokens is None else np.flatnonzero(tokens)
    count = trace.num_tokens if tokens is None else len(pick)
    arrays = trace.arrays()
    specs = {
        name: TensorSpec(array.dtype, (array.shape[0], count, array.shape[2]) if array.ndim == 3 else (count,))
        for name, array in arrays.items()
    }
    pieces = ((name, part[pick]) for name, array in arrays.items() for part in (array if array.ndim == 3 else [array]))
    _write(Path(path), trace.model, trace.tags, trace.provenance, trace.notes, specs, pieces)


def save_trace_by_layer(
    path: Path,
    *,
    model: ModelSpec,
    layers: Iterable[Mapping[str, npt.NDArray[Any]]],
    num_tokens: int,
    top_k: int,
    dtype: IdDType,
    request_id_T: npt.NDArray[np.int32],
    columns: Mapping[str, npt.NDArray[Any]] | None = None,
    tags: Mapping[str, Tag] | None = None,
    cubes: tuple[str, ...] = ("expert_LTK",),
    provenance: str = "",
    notes: tuple[str, ...] = (),
) -> None:
    """Writes a trace larger than memory: `layers` yields, site by site, one (tokens, k) array for each of `cubes`.

    Ids and weights are checked as they come. Raises UsageError for what does not fit, InputFileError for the path.
    """
    one = {"expert_LTK": np.dtype(dtype), "weight_LTK": np.dtype(np.float16), "bits_LTK": np.dtype(np.uint8)}
    columns, tags = dict(columns or {}), dict(tags or {})
    sites = model.to_dict()["sites"]

    def layer_trace(row: int, layer: Mapping[str, npt.NDArray[Any]]) -> RoutingTrace:
        fields: dict[str, Any] = {**columns, **{name: layer[name][None] for name in cubes}}
        return RoutingTrace(
            model=ModelSpec.from_dict({**model.to_dict(), "sites": [sites[row]]}),
            request_id_T=request_id_T,
            tags=tags,
            **fields,
        )

    def pieces() -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for row, layer in enumerate(layers):
            if row == model.num_sites:
                raise UsageError(f"more layers were given than the {model.num_sites} sites of model {model.name!r}")
            checked = layer_trace(row, layer)
            yield from ((name, array) for name, array in checked.arrays().items() if name in cubes or row == 0)

    cube = (model.num_sites, num_tokens, top_k)
    flat = {"request_id_T": request_id_T, **columns, **{f"tag_{name}": tag.codes_T for name, tag in tags.items()}}
    specs = {name: TensorSpec(one[name], cube) for name in cubes}
    specs |= {name: TensorSpec(array.dtype, array.shape) for name, array in flat.items()}
    if model.num_ids > np.iinfo(dtype).max:
        raise UsageError(f"{dtype} cannot hold ids up to {model.num_ids - 1} and a sentinel; use uint16")
    _write(Path(path), model, tags, provenance, notes, specs, pieces())


def load_trace(path: Path, *, verify: Verify = "ids") -> RoutingTrace:
    """The trace in `path`, memory-mapped: a file larger than memory loads.

    Raises InputFileError naming the file, the field and the mend for anything that is not a whole, legal trace.
    """
    path = Path(path)
    if verify not in ("ids", "hash", "none"):
        raise UsageError(f"verify is {verify!r}; use 'ids', 'hash' or 'none'")
    file = read_tensor_file(path)
    if file.metadata.get("format") != FORMAT:
        raise InputFileError(f"{path}: is not a placer trace (format {file.metadata.get('format')!r}); {MEND}")
    if file.metadata.get("schema") != SCHEMA:
        raise InputFileError(f"{path}: trace schema {file.metadata.get('schema')!r}; this placer reads schema {SCHEMA}")
    sha256 = file.metadata.get("sha256", "")
    if not re.fullmatch(r"[0-9a-f]{64}", sha256):
        raise InputFileError(f"{path}: header field sha256 is damaged; {MEND}")
    fields = _fields(path, file)
    try:
        trace = RoutingTrace(**fields, known_sha256=sha256, checked=verify == "none")
    except UsageError as error:
        raise InputFileError(f"{path}: {error}") from error
    if verify == "hash" and content_hash(trace.model, trace.tags, array_digests(trace)) != sha256:
        raise InputFileError(f"{path}: the content does not match its hash {sha256[:12]}...; {MEND}")
    return trace


def _fields(path: Path, file: TensorFile) -> dict[str, Any]:
    known = (*CUBES, "request_id_T", *COLUMN_DTYPES)
    for name in ("expert_LTK", "request_id_T"):
        if name not in file.arrays:
            raise InputFileError(f"{path}: array {name} is missing; {MEND}")
    for name in file.arrays:
        if name not in known and not name.startswith("tag_"):
            raise InputFileError(f"{path}: array {name!r} is unknown to schema {SCHEMA}; remove it or update placer")
    fields: dict[str, Any] = {name: file.arrays[name] for name in known if name in file.arrays}
    names = _json(path, file.metadata, "tags", {})
    notes = _json(path, file.metadata, "notes", [])
    if not isinstance(notes, list) or not all(isinstance(note, str) for note in notes):
        raise InputFileError(f"{path}: header field notes is not a list of texts; {MEND}")
    if not isinstance(names, dict):
        raise InputFileError(f"{path}: header field tags is not a table; {MEND}")
    tags = {}
    for name in file.arrays:
        if not name.startswith("tag_"):
            continue
        texts = names.get(name[4:])
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InputFileError(f"{path}: array {name} has no list of names in header field tags; {MEND}")
        try:
            tags[name[4:]] = Tag(file.arrays[name], tuple(texts))
        except UsageError as error:
            raise InputFileError(f"{path}: {name}: {error}") from error
    fields["model"] = model_from_json(file.metadata.get("model", ""), where=f"{path}: header field model")
    return fields | {"tags": tags, "notes": tuple(notes), "provenance": file.metadata.get("provenance", "")}


def _json(path: Path, metadata: Mapping[str, str], name: str, default: Any) -> Any:
    try:
        return json.loads(metadata[name]) if name in metadata else default
    except (ValueError, RecursionError) as error:
        raise InputFileError(f"{path}: header field {name} is not JSON ({error}); {MEND}") from error


def _write(
    path: Path,
    model: ModelSpec,
    tags: Mapping[str, Tag],
    provenance: str,
    notes: tuple[str, ...],
    specs: Mapping[str, TensorSpec],
    pieces: Iterable[tuple[str, npt.NDArray[Any]]],
) -> None:
    digests = {name: hashlib.sha256() for name in specs}

    def hashed() -> Iterator[tuple[str, npt.NDArray[Any]]]:
        for name, piece in pieces:
            plain = np.ascontiguousarray(piece)
            digests[name].update(plain.reshape(-1).view(np.uint8).data)
            yield name, plain

    texts = {
        "format": FORMAT,
        "schema": SCHEMA,
        "sha256": "0" * 64,
        "model": json.dumps(model.to_dict(), sort_keys=True),
        "tags": json.dumps({name: list(tag.names) for name, tag in sorted(tags.items())}),
        "notes": json.dumps(list(notes)),
        "provenance": provenance,
    }

    def metadata() -> dict[str, str]:
        parts = {name: (spec.dtype.name, spec.shape, digests[name].hexdigest()) for name, spec in specs.items()}
        return {**texts, "sha256": content_hash(model, tags, parts)}

    write_tensor_file(path, specs, hashed(), metadata, texts)
