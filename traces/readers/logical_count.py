"""Reads {"logical_count": ...}: load counts as SGLang's --init-expert-location takes them.

Legend: W windows (recorder steps), L rows (all layers of the model, dense ones as zero rows), E experts.
"""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import InputFileError, MismatchError
from placer.core.model import ModelSpec
from traces.counts import LoadCounts, model_of_counts
from traces.readers.text import load_json
from traces.summarize import Progress

__all__ = ["counts_from_rows", "read_logical_count"]


def read_logical_count(path: Path, model: ModelSpec | None = None, progress: Progress | None = None) -> LoadCounts:
    """The counts in a JSON file, (layers, experts) or (steps, layers, experts).

    Raises InputFileError or MismatchError.
    """
    path = Path(path)
    data = load_json(path)
    if not isinstance(data, dict) or "logical_count" not in data:
        raise InputFileError(f"{path}: has no field logical_count; give {{'logical_count': [[...]]}}")
    where = f"{path}: logical_count"
    try:
        counts = np.array(data["logical_count"])
    except (ValueError, TypeError, OverflowError) as error:
        raise InputFileError(f"{where}: rows of different lengths; give as many counts in every layer") from error
    if progress is not None:
        progress(1, 1)
    others = sorted(key for key in data if key != "logical_count")
    notes = (f"fields left out: {', '.join(map(str, others))}",) if others else ()
    return counts_from_rows(counts, model, where=where, notes=notes, provenance=f"logical_count {path.name}")


def counts_from_rows(
    counts: npt.NDArray[Any], model: ModelSpec | None, *, where: str, notes: tuple[str, ...], provenance: str
) -> LoadCounts:
    """LoadCounts of an array (L, E) or (W, L, E) with a row for every layer: unused steps and dense layers left out."""
    if counts.dtype.kind == "f" and np.isfinite(counts).all() and (counts == np.floor(counts)).all():
        counts = counts.astype(np.int64) if np.abs(counts).max(initial=0) < 2**53 else counts
    if counts.dtype.kind not in "iu" or counts.ndim not in (2, 3) or not counts.size:
        raise InputFileError(f"{where}: is {counts.dtype} {counts.shape}; give whole numbers (layers, experts)")
    if int(counts.min()) < 0 or int(counts.max()) >= 2**53:
        raise InputFileError(f"{where}: has {int(counts.min())}..{int(counts.max())}; counts are 0 or more")
    load_WLE = counts.astype(np.int64).reshape(-1, *counts.shape[-2:])
    used_W = np.asarray(load_WLE.any(axis=(1, 2)))
    if not used_W.any():
        raise InputFileError(f"{where}: every count is 0; record some requests first")
    if not used_W.all():
        notes = (*notes, f"{int((~used_W).sum())} of {len(used_W)} steps are empty and left out")
        load_WLE = load_WLE[used_W]
    layers, experts = load_WLE.shape[1:]
    blank = [layer for layer in range(layers) if not load_WLE[:, layer].any()]
    if model is None:
        kept = tuple(layer for layer in range(layers) if layer not in blank)
        model, note = model_of_counts(kept, layers, experts)
        notes = (*notes, note)
    elif layers == model.num_sites:
        kept = tuple(range(layers))
    elif layers == model.num_hidden_layers:
        kept = model.moe_layers
    else:
        raise MismatchError(
            f"{where}: has {layers} layers; model {model.name!r} has {model.num_hidden_layers} layers, "
            f"{model.num_sites} of them with experts"
        )
    if experts != model.num_experts:
        raise MismatchError(f"{where}: has {experts} experts, model {model.name!r} has {model.num_experts}")
    dropped = [layer for layer in range(layers) if layer not in kept]
    if dropped:
        notes = (*notes, f"dense_layer: zero rows left out: layers {', '.join(map(str, dropped))} (repaired)")
        if lost := [layer for layer in dropped if layer not in blank]:
            raise MismatchError(f"{where}: layer {lost[0]} has counts but model {model.name!r} has no experts there")
    empty = [layer for layer in kept if layer in blank]
    if empty:
        notes = (*notes, f"blank_layer: no counts in layers {', '.join(map(str, empty))}")
    return LoadCounts(model=model, load_WLE=load_WLE[:, list(kept)], notes=notes, provenance=provenance)
