"""Expert counts as KTransformers reads them: a .pt table with `logical_count`, (steps, layers, experts)."""

from pathlib import Path

import numpy as np

from placer.core.errors import InputFileError
from placer.core.model import ModelSpec
from traces.counts import LoadCounts
from traces.readers.logical_count import counts_from_rows
from traces.readers.torch_file import load_torch_file
from traces.summarize import Progress

__all__ = ["read_ktransformers"]


def read_ktransformers(path: Path, model: ModelSpec | None = None, progress: Progress | None = None) -> LoadCounts:
    """The counts, a window for each step. Raises DependencyError without torch, InputFileError, MismatchError."""
    path = Path(path)
    table = load_torch_file(path)
    counts = table.get("logical_count")
    if not isinstance(counts, np.ndarray):
        raise InputFileError(f"{path}: has no tensor logical_count; give counts (steps, layers, experts)")
    if progress is not None:
        progress(1, 1)
    where = f"{path}: logical_count"
    return counts_from_rows(counts, model, where=where, notes=(), provenance=f"ktransformers {path.name}")
