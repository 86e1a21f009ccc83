"""Reads the routing that servers return with a reply when started with --enable-return-routed-experts.

Legend: T tokens, L layers (all of the model, dense ones as zeros), K top-k.

A file holds one reply, a JSON list of replies, or one reply per line, as the servers sent them:
    SGLang /generate   meta_info.routed_experts    base64 of raw int32 (T, L, K): needs the model for L and K
    SGLang OpenAI      sglext.routed_experts       the same
    vLLM               choices[].routed_experts    base64 of a .npy file (T, L, K), uint8 or uint16 without a sentinel
or is itself such a .npy file (one request). Ids are logical. T is prompt + output - 1 less the positions skipped.
"""

import base64
import binascii
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import InputFileError, UsageError
from placer.core.model import ModelSpec
from traces.readers.npy import MAGIC, array_from_bytes
from traces.readers.raw import RawTrace, as_ids, finish
from traces.readers.text import json_lines, load_json
from traces.summarize import Progress
from traces.trace import RoutingTrace

__all__ = ["read_routed_experts"]


def read_routed_experts(path: Path, model: ModelSpec | None = None, progress: Progress | None = None) -> RoutingTrace:
    """One trace of all replies in the file, a request each. Raises InputFileError, MismatchError or UsageError."""
    path = Path(path)
    parts: list[npt.NDArray[Any]] = []
    positions: list[npt.NDArray[np.int32]] = []
    phases: list[npt.NDArray[np.uint8]] = []
    known = True
    for where, reply, done in _replies(path):
        for text, prompt, total in _payloads(reply, where):
            expert_TLK = _decode(text, model, where)
            if parts and expert_TLK.shape[1:] != parts[0].shape[1:]:
                raise InputFileError(
                    f"{where}: routing is {expert_TLK.shape[1:]} (layers, k), the replies before {parts[0].shape[1:]}; "
                    "put replies of one model into a file"
                )
            first = max(0, total - 1 - len(expert_TLK)) if total is not None else 0
            position_T = np.arange(first, first + len(expert_TLK), dtype=np.int32)
            parts.append(expert_TLK)
            positions.append(position_T)
            phases.append((position_T >= (prompt or 0)).astype(np.uint8))
            known &= prompt is not None
        if progress is not None:
            progress(done, path.stat().st_size)
    if not parts:
        raise InputFileError(f"{path}: no reply holds routed_experts; ask for them with return_routed_experts")
    counts = [len(part) for part in parts]
    expert_LTK = np.empty((parts[0].shape[1], sum(counts), parts[0].shape[2]), dtype=np.uint16)
    start = 0
    for part in parts:
        expert_LTK[:, start : start + len(part)] = part.transpose(1, 0, 2)
        start += len(part)
    columns: dict[str, npt.NDArray[Any]] = {"position_T": np.concatenate(positions)}
    if known:
        columns["phase_T"] = np.concatenate(phases)
    raw = RawTrace(
        where=str(path),
        expert_LTK=expert_LTK,
        request_id_T=np.repeat(np.arange(len(counts), dtype=np.int32), counts),
        columns=columns,
        notes=() if known else ("phases unknown: a reply lacks usage.prompt_tokens",),
        provenance=f"routed_experts {path.name}",
    )
    return finish(raw, model)


def _replies(path: Path) -> Iterator[tuple[str, Any, int]]:
    """(where, reply, bytes read) of every reply in the file."""
    try:
        with path.open("rb") as file:
            head = file.read(len(MAGIC))
        if head == MAGIC:
            size = path.stat().st_size
            text = base64.b64encode(path.read_bytes()).decode()
            yield str(path), {"choices": [{"routed_experts": text}]}, size
            return
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    lines = 0
    try:
        for number, reply, done in json_lines(path):
            lines += 1
            if isinstance(reply, list):
                yield from ((f"{path}: reply {index}", item, done) for index, item in enumerate(reply))
            else:
                yield f"{path}: line {number}", reply, done
    except InputFileError:
        if lines:
            raise
        # not one reply per line: perhaps one value over many lines
        value = load_json(path)
        size = path.stat().st_size
        replies = value if isinstance(value, list) else [value]
        yield from ((f"{path}: reply {index}", item, size) for index, item in enumerate(replies))


def _payloads(reply: Any, where: str) -> Iterator[tuple[str, int | None, int | None]]:
    """(base64 text, prompt tokens, all tokens) of each choice of a reply."""
    if not isinstance(reply, Mapping):
        raise InputFileError(f"{where}: is not a reply object; give what the server sent")
    meta = _table(reply, "meta_info")
    usage = {**meta, **_table(reply, "usage")}
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    prompt = prompt if type(prompt) is int and 0 <= prompt < 2**31 else None
    total = None
    if prompt is not None and type(completion) is int and 0 <= completion < 2**31:
        total = prompt + completion
    choices = reply.get("choices")
    holders = [meta, _table(reply, "sglext"), *(choices if isinstance(choices, list) else [])]
    texts = [item["routed_experts"] for item in holders if isinstance(item, Mapping) and item.get("routed_experts")]
    for text in texts:
        if not isinstance(text, str):
            raise InputFileError(f"{where}: routed_experts is a {type(text).__name__}; give the base64 text as sent")
        # the usage of several choices is their sum, so that a single one's length is unknown
        yield text, prompt, total if len(texts) == 1 else None


def _table(reply: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    value = reply.get(name)
    return value if isinstance(value, Mapping) else {}


def _decode(text: str, model: ModelSpec | None, where: str) -> npt.NDArray[Any]:
    """The ids (T, L, K) of one base64 text, uint16 with the sentinel."""
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputFileError(f"{where}: routed_experts is not base64 ({error})") from error
    if data.startswith(MAGIC):
        ids = array_from_bytes(data, f"{where}: routed_experts")
        if ids.ndim != 3 or ids.dtype.kind not in "iu" or not ids.size:
            raise InputFileError(
                f"{where}: routed_experts is {ids.dtype} {ids.shape}; give integers (tokens, layers, k)"
            )
        # uint8 goes up to 255 experts here: widening keeps id 255 from being read as unset
        return ids.astype(np.uint16) if ids.dtype == np.uint8 else as_ids(ids, where)
    if model is None:
        raise UsageError(
            f"{where}: raw routed_experts have no shape; give the model (--model) for its layers and top-k"
        )
    row = model.num_hidden_layers * model.top_k
    if not data or len(data) % (4 * row):
        raise InputFileError(
            f"{where}: routed_experts has {len(data)} bytes, not a multiple of 4 x {model.num_hidden_layers} layers x "
            f"top-{model.top_k} of model {model.name!r}; give the model that was served"
        )
    ids = np.frombuffer(data, dtype="<i4").reshape(-1, model.num_hidden_layers, model.top_k)
    return as_ids(ids, f"{where}: routed_experts")
