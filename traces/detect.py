"""Traps in recorded routing: what is not routing at all, found by its shape, and mended where only one reading is left.

Legend: L rows (layers), T tokens, K columns (top-k or more).

    code             what it is                                             mended by `repair`
    blank_layer      a layer without any id (dense, or never recorded)      layer dropped
    dense_layer      a dense layer recorded as expert 0                     layer dropped
    repeated_layer   a layer equal to the one before it                     layer dropped
    warmup_rows      a run of tokens with the same experts in all layers    tokens dropped (from 16 ids a token)
    zero_columns     last columns that are 0 in every row                   columns dropped
    zero_padding     rows filled up with 0: [5, 3, 0, 0]                    made unset
    unused_columns   last columns that are never set                        columns dropped
    physical_ids     ids that the model's logical experts do not have       no
    duplicate_ids    rows that name an expert twice                         no
Layers are dropped only where the rows do not already fit the model's sites.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from placer.core.model import ModelSpec
from traces.trace import RoutingTrace

__all__ = ["Finding", "Repaired", "detect", "repair"]

WARMUP_RUN = 16
"""Tokens in a row with equal experts everywhere. In 145,384 tokens of real text the longest run was one."""

WARMUP_IDS = 16
SURE_TOKENS = 32
CHUNK_TOKENS = 1 << 16
BLANK, ZERO, TAIL, DUPLICATE, LARGEST, SET_COLUMNS, NONZERO_COLUMNS = range(7)


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One trap: its code, a sentence, the absolute layers and the number of rows concerned, whether it was mended."""

    code: str
    message: str
    layers: tuple[int, ...] = ()
    rows: int = 0
    first_token: int = 0
    repaired: bool = False

    @property
    def note(self) -> str:
        """The line that goes into a trace's notes."""
        return f"{self.code}: {self.message}{' (repaired)' if self.repaired else ''}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Repaired:
    """What is left: arrays, `rows` kept of L, `tokens` kept of T (a slice of all, or positions), and the findings."""

    expert_LTK: npt.NDArray[Any]
    weight_LTK: npt.NDArray[np.float16] | None
    rows: tuple[int, ...]
    tokens: Any
    findings: tuple[Finding, ...]


def detect(
    trace: RoutingTrace | npt.NDArray[Any],
    *,
    model: ModelSpec | None = None,
    layer_ids: tuple[int, ...] | None = None,
) -> tuple[Finding, ...]:
    """The traps in a trace or in expert_LTK (uint8 or uint16, largest value unset); changes nothing.

    Takes one or two passes over the ids; memory stays bounded for a memory-mapped trace.
    """
    weight_LTK = None
    if isinstance(trace, RoutingTrace):
        model, expert_LTK, weight_LTK = trace.model, trace.expert_LTK, trace.weight_LTK
    else:
        expert_LTK = trace
    ids = layer_ids or (model.moe_layers if model is not None else tuple(range(len(expert_LTK))))
    rows, found, width, stats_LS = _survey(expert_LTK, weight_LTK, ids, mend=False)
    _, warmup = _warmup(expert_LTK, rows, mend=False)
    return (*found, *_padding(stats_LS, rows, ids, weight_LTK is not None, False), *warmup,
            *_width(stats_LS, rows, width, mend=False), *_wrong_ids(stats_LS, rows, ids, model))  # fmt: skip


