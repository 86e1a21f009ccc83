"""RoutingTrace: which experts every token was routed to, layer by layer.

Legend: L routing sites (usually one per MoE layer), T tokens, K top-k, E experts.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import MismatchError, UsageError
from placer.core.model import ModelSpec
from traces.ids import convert_ids, generator

__all__ = ["COLUMN_DTYPES", "RoutingTrace", "Tag", "array_digests", "concatenate", "content_hash"]

Index = slice | npt.NDArray[Any] | Sequence[int]

COLUMN_DTYPES: dict[str, np.dtype[Any]] = {
    "position_T": np.dtype(np.int32),
    "token_id_T": np.dtype(np.int32),
    "phase_T": np.dtype(np.uint8),
    "step_T": np.dtype(np.int32),
    "source_rank_T": np.dtype(np.int32),
    "arrival_ns_T": np.dtype(np.int64),
}
"""The optional columns over tokens and their types. `phase_T`: 0 prefill, 1 decode."""

CHUNK_IDS = 1 << 22


@dataclass(frozen=True, slots=True, eq=False)
class Tag:
    """A label per token: `codes_T` (uint8 or uint16) index `names`."""

    codes_T: npt.NDArray[np.uint8 | np.uint16]
    names: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.codes_T.ndim != 1 or self.codes_T.dtype not in (np.uint8, np.uint16):
            raise UsageError(
                f"tag.codes_T is {self.codes_T.dtype} {self.codes_T.shape}; give uint8 or uint16 (tokens,)"
            )
        if self.codes_T.size and int(self.codes_T.max()) >= len(self.names):
            raise UsageError(f"tag.codes_T has code {int(self.codes_T.max())}; there are {len(self.names)} names")
        object.__setattr__(self, "codes_T", _frozen(self.codes_T))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RoutingTrace:
    """Routing decisions of T tokens at L sites; every array is read-only, large ones may be memory-mapped.

    expert_LTK    uint8 or uint16 logical ids in the order the router gave them, the type's largest value where unset;
                  a row may hold fewer than K ids or none (a skipped layer). Ids from a site's num_experts on are null
                  experts: legal, counted as nothing.
    weight_LTK    float16 router weights or None        bits_LTK  uint8 bit-widths demanded or None
    request_id_T  int32, 0 or more; tokens of a request may be anywhere, in order
    tags          further labels per token (language, data set, ...)
    provenance    where the trace comes from            notes     what a reader noticed or repaired

    `checked=True` promises that ids and weights were already looked at; otherwise the constructor reads them all.
    Raises UsageError naming the field that does not fit.
    """

    model: ModelSpec
    expert_LTK: npt.NDArray[np.uint8 | np.uint16]
    request_id_T: npt.NDArray[np.int32]
    weight_LTK: npt.NDArray[np.float16] | None = None
    bits_LTK: npt.NDArray[np.uint8] | None = None
    position_T: npt.NDArray[np.int32] | None = None
    token_id_T: npt.NDArray[np.int32] | None = None
    phase_T: npt.NDArray[np.uint8] | None = None
    step_T: npt.NDArray[np.int32] | None = None
    source_rank_T: npt.NDArray[np.int32] | None = None
    arrival_ns_T: npt.NDArray[np.int64] | None = None
    tags: Mapping[str, Tag] = field(default_factory=dict)
    provenance: str = ""
    notes: tuple[str, ...] = ()
    known_sha256: InitVar[str] = ""
    checked: InitVar[bool] = False
    _sha256: str = field(init=False, default="", repr=False)

    def __post_init__(self, known_sha256: str, checked: bool) -> None:
        object.__setattr__(self, "_sha256", known_sha256)
        experts = self.expert_LTK
        if experts.dtype not in (np.uint8, np.uint16) or experts.ndim != 3 or experts.shape[2] < 1:
            raise UsageError(
                f"trace.expert_LTK is {experts.dtype} {experts.shape}; give uint8 or uint16 (layers, tokens, k)"
            )
        if experts.shape[0] != self.model.num_sites:
            raise UsageError(
                f"trace.expert_LTK has {experts.shape[0]} layers; model {self.model.name!r} has "
                f"{self.model.num_sites} routing sites, give one row per site"
            )
        if self.model.num_ids > self.sentinel:
            raise UsageError(
                f"trace.expert_LTK is {experts.dtype}, whose largest value marks unset entries, but the model has ids "
                f"up to {self.model.num_ids - 1}; use uint16"
            )
        for name, dtype in (("weight_LTK", np.dtype(np.float16)), ("bits_LTK", np.dtype(np.uint8))):
            array = getattr(self, name)
            if array is not None and (array.dtype != dtype or array.shape != experts.shape):
                raise UsageError(f"trace.{name} is {array.dtype} {array.shape}; give {dtype} {experts.shape}")
        tokens = (experts.shape[1],)
        for name, dtype in {"request_id_T": np.dtype(np.int32), **COLUMN_DTYPES}.items():
            array = getattr(self, name)
            if array is not None and (array.dtype != dtype or array.shape != tokens):
                raise UsageError(f"trace.{name} is {array.dtype} {array.shape}; give {dtype} {tokens}")
            if name in ("request_id_T", "source_rank_T") and array is not None and array.size and int(array.min()) < 0:
                raise UsageError(f"trace.{name} has {int(array.min())}; numbers count from 0")
        if self.phase_T is not None and self.phase_T.size and int(self.phase_T.max()) > 1:
            raise UsageError(f"trace.phase_T has {int(self.phase_T.max())}; 0 is prefill, 1 is decode")
        for name, tag in self.tags.items():
            if tag.codes_T.shape != tokens:
                raise UsageError(f"trace.tags[{name!r}] has {tag.codes_T.shape} codes; the trace has {tokens} tokens")
        object.__setattr__(self, "tags", dict(self.tags))
        for name in ("expert_LTK", "weight_LTK", "bits_LTK", "request_id_T", *COLUMN_DTYPES):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, _frozen(getattr(self, name)))
        if not checked:
            self.check()

    @property
    def sentinel(self) -> int:
        """The id that marks an unset entry: the largest value of the id type."""
        return int(np.iinfo(self.expert_LTK.dtype).max)

    @property
    def num_tokens(self) -> int:
        """T."""
        return int(self.expert_LTK.shape[1])

    @property
    def num_requests(self) -> int:
        """How many different request ids there are."""
        return len(np.unique(self.request_id_T))

    @property
    def sha256(self) -> str:
        """Hash of model, arrays and tags (not of provenance and notes); computed once, kept in the store's header."""
        if not self._sha256:
            object.__setattr__(self, "_sha256", content_hash(self.model, self.tags, array_digests(self)))
        return self._sha256

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Every array by its name in the store, in a fixed order; tags as `tag_<name>`."""
        names = ("expert_LTK", "weight_LTK", "bits_LTK", "request_id_T", *COLUMN_DTYPES)
        present = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        return present | {f"tag_{name}": tag.codes_T for name, tag in sorted(self.tags.items())}

    def check(self) -> None:
        """Raises UsageError at the first id that its site does not have and at weights that are not finite.

        Reads everything once, in chunks, so that memory stays bounded for a memory-mapped trace.
        """
        step = max(1, CHUNK_IDS // self.expert_LTK.shape[2])
        for row, site in enumerate(self.model.sites):
            limit = site.num_experts + site.num_null_experts
            for start in range(0, self.num_tokens, step):
                ids = self.expert_LTK[row, start : start + step]
                # adding one wraps the sentinel to 0, so that one maximum finds every id that is too large
                if int((ids + ids.dtype.type(1)).max()) > limit:
                    bad = (ids >= limit) & (ids != self.sentinel)
                    token, column = np.argwhere(bad)[0]
                    raise UsageError(
                        f"trace.expert_LTK row {row} (layer {site.layer}), token {start + token} has expert id "
                        f"{ids[token, column]}, the layer's end at {limit - 1}; give logical ids and the right model"
                    )
                if self.weight_LTK is None:
                    continue
                weights = self.weight_LTK[row, start : start + step]
                if not np.isfinite(weights).all():
                    token, column = np.argwhere(~np.isfinite(weights))[0]
                    raise UsageError(
                        f"trace.weight_LTK row {row}, token {start + token} is {weights[token, column]}; "
                        "give finite weights, 0 where an entry is unset"
                    )

    def select_tokens(self, index: Index) -> "RoutingTrace":
        """The trace of the tokens `index` names: a slice (no copy), a mask (T,) or positions."""
        if not isinstance(index, slice):
            index = np.asarray(index)
            if index.dtype == bool and index.shape != (self.num_tokens,):
                raise UsageError(f"mask has shape {index.shape}; the trace has {self.num_tokens} tokens")
            if index.dtype != bool:
                index = index.astype(np.int64)
                if index.size and not (int(index.min()) >= 0 and int(index.max()) < self.num_tokens):
                    raise UsageError(f"token index {int(index.max())} is outside 0..{self.num_tokens - 1}")
        fields: dict[str, Any] = {name: _take(getattr(self, name), index) for name in ("request_id_T", *COLUMN_DTYPES)}
        fields |= {name: _take_LTK(getattr(self, name), index) for name in ("expert_LTK", "weight_LTK", "bits_LTK")}
        tags = {name: Tag(tag.codes_T[index], tag.names) for name, tag in self.tags.items()}
        return replace(self, **fields, tags=tags, checked=True, known_sha256="")

    def select_layers(self, rows: Sequence[int]) -> "RoutingTrace":
        """The trace of the sites at `rows` (indices into model.sites), in that order."""
        sites = self.model.num_sites
        if not rows or not all(0 <= row < sites for row in rows):
            raise UsageError(f"layer rows {list(rows)} are not all within 0..{sites - 1}, or there are none")
        pick: Any = list(rows)
        if pick == list(range(pick[0], pick[-1] + 1)):
            pick = slice(pick[0], pick[-1] + 1)
        cubes: dict[str, Any] = {
            name: None if getattr(self, name) is None else getattr(self, name)[pick]
            for name in ("expert_LTK", "weight_LTK", "bits_LTK")
        }
        model = replace(self.model, sites=tuple(self.model.sites[row] for row in rows))
        return replace(self, **cubes, model=model, checked=True, known_sha256="")

    def split_by_request(self, fraction: float = 0.5, seed: int = 0) -> tuple["RoutingTrace", "RoutingTrace"]:
        """Two traces, of about `fraction` of the requests (drawn with `seed`) and of the others; token order is kept.

        Both have at least one request. Raises UsageError for fewer than two requests or a fraction outside (0, 1).
        """
        mask_T = self.request_mask(fraction, seed)
        return self.select_tokens(mask_T), self.select_tokens(~mask_T)

    def request_mask(self, fraction: float = 0.5, seed: int = 0) -> npt.NDArray[np.bool_]:
        """Which tokens belong to the first part of `split_by_request`, (T,) bool."""
        if not 0.0 < fraction < 1.0:
            raise UsageError(f"fraction is {fraction!r}; give the first part's share of the requests, between 0 and 1")
        ids, index_T = np.unique(self.request_id_T, return_inverse=True)
        if len(ids) < 2:
            raise UsageError(f"the trace has {len(ids)} request; a split by request needs at least 2")
        count = min(len(ids) - 1, max(1, round(fraction * len(ids))))
        first = np.zeros(len(ids), dtype=bool)
        first[generator(seed).permutation(len(ids))[:count]] = True
        return np.asarray(first[index_T])


def array_digests(trace: RoutingTrace) -> dict[str, tuple[str, tuple[int, ...], str]]:
    """(dtype, shape, SHA-256 of the little-endian bytes) of every array; parts of `content_hash`."""
    digests = {}
    for name, array in trace.arrays().items():
        digest = hashlib.sha256()
        for part in array if array.ndim == 3 else (array,):
            digest.update(np.ascontiguousarray(part).data)
        digests[name] = (array.dtype.name, array.shape, digest.hexdigest())
    return digests


def content_hash(
    model: ModelSpec, tags: Mapping[str, Tag], digests: Mapping[str, tuple[str, tuple[int, ...], str]]
) -> str:
    """SHA-256 over the model, the tags' names and the arrays' digests, so that a writer may hash while streaming."""
    names = {name: list(tag.names) for name, tag in tags.items()}
    content = {"model": model.to_dict(), "tags": names, "arrays": {k: list(v) for k, v in digests.items()}}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def concatenate(traces: Sequence[RoutingTrace], *, renumber: bool = True) -> RoutingTrace:
    """One trace of all tokens in order. Optional columns and tags survive where every trace has them.

    `renumber` makes equal request ids of different traces different requests; False keeps ids (parts of one trace).
    Raises UsageError for no trace, MismatchError for different models.
    """
    if not traces:
        raise UsageError("concatenate got no trace; give at least one")
    first = traces[0]
    for other in traces[1:]:
        if other.model.sha256 != first.model.sha256:
            raise MismatchError(
                f"traces of model {first.model.name!r} and of a different {other.model.name!r} cannot be joined; "
                "import both with the same --model"
            )
    dtype = max((trace.expert_LTK.dtype for trace in traces), key=lambda d: d.itemsize)
    top_k = max(trace.expert_LTK.shape[2] for trace in traces)
    notes = tuple(dict.fromkeys(note for trace in traces for note in trace.notes))
    fields: dict[str, Any] = {}
    for name in ("weight_LTK", "bits_LTK", *COLUMN_DTYPES):
        parts = [getattr(trace, name) for trace in traces]
        if all(part is None for part in parts):
            continue
        if any(part is None for part in parts):
            notes += (f"{name} dropped: not every joined trace has it",)
        elif name.endswith("_LTK"):
            fields[name] = np.concatenate([_widen(part, top_k, 0) for part in parts], axis=1)
        else:
            fields[name] = np.concatenate(parts)
    tags = {}
    for name in first.tags:
        if all(name in trace.tags for trace in traces):
            tags[name] = _join_tags([trace.tags[name] for trace in traces])
    ids, base = [], 0
    for trace in traces:
        # int64, so that a sum beyond int32 is seen and not wrapped
        ids.append(trace.request_id_T.astype(np.int64) + base)
        if renumber and trace.num_tokens:
            base = int(ids[-1].max()) + 1
    request_id_T = np.concatenate(ids)
    if request_id_T.size and int(request_id_T.max()) > np.iinfo(np.int32).max:
        raise UsageError("the joined traces' request ids do not fit 31 bits; renumber each trace's requests from 0")
    sentinel = int(np.iinfo(dtype).max)
    experts = [_widen(convert_ids(trace.expert_LTK, dtype), top_k, sentinel) for trace in traces]
    return RoutingTrace(
        model=first.model,
        expert_LTK=np.concatenate(experts, axis=1),
        request_id_T=request_id_T.astype(np.int32),
        tags=tags,
        provenance="; ".join(dict.fromkeys(trace.provenance for trace in traces if trace.provenance)),
        notes=notes,
        checked=True,
        **fields,
    )


def _frozen(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    # a slice of tokens is not contiguous as a whole, but each layer of it is, which is what the kernels need
    one = array[0] if array.ndim == 3 and len(array) else array
    plain = one.flags.c_contiguous and one.flags.aligned and one.dtype.isnative
    view = np.asarray(array if plain else np.array(array, dtype=array.dtype.newbyteorder("="), order="C")).view()
    view.flags.writeable = False
    return view


def _take(array: npt.NDArray[Any] | None, index: Any) -> npt.NDArray[Any] | None:
    return None if array is None else array[index]


def _take_LTK(array: npt.NDArray[Any] | None, index: Any) -> npt.NDArray[Any] | None:
    return None if array is None else array[:, index]


def _widen(array: npt.NDArray[Any], top_k: int, fill: int) -> npt.NDArray[Any]:
    return np.pad(array, ((0, 0), (0, 0), (0, top_k - array.shape[2])), constant_values=fill)


def _join_tags(tags: Sequence[Tag]) -> Tag:
    names = tuple(dict.fromkeys(name for tag in tags for name in tag.names))
    code = {name: number for number, name in enumerate(names)}
    dtype = np.dtype(np.uint8 if len(names) <= 256 else np.uint16)
    dtype = max([dtype, *(tag.codes_T.dtype for tag in tags)], key=lambda d: d.itemsize)
    maps = [np.array([code[name] for name in tag.names], dtype=dtype) for tag in tags]
    return Tag(np.concatenate([table[tag.codes_T] for table, tag in zip(maps, tags, strict=True)]), names)
