"""llama.cpp's importance matrix as load counts: `<tensor>.counts` says how often each expert's weights were used.

`llama-imatrix` counts every token routed to an expert at each of its matrices, so one matrix of a layer has the load.
Marginals only. The older .dat form added the experts up and cannot be used.
"""

import re
from pathlib import Path

import numpy as np

from placer.core.errors import InputFileError, MismatchError
from placer.core.model import ModelSpec
from traces.counts import LoadCounts
from traces.readers.gguf import looks_like_gguf, read_gguf
from traces.readers.logical_count import counts_from_rows
from traces.summarize import Progress

__all__ = ["read_imatrix"]

COUNTS = re.compile(r"blk\.(\d{1,3})\.ffn_(gate|up|down|gate_up)_exps\.weight\.counts")
MATRICES = ("gate", "up", "down", "gate_up")
EXACT_BELOW = 2**24
MOST_EXPERTS = 65535
MEND = "write it anew with `llama-imatrix --output-format gguf`"


def read_imatrix(path: Path, model: ModelSpec | None = None, progress: Progress | None = None) -> LoadCounts:
    """The load of every expert in an imatrix GGUF, one window.

    Raises InputFileError for anything else, the legacy .dat form and an imatrix of a dense model; MismatchError where
    the counts are not the model's.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            head = file.read(4)
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    if not looks_like_gguf(head):
        raise InputFileError(f"{path}: is no GGUF file; a legacy .dat imatrix has no counts for each expert, {MEND}")
    file_of = read_gguf(path)
    if (kind := file_of.values.get("general.type")) != "imatrix":
        raise InputFileError(f"{path}: is a GGUF file of type {str(kind)[:60]!r}; give one of type 'imatrix'")
    found: dict[int, dict[str, np.ndarray]] = {}
    for name, array in file_of.tensors.items():
        if match := COUNTS.fullmatch(name):
            found.setdefault(int(match[1]), {})[match[2]] = array.reshape(-1)
    if not found:
        raise InputFileError(f"{path}: has no counts of expert tensors (blk.N.ffn_gate_exps.weight.counts); {MEND}")
    notes = []
    row_of = {layer: next(by[name] for name in MATRICES if name in by) for layer, by in sorted(found.items())}
    experts = {len(row) for row in row_of.values()}
    if len(experts) != 1 or not 0 < min(experts) <= MOST_EXPERTS:
        raise InputFileError(f"{path}: layers count {min(experts)} to {max(experts)} experts; give counts of one model")
    unlike = [
        layer for layer, by in found.items() if any(not np.array_equal(row_of[layer], row) for row in by.values())
    ]
    if unlike:
        notes.append(f"matrices of an expert have different counts in layers {', '.join(map(str, sorted(unlike)))}")
    if max(float(row.max()) for row in row_of.values()) >= EXACT_BELOW:
        notes.append("counts of 2^24 and more are rounded, as the file keeps them in 32-bit floating point")
    layers = max(row_of) + 1
    if model is not None:
        if layers > model.num_hidden_layers:
            raise MismatchError(
                f"{path}: counts layer {layers - 1}; model {model.name!r} has {model.num_hidden_layers}"
            )
        layers = model.num_hidden_layers
    count_LE = np.zeros((layers, experts.pop()), dtype=np.float64)
    for layer, row in row_of.items():
        count_LE[layer] = row
    if progress is not None:
        progress(1, 1)
    texts = file_of.values.get("imatrix.datasets")
    read_from = f" of {', '.join(map(str, texts))[:200]}" if isinstance(texts, list) and texts else ""
    return counts_from_rows(
        count_LE, model, where=str(path), notes=tuple(notes), provenance=f"imatrix {path.name}{read_from}"
    )