def repair(
    expert_LTK: npt.NDArray[Any],
    weight_LTK: npt.NDArray[np.float16] | None,
    *,
    layer_ids: tuple[int, ...],
    keep_layers: bool = False,
) -> Repaired:
    """Finds and mends; `keep_layers` says that the rows are the model's sites, so that none is dropped.

    The arrays are written to where entries become unset, and copied where layers, tokens or columns go.
    """
    rows, found, width, stats_LS = _survey(expert_LTK, weight_LTK, layer_ids, mend=not keep_layers)
    padding = _padding(stats_LS, rows, layer_ids, weight_LTK is not None, True)
    sentinel = int(np.iinfo(expert_LTK.dtype).max)
    for row in rows:
        for part in _parts(expert_LTK.shape[1]):
            if padding:
                _unset_tails(expert_LTK[row, part], _bits(weight_LTK, row, part), width, sentinel)
            if weight_LTK is not None:
                weight_LTK[row, part][expert_LTK[row, part] == sentinel] = 0
    if padding:
        stats_LS = _scan_layers(expert_LTK, weight_LTK, width)
    tokens, warmup = _warmup(expert_LTK, rows, mend=True)
    unused = _width(stats_LS, rows, width, mend=True)
    columns = max(1, int(stats_LS[list(rows), SET_COLUMNS].max(initial=1)))
    return Repaired(
        expert_LTK=_cut(expert_LTK, rows, tokens, columns),
        weight_LTK=None if weight_LTK is None else _cut(weight_LTK, rows, tokens, columns),
        rows=rows,
        tokens=tokens,
        findings=(*found, *padding, *warmup, *unused, *_wrong_ids(stats_LS, rows, layer_ids, None)),
    )


def _survey(
    expert_LTK: npt.NDArray[Any], weight_LTK: npt.NDArray[np.float16] | None, ids: tuple[int, ...], *, mend: bool
) -> tuple[tuple[int, ...], tuple[Finding, ...], int, npt.NDArray[np.int64]]:
    """The rows that hold routing, what the others are, the columns that are not always 0, and the counts."""
    layers, tokens, top_k = expert_LTK.shape
    stats_LS = _scan_layers(expert_LTK, weight_LTK, top_k)
    blank = [row for row in range(layers) if stats_LS[row, BLANK] == tokens]
    # one 0 a token may be routing where a layer is short, two cannot be
    sure_L = (stats_LS[:, SET_COLUMNS] > 1) | (tokens >= SURE_TOKENS)
    dense = [row for row in range(layers) if stats_LS[row, ZERO] == tokens and sure_L[row]]
    routed = [row for row in range(layers) if row not in blank and row not in dense]
    repeated = [row for before, row in pairwise(routed) if _equal(expert_LTK, before, row)]
    sure = mend and tokens >= SURE_TOKENS
    found = [
        *_layer_finding("blank_layer", "no expert was ever recorded in layers", ids, blank, mend),
        *_layer_finding("dense_layer", "dense layers are recorded as expert 0: layers", ids, dense, mend),
        *_layer_finding("repeated_layer", "equal in every token to the layer before: layers", ids, repeated, sure),
    ]
    dropped = {*blank, *dense, *(repeated if sure else ())} if mend else set()
    rows = tuple(row for row in range(layers) if row not in dropped)
    width = top_k
    live = [row for row in routed if row in rows]
    if top_k > 1 and live and tokens >= SURE_TOKENS:
        width = max(1, int(stats_LS[live, NONZERO_COLUMNS].max()))
    if width < top_k:
        message = f"the last {top_k - width} of {top_k} columns are 0 in every row"
        found.append(Finding(code="zero_columns", message=message, rows=len(live) * tokens, repaired=mend))
        stats_LS = _scan_layers(expert_LTK, weight_LTK, width)
    return rows, tuple(found), width, stats_LS


def _layer_finding(code: str, text: str, ids: tuple[int, ...], rows: list[int], mend: bool) -> list[Finding]:
    layers = tuple(ids[row] for row in rows)
    message = f"{text} {', '.join(map(str, layers))}"
    return [Finding(code=code, message=message, layers=layers, repaired=mend)] if rows else []


