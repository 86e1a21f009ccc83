"""What every token reader hands over, and how it becomes a RoutingTrace: repaired, given a model, checked.

Legend: L rows of the file (layers), T tokens, K columns (top-k or more).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import InputFileError, MismatchError, UsageError
from placer.core.model import ModelSpec, Site
from traces.detect import repair
from traces.ids import convert_ids, id_dtype
from traces.trace import COLUMN_DTYPES, RoutingTrace, Tag

__all__ = ["RawTrace", "as_ids", "as_requests", "as_tag", "as_weights", "column", "finish", "infer_model"]

DEFAULT_SIZES = "hidden size 4096 and expert size 2048 are assumed"


@dataclass(frozen=True, slots=True, kw_only=True)
class RawTrace:
    """Arrays as a file has them.

    `layer_ids` are the absolute layers of the rows and `num_experts` a least number of experts, where the format says.
    """

    where: str
    expert_LTK: npt.NDArray[Any]
    request_id_T: npt.NDArray[np.int32]
    weight_LTK: npt.NDArray[np.float16] | None = None
    layer_ids: tuple[int, ...] | None = None
    num_experts: int = 0
    columns: Mapping[str, npt.NDArray[Any]] = field(default_factory=dict)
    tags: Mapping[str, Tag] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    provenance: str = ""


def finish(raw: RawTrace, model: ModelSpec | None) -> RoutingTrace:
    """The trace in `raw`, with the repairs of `traces.detect` and a note for each finding.

    Without a model the number of experts is taken from the largest id. Raises MismatchError where the rows do not
    belong to the model's layers, InputFileError where an id or weight is impossible.
    """
    if not raw.expert_LTK.size:
        raise InputFileError(f"{raw.where}: holds no tokens; record some requests first")
    layer_ids = raw.layer_ids or tuple(range(len(raw.expert_LTK)))
    expert_LTK, weight_LTK, notes = raw.expert_LTK, raw.weight_LTK, raw.notes
    every_layer = model is not None and (raw.layer_ids is not None or len(layer_ids) == model.num_hidden_layers)
    if model is not None and every_layer and len(layer_ids) > model.num_sites and {*model.moe_layers} <= {*layer_ids}:
        picked = [layer_ids.index(layer) for layer in model.moe_layers]
        notes = (*notes, f"{len(layer_ids) - len(picked)} rows of layers without experts left out")
        expert_LTK = expert_LTK[picked]
        weight_LTK = None if weight_LTK is None else weight_LTK[picked]
        layer_ids = model.moe_layers
    fits = model is not None and len(layer_ids) == model.num_sites
    if model is not None and fits and raw.layer_ids is not None and layer_ids != model.moe_layers:
        raise MismatchError(
            f"{raw.where}: holds layers {str(layer_ids)[:60]}, model {model.name!r} has experts in "
            f"{str(model.moe_layers)[:60]}; give the model that was recorded"
        )
    mended = repair(expert_LTK, weight_LTK, layer_ids=layer_ids, keep_layers=fits)
    notes = (*notes, *(finding.note for finding in mended.findings))
    layer_ids = tuple(layer_ids[row] for row in mended.rows)
    if not mended.expert_LTK.size or _largest(mended.expert_LTK) < 0:
        raise InputFileError(f"{raw.where}: no layer holds routing ({'; '.join(notes)}); record a model with experts")
    if model is None:
        model, note = infer_model(mended.expert_LTK, layer_ids, raw.num_experts)
        notes = (*notes, note)
    elif len(layer_ids) != model.num_sites:
        raise MismatchError(
            f"{raw.where}: has {len(layer_ids)} MoE layers, model {model.name!r} has {model.num_sites}; "
            "give the model that was recorded"
        )
    try:
        largest = id_dtype(model.num_ids)
        ids = mended.expert_LTK
        # ids too large for the model's own type must be seen by the trace's check, not wrapped
        ids = ids if _largest(ids) >= np.iinfo(largest).max else convert_ids(ids, largest)
        return RoutingTrace(
            model=model,
            expert_LTK=ids,
            weight_LTK=mended.weight_LTK,
            request_id_T=raw.request_id_T[mended.tokens],
            tags={name: Tag(tag.codes_T[mended.tokens], tag.names) for name, tag in raw.tags.items()},
            provenance=raw.provenance,
            notes=notes,
            **{name: column[mended.tokens] for name, column in raw.columns.items()},
        )
    except UsageError as error:
        raise InputFileError(f"{raw.where}: {error}") from error


def infer_model(
    expert_LTK: npt.NDArray[Any], layer_ids: tuple[int, ...], least_experts: int = 0
) -> tuple[ModelSpec, str]:
    """The smallest model that these ids may come from, and the note that says what was guessed."""
    experts = max(_largest(expert_LTK) + 1, least_experts)
    top_k = expert_LTK.shape[2]
    model = ModelSpec(
        name="unknown",
        num_hidden_layers=max(layer_ids) + 1,
        sites=tuple(Site(layer=layer, num_experts=experts) for layer in layer_ids),
        top_k=top_k,
        hidden_size=4096,
        moe_intermediate_size=2048,
    )
    note = (
        f"model: expert ids up to {_largest(expert_LTK)} -> {experts} experts, {len(layer_ids)} layers, top-{top_k}, "
        f"{DEFAULT_SIZES}; give --model to be sure"
    )
    return model, note


def as_ids(values: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """`values` as uint8 or uint16 with the sentinel where they are unset: -1, or an unsigned type's largest value.

    uint8 and uint16 come back as they are; wider and signed types become uint16. Raises InputFileError.
    """
    if values.dtype.kind not in "ui":
        raise InputFileError(f"{where}: expert ids are {values.dtype}; give integers")
    if values.dtype in (np.uint8, np.uint16):
        return values
    unset = values == (-1 if values.dtype.kind == "i" else np.iinfo(values.dtype).max)
    bad = ~unset & ((values < 0) | (values > 65534))
    if bad.any():
        raise InputFileError(f"{where}: expert id {values[bad][0]}; give ids from 0 to 65534, -1 where unset")
    ids = values.astype(np.uint16)
    ids[unset] = 65535
    return ids


def as_weights(values: npt.NDArray[Any], where: str) -> npt.NDArray[np.float16]:
    """`values` as float16. Raises InputFileError for other kinds; NaN and overflow are found by the trace's check."""
    if values.dtype.kind not in "fui":
        raise InputFileError(f"{where}: weights are {values.dtype}; give floating-point numbers")
    with np.errstate(over="ignore"):
        return values.astype(np.float16)


