"""The profile store: one safetensors file per Profile, the expert sets of all layers end to end.

Legend: L routing sites, E experts, K top-k, W windows, F folds, S source ranks, H expert sets of all layers.
Schema 1: arrays named as in Profile, and set_expert_HK, set_weight_H, set_stop_L (where each layer's sets end),
set_coverage_L; the header's texts are format, schema, model (JSON), trace_sha256, num_tokens, num_requests,
window_tokens.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import InputFileError, UsageError
from placer.core.profile import ExpertSets, Profile
from traces.model_json import model_from_json
from traces.tensorfile import TensorFile, TensorSpec, read_tensor_file, write_tensor_file

__all__ = ["PROFILE_FORMAT", "load_profile", "save_profile"]

PROFILE_FORMAT = "placer-profile"
SCHEMA = "1"
MEND = "write it anew with `placer profile`"
AXES = {"load_WLE": 3, "load_FLE": 3, "coactivation_LEE": 3, "transition_LEE": 3, "load_SLE": 3}
SET_DTYPES = {
    "set_expert_HK": np.dtype(np.int16),
    "set_weight_H": np.dtype(np.int64),
    "set_stop_L": np.dtype(np.int64),
    "set_coverage_L": np.dtype(np.float64),
}


def save_profile(profile: Profile, path: Path) -> None:
    """Writes `profile` to `path`, whole or not at all. Raises InputFileError."""
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.asarray(getattr(profile, name), dtype=np.int64) for name in AXES if getattr(profile, name) is not None
    }
    if profile.sets:
        width = max(sets.expert_HK.shape[1] for sets in profile.sets)
        arrays["set_expert_HK"] = np.concatenate([_widen(sets.expert_HK, width) for sets in profile.sets])
        arrays["set_weight_H"] = np.concatenate([sets.weight_H for sets in profile.sets])
        arrays["set_stop_L"] = np.cumsum([len(sets.weight_H) for sets in profile.sets], dtype=np.int64)
        arrays["set_coverage_L"] = np.array([sets.coverage for sets in profile.sets], dtype=np.float64)
    specs = {name: TensorSpec(array.dtype, array.shape) for name, array in arrays.items()}
    texts = {
        "format": PROFILE_FORMAT,
        "schema": SCHEMA,
        "model": json.dumps(profile.model.to_dict(), sort_keys=True),
        "trace_sha256": profile.trace_sha256,
        "num_tokens": str(profile.num_tokens),
        "num_requests": str(profile.num_requests),
        "window_tokens": str(profile.window_tokens),
    }
    write_tensor_file(Path(path), specs, arrays.items(), lambda: texts, texts)


def load_profile(path: Path) -> Profile:
    """The profile in `path`. Raises InputFileError naming the file, the field and the mend."""
    path = Path(path)
    file = read_tensor_file(path)
    if file.metadata.get("format") != PROFILE_FORMAT:
        raise InputFileError(f"{path}: is not a placer profile (format {file.metadata.get('format')!r}); {MEND}")
    if file.metadata.get("schema") != SCHEMA:
        raise InputFileError(f"{path}: profile schema {file.metadata.get('schema')!r}; this placer reads {SCHEMA}")
    for name in file.arrays:
        if name not in AXES and name not in SET_DTYPES:
            raise InputFileError(f"{path}: array {name!r} is unknown to schema {SCHEMA}; remove it or update placer")
    model = model_from_json(file.metadata.get("model", ""), where=f"{path}: header field model")
    layers, experts = model.num_sites, model.num_experts
    counts = {}
    for name, axes in AXES.items():
        array = file.arrays.get(name)
        if array is None:
            if name in ("load_WLE", "load_FLE"):
                raise InputFileError(f"{path}: array {name} is missing; {MEND}")
            continue
        if array.dtype != np.int64 or array.ndim != axes:
            raise InputFileError(f"{path}: {name} is {array.dtype} {array.shape}, not int64 with {axes} axes; {MEND}")
        if array.size and int(array.min()) < 0:
            raise InputFileError(f"{path}: {name} has the count {int(array.min())}; {MEND}")
        counts[name] = array
    shapes = {"transition_LEE": (layers - 1, experts, experts), "load_SLE": (None, layers, experts)}
    for name, shape in shapes.items():
        if name in counts and any(
            want not in (None, have) for want, have in zip(shape, counts[name].shape, strict=True)
        ):
            raise InputFileError(f"{path}: {name} is {counts[name].shape}, the model needs {shape}; {MEND}")
    try:
        return Profile(
            model=model,
            trace_sha256=file.metadata.get("trace_sha256", ""),
            num_tokens=_number(path, file, "num_tokens"),
            num_requests=_number(path, file, "num_requests"),
            window_tokens=_number(path, file, "window_tokens"),
            sets=_sets(path, file, layers, experts),
            **counts,
        )
    except UsageError as error:
        raise InputFileError(f"{path}: {error}; {MEND}") from error


def _sets(path: Path, file: TensorFile, layers: int, experts: int) -> tuple[ExpertSets, ...]:
    present = [name for name in SET_DTYPES if name in file.arrays]
    if not present:
        return ()
    for name, dtype in SET_DTYPES.items():
        array = file.arrays.get(name)
        if array is None or array.dtype != dtype or array.ndim != (2 if name.endswith("HK") else 1):
            found = "missing" if array is None else f"{array.dtype} {array.shape}"
            raise InputFileError(f"{path}: {name} is {found}, it must be {dtype}; {MEND}")
    expert_HK, weight_H, stop_L, coverage_L = (file.arrays[name] for name in SET_DTYPES)
    start_L = np.concatenate([[0], stop_L])
    if len(stop_L) != layers or len(coverage_L) != layers or (np.diff(start_L) < 0).any():
        raise InputFileError(f"{path}: set_stop_L does not name the end of each of {layers} layers; {MEND}")
    if start_L[-1] != len(expert_HK) or len(weight_H) != len(expert_HK):
        raise InputFileError(f"{path}: {len(expert_HK)} sets, {len(weight_H)} weights, {start_L[-1]} expected; {MEND}")
    if expert_HK.size and not (int(expert_HK.min()) >= -1 and int(expert_HK.max()) < experts):
        raise InputFileError(
            f"{path}: set_expert_HK has expert {int(expert_HK.max())}; the model has {experts}; {MEND}"
        )
    if weight_H.size and int(weight_H.min()) < 0:
        raise InputFileError(f"{path}: set_weight_H has {int(weight_H.min())}; {MEND}")
    if not ((coverage_L >= 0) & (coverage_L <= 1)).all():
        raise InputFileError(f"{path}: set_coverage_L is not between 0 and 1; {MEND}")
    return tuple(
        ExpertSets(expert_HK[start:stop], weight_H[start:stop], float(coverage))
        for start, stop, coverage in zip(start_L[:-1], stop_L, coverage_L, strict=True)
    )


def _number(path: Path, file: TensorFile, name: str) -> int:
    text = file.metadata.get(name, "")
    if not (text.isascii() and text.isdigit() and len(text) < 19):
        raise InputFileError(f"{path}: header field {name} is {text!r}, not a number; {MEND}")
    return int(text)


def _widen(expert_HK: npt.NDArray[np.int16], width: int) -> npt.NDArray[np.int16]:
    return np.pad(expert_HK, ((0, 0), (0, width - expert_HK.shape[1])), constant_values=-1)