def _padding(
    stats_LS: npt.NDArray[np.int64], rows: tuple[int, ...], ids: tuple[int, ...], weighted: bool, mend: bool
) -> tuple[Finding, ...]:
    padded = [row for row in rows if stats_LS[row, TAIL]]
    count = int(stats_LS[padded, TAIL].sum())
    if not count:
        return ()
    why = "with weight 0" if weighted else "twice or more; a single last 0 is kept as expert 0"
    message = f"{count} rows are filled up with expert 0 {why}"
    layers = tuple(ids[row] for row in padded)
    return (Finding(code="zero_padding", message=message, layers=layers, rows=count, repaired=mend),)


def _warmup(expert_LTK: npt.NDArray[Any], rows: tuple[int, ...], *, mend: bool) -> tuple[Any, tuple[Finding, ...]]:
    """The tokens to keep, and runs of tokens that chose the same experts everywhere."""
    tokens = expert_LTK.shape[1]
    if not rows or tokens < WARMUP_RUN:
        return slice(None), ()
    same = np.arange(1, tokens)
    sentinel = np.iinfo(expert_LTK.dtype).max
    for row in rows:
        kept = []
        for part in _parts(len(same)):
            after = same[part]
            later_TK = expert_LTK[row, after]
            kept.append(after[(later_TK == expert_LTK[row, after - 1]).all(axis=1)])
        same = np.concatenate(kept) if kept else same
        if len(same) < WARMUP_RUN - 1:
            return slice(None), ()
    blank = np.ones(len(same), dtype=bool)
    for row in rows:
        blank &= (expert_LTK[row, same] == sentinel).all(axis=1)
    same = same[~blank]
    starts = np.flatnonzero(np.diff(same, prepend=-1) != 1)
    lengths = np.diff(starts, append=len(same)) + 1
    long = lengths >= WARMUP_RUN
    if not long.any():
        return slice(None), ()
    mask = np.ones(tokens, dtype=bool)
    first = same[starts[long]] - 1
    for start, length in zip(first.tolist(), lengths[long].tolist(), strict=True):
        mask[start : start + length] = False
    dropped = int((~mask).sum())
    sure = mend and len(rows) * expert_LTK.shape[2] >= WARMUP_IDS and dropped < tokens
    message = f"{dropped} tokens from token {first[0]} on repeat the same experts in every layer, as dummy batches do"
    finding = Finding(code="warmup_rows", message=message, rows=dropped, first_token=int(first[0]), repaired=sure)
    return np.flatnonzero(mask) if sure else slice(None), (finding,)


def _width(stats_LS: npt.NDArray[np.int64], rows: tuple[int, ...], width: int, *, mend: bool) -> tuple[Finding, ...]:
    columns = int(stats_LS[list(rows), SET_COLUMNS].max(initial=0))
    if columns == width or not columns:
        return ()
    message = f"the last {width - columns} of {width} columns are never set"
    return (Finding(code="unused_columns", message=message, repaired=mend),)


def _wrong_ids(
    stats_LS: npt.NDArray[np.int64], rows: tuple[int, ...], ids: tuple[int, ...], model: ModelSpec | None
) -> tuple[Finding, ...]:
    found = []
    twice = [row for row in rows if stats_LS[row, DUPLICATE]]
    if twice:
        count = int(stats_LS[twice, DUPLICATE].sum())
        layers = tuple(ids[row] for row in twice)
        message = f"{count} rows name an expert more than once"
        found.append(Finding(code="duplicate_ids", message=message, layers=layers, rows=count))
    if model is not None and model.num_sites == len(stats_LS):
        limits = [site.num_experts + site.num_null_experts for site in model.sites]
        beyond = [row for row in rows if stats_LS[row, LARGEST] >= limits[row]]
        if beyond:
            message = (
                f"ids up to {int(stats_LS[beyond, LARGEST].max())} where the model has {limits[beyond[0]]} experts: "
                "physical ids, or another model"
            )
            found.append(Finding(code="physical_ids", message=message, layers=tuple(ids[row] for row in beyond)))
    return tuple(found)


