"""Readers of recorded routing, one file per source, and `read_any`, which recognises the source itself."""

import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from placer.core.errors import InputFileError, MismatchError, UsageError
from placer.core.model import ModelSpec
from traces.counts import LoadCounts, load_counts_profile
from traces.ids import convert_ids, id_dtype
from traces.readers.gguf import looks_like_gguf
from traces.readers.imatrix import read_imatrix
from traces.readers.jsonl import read_jsonl
from traces.readers.ktransformers import read_ktransformers
from traces.readers.logical_count import read_logical_count
from traces.readers.npz import read_npz
from traces.readers.routed_experts import read_routed_experts
from traces.readers.sglang import read_sglang
from traces.readers.text import first_line
from traces.store import load_trace
from traces.summarize import Progress
from traces.tensorfile import looks_like_tensor_file
from traces.trace import RoutingTrace

__all__ = ["READERS", "load_counts_profile", "read_any", "read_placer"]

Reader = Callable[[Path, ModelSpec | None, Progress | None], RoutingTrace | LoadCounts]

PEEK_BYTES = 1 << 16
JSON_NAMES = {
    "jsonl": (b"experts",),
    "logical_count": (b"logical_count",),
    "routed_experts": (b"routed_experts", b"meta_info", b"sglext", b"choices"),
}
"""Field names by which a JSON source is known, asked in this order."""


def read_any(
    path: Path, source: str | None = None, model: ModelSpec | None = None, progress: Progress | None = None
) -> RoutingTrace | LoadCounts:
    """What `path` holds, read as `source` (a key of READERS) or as what its content looks like.

    Raises UsageError for an unknown source, InputFileError for a file that no reader takes.
    """
    path = Path(path)
    if source is not None and source not in READERS:
        raise UsageError(f"source is {source!r}; use one of {', '.join(READERS)}")
    if not path.exists():
        raise InputFileError(f"{path}: does not exist; give a trace file or a recorder's output")
    return READERS[source or recognise(path)](path, model, progress)


def read_placer(path: Path, model: ModelSpec | None = None, progress: Progress | None = None) -> RoutingTrace:
    """The trace in placer's own store, memory-mapped; with `model`, as a trace of that model. Raises InputFileError."""
    trace = load_trace(path)
    if progress is not None:
        progress(1, 1)
    if model is None or model.sha256 == trace.model.sha256:
        return trace
    if model.num_sites != trace.model.num_sites:
        raise MismatchError(
            f"{path}: has {trace.model.num_sites} MoE layers, model {model.name!r} has {model.num_sites}; "
            "give the model that was recorded"
        )
    try:
        ids = convert_ids(trace.expert_LTK, max(trace.expert_LTK.dtype, id_dtype(model.num_ids)))
        return replace(trace, model=model, expert_LTK=ids, known_sha256="")
    except UsageError as error:
        raise InputFileError(f"{path}: {error}") from error


def recognise(path: Path) -> str:
    """The reader for `path`, by its first bytes. Raises InputFileError where nothing fits."""
    if path.is_dir():
        return "sglang"
    try:
        with path.open("rb") as file:
            head = file.read(PEEK_BYTES)
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    if head[:4] == b"PK\x03\x04":
        return _archive(path)
    if head[:6] == b"\x93NUMPY":
        return "routed_experts"
    if looks_like_tensor_file(head[:9]):
        return "placer"
    if looks_like_gguf(head):
        return "imatrix"
    text = head.lstrip()
    if text[:1] in (b"{", b"["):
        return _json(path, text)
    raise InputFileError(
        f"{path}: is none of placer trace, npz, JSON lines, SGLang dump, routed_experts, logical_count or imatrix; "
        "say what it is with --from"
    )


def _archive(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise InputFileError(f"{path}: is a damaged archive ({first_line(error)}); copy it again") from error
    return "sglang" if any(name.endswith("data.pkl") for name in names) else "npz"


def _json(path: Path, text: bytes) -> str:
    """Which JSON source the first stretch of a file belongs to, by the names in it."""
    for source, names in JSON_NAMES.items():
        if any(b'"%s"' % name in text for name in names):
            return source
    raise InputFileError(
        f"{path}: is JSON without any of the fields experts, logical_count, routed_experts; say what it is with --from"
    )


def _sglang(path: Path, model: ModelSpec | None = None, progress: Progress | None = None) -> RoutingTrace | LoadCounts:
    """SGLang's recorder dumps, or replies and counts in JSON that came from SGLang."""
    source = "sglang" if Path(path).suffix == ".pt" else recognise(Path(path))
    reader: Any = {"logical_count": read_logical_count, "routed_experts": read_routed_experts}.get(source, read_sglang)
    result: RoutingTrace | LoadCounts = reader(path, model, progress)
    return result


READERS: dict[str, Reader] = {
    "placer": read_placer,
    "npz": read_npz,
    "jsonl": read_jsonl,
    "sglang": _sglang,
    "vllm": read_routed_experts,
    "routed_experts": read_routed_experts,
    "logical_count": read_logical_count,
    "imatrix": read_imatrix,
    "ktransformers": read_ktransformers,
}
"""Reader of each source: (path, model or None, progress or None) -> RoutingTrace or LoadCounts."""