def as_requests(values: npt.NDArray[Any], where: str) -> npt.NDArray[np.int32]:
    """Request ids as int32: numbers as they are where they fit, else (texts, hashes) numbered by first appearance."""
    if values.ndim != 1 or values.dtype.kind not in "uiUS":
        raise InputFileError(
            f"{where}: request ids are {values.dtype} {values.shape}; give integers or texts (tokens,)"
        )
    if values.dtype.kind in "ui" and (not values.size or (values.min() >= 0 and values.max() < 2**31)):
        return values.astype(np.int32)
    _, first, index_T = np.unique(values, return_index=True, return_inverse=True)
    order = np.empty(len(first), dtype=np.int32)
    order[np.argsort(first)] = np.arange(len(first), dtype=np.int32)
    return order[index_T]


def as_tag(values: npt.NDArray[Any], names: npt.NDArray[Any] | None, where: str) -> Tag:
    """A tag from codes and names, or from the labels themselves. Raises InputFileError."""
    if values.ndim != 1 or values.dtype.kind not in "uiUSb":
        raise InputFileError(f"{where}: is {values.dtype} {values.shape}; give codes or texts (tokens,)")
    if names is None:
        labels, codes = np.unique(values, return_inverse=True)
        texts = tuple(_text(label) for label in labels.tolist())
    else:
        texts, codes = tuple(_text(name) for name in names.reshape(-1).tolist()), values
        if values.dtype.kind not in "ui":
            raise InputFileError(f"{where}: is {values.dtype} but has a list of names; give integer codes")
        if values.size and not (int(values.min()) >= 0 and int(values.max()) < len(texts)):
            raise InputFileError(
                f"{where}: has code {int(values.max())} and {len(texts)} names; give a name for each code"
            )
    if len(texts) > 65535:
        raise InputFileError(f"{where}: has {len(texts)} different labels; a tag holds at most 65535")
    small = np.dtype(np.uint8) if len(texts) <= 256 else np.dtype(np.uint16)
    return Tag(codes.astype(small), texts)


def column(name: str, values: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """The optional column `name` in its type. Raises InputFileError where a value does not fit it."""
    dtype = COLUMN_DTYPES[name]
    if values.ndim != 1 or values.dtype.kind not in "uib":
        raise InputFileError(f"{where}: is {values.dtype} {values.shape}; give integers (tokens,)")
    limits = np.iinfo(dtype)
    if values.size and not (limits.min <= int(values.min()) and int(values.max()) <= limits.max):
        raise InputFileError(f"{where}: values {values.min()}..{values.max()} do not fit {dtype}")
    return values.astype(dtype)


def _largest(ids: npt.NDArray[Any]) -> int:
    """The largest id that is set, or 0."""
    # adding one wraps the sentinel to 0
    return max((int((layer + layer.dtype.type(1)).max(initial=0)) for layer in ids), default=0) - 1


def _text(label: Any) -> str:
    return label.decode("utf-8", "replace") if isinstance(label, bytes) else str(label)