def _cut(cube: npt.NDArray[Any], rows: tuple[int, ...], tokens: Any, columns: int) -> npt.NDArray[Any]:
    layers: Any = slice(None) if len(rows) == len(cube) else list(rows)
    cube = cube[layers][:, :, :columns]
    return np.ascontiguousarray(cube if isinstance(tokens, slice) else cube[:, tokens])


def _parts(tokens: int) -> list[slice]:
    return [slice(start, min(start + CHUNK_TOKENS, tokens)) for start in range(0, tokens, CHUNK_TOKENS)]


def _equal(expert_LTK: npt.NDArray[Any], one: int, other: int) -> bool:
    return all(np.array_equal(expert_LTK[one, part], expert_LTK[other, part]) for part in _parts(expert_LTK.shape[1]))


def _bits(weight_LTK: npt.NDArray[np.float16] | None, row: int, part: slice) -> npt.NDArray[np.uint16]:
    # numba has no float16; a weight is zero when all its bits but the sign are
    return np.empty((0, 0), np.uint16) if weight_LTK is None else weight_LTK[row, part].view(np.uint16)


def _scan_layers(
    expert_LTK: npt.NDArray[Any], weight_LTK: npt.NDArray[np.float16] | None, width: int
) -> npt.NDArray[np.int64]:
    stats_LS = np.zeros((len(expert_LTK), 7), dtype=np.int64)
    sentinel = int(np.iinfo(expert_LTK.dtype).max)
    for row in range(len(expert_LTK)):
        for part in _parts(expert_LTK.shape[1]):
            _scan(expert_LTK[row, part], _bits(weight_LTK, row, part), width, sentinel, stats_LS[row])
    return stats_LS


@njit(cache=True, nogil=True)
def _tail(expert_K: npt.NDArray[np.uint8], bits_TK: npt.NDArray[np.uint16], token: int, width: int) -> int:
    """How many last entries of a row are padding by 0: by their weight, or by there being at least two."""
    tail = 0
    weighted = False
    if bits_TK.shape[0] > 0:
        for column in range(width):
            weighted |= bits_TK[token, column] & 0x7FFF != 0
    while tail < width:
        column = width - 1 - tail
        if expert_K[column] != 0 or (weighted and bits_TK[token, column] & 0x7FFF):
            break
        tail += 1
    return tail if tail >= 2 or (weighted and tail == 1 and width > 1) else 0


@njit(cache=True, nogil=True)
def _scan(
    expert_TK: npt.NDArray[np.uint8],
    bits_TK: npt.NDArray[np.uint16],
    width: int,
    sentinel: int,
    stats: npt.NDArray[np.int64],
) -> None:
    for token in range(expert_TK.shape[0]):
        row = expert_TK[token]
        last_set, last_nonzero, others = 0, 0, 0
        for k in range(width):
            expert = row[k]
            if expert != sentinel:
                last_set = k + 1
                others += expert != 0
                stats[LARGEST] = max(stats[LARGEST], expert)
            if expert != 0:
                last_nonzero = k + 1
        stats[BLANK] += last_set == 0
        stats[ZERO] += last_set > 0 and others == 0
        stats[SET_COLUMNS] = max(stats[SET_COLUMNS], last_set)
        stats[NONZERO_COLUMNS] = max(stats[NONZERO_COLUMNS], last_nonzero)
        tail = _tail(row, bits_TK, token, width)
        stats[TAIL] += tail > 0
        twice = False
        for k in range(1, width - tail):
            for earlier in range(k):
                if row[k] == row[earlier] and row[k] != sentinel:
                    twice = True
        stats[DUPLICATE] += twice


@njit(cache=True, nogil=True)
def _unset_tails(expert_TK: npt.NDArray[np.uint8], bits_TK: npt.NDArray[np.uint16], width: int, sentinel: int) -> None:
    for token in range(expert_TK.shape[0]):
        tail = _tail(expert_TK[token], bits_TK, token, width)
        for k in range(width - tail, width):
            expert_TK[token, k] = sentinel
