"""SGLang: `--init-expert-location FILE`, a map with a row for every hidden layer, dense layers included.

Read against sglang 0.5.23, srt/eplb/expert_location.py. The file may hold the one key `physical_to_logical_map`: the
reader passes every key on as an argument, so any other key is a TypeError there. Rows are numbered by absolute layer
id; the rows of dense layers are never used but must be valid, and get the map SGLang itself starts with.

Legend: L routing sites (MoE layers), H hidden layers, P physical slots, E logical experts.
"""

import io
import pickle
import shlex
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import DependencyError, InputFileError
from placer.core.model import ModelSpec
from placer.core.plan import Plan
from placer.export.exporter import Exporter, expert_matrix
from placer.export.jsontext import json_bytes_of_rows, parse_json

__all__ = ["SGLANG"]

KEY = "physical_to_logical_map"
DAMAGED = (
    pickle.UnpicklingError,
    RuntimeError,
    ValueError,
    TypeError,
    LookupError,
    AttributeError,
    AssertionError,
    EOFError,
    OSError,
    MemoryError,
    OverflowError,
    struct.error,
)
"""What torch.load raises on bytes that are not, or no longer, a file of its own."""


def _encode(plan: Plan, model: ModelSpec, suffix: str) -> bytes:
    expert_HP = np.tile(_trivial_row(plan.num_slots, model.num_experts), (model.num_hidden_layers, 1))
    expert_HP[list(plan.moe_layers)] = plan.slot_expert_LP
    if suffix == ".json":
        return json_bytes_of_rows(expert_HP.tolist(), before=f'{{"{KEY}": [\n', after="\n]}\n")
    torch = _torch()
    buffer = io.BytesIO()
    torch.save({KEY: torch.from_numpy(expert_HP)}, buffer)
    return buffer.getvalue()


def _decode(payload: bytes, model: ModelSpec, suffix: str) -> npt.NDArray[np.int64]:
    data = parse_json(payload) if suffix == ".json" else _load_tensors(payload)
    if not isinstance(data, dict) or set(data) != {KEY}:
        raise InputFileError(f"must hold the one key {KEY!r}; SGLang refuses any other")
    expert_HP = expert_matrix(data[KEY], KEY)
    if len(expert_HP) != model.num_hidden_layers:
        raise InputFileError(f"{KEY} has {len(expert_HP)} rows; the model has {model.num_hidden_layers} hidden layers")
    trivial_P = _trivial_row(expert_HP.shape[1], model.num_experts)
    for layer in sorted(set(range(model.num_hidden_layers)) - set(model.moe_layers)):
        if not np.array_equal(expert_HP[layer], trivial_P):
            raise InputFileError(f"{KEY} row {layer} is a dense layer's but not SGLang's starting map")
    return expert_HP[list(model.moe_layers)]


def _trivial_row(slots: int, experts: int) -> npt.NDArray[np.int64]:
    return np.arange(slots, dtype=np.int64) % experts


def _load_tensors(payload: bytes) -> Any:
    torch = _torch()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            data = torch.load(io.BytesIO(payload), weights_only=True, map_location="cpu")
    except DAMAGED as error:
        reason = str(error).partition("\n")[0]
        raise InputFileError(f"is not a torch file of tensors ({reason})") from error
    if isinstance(data, dict):
        return {key: value.tolist() if isinstance(value, torch.Tensor) else value for key, value in data.items()}
    return data


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise DependencyError("a .pt file needs torch: pip install 'placer[torch]', or export to .json") from error
    return torch


A2A_FLAGS = {
    "per_expert": "--moe-a2a-backend deepep --deepep-mode low_latency",
    "per_rank": "--moe-a2a-backend deepep --deepep-mode normal",
    "per_node": "--moe-a2a-backend deepep --deepep-mode normal",
    "coherent": "--moe-a2a-backend deepep",
    "allgather": "--moe-a2a-backend none",
}
"""SGLang's flags for each dispatch mode; it has no `coherent` execution."""


def _launch(plan: Plan, path: Path) -> str:
    redundant = plan.num_slots - plan.num_experts
    return (
        f"--init-expert-location {shlex.quote(str(path))} --ep-size {plan.num_ranks} "
        f"--ep-num-redundant-experts {redundant} {A2A_FLAGS[plan.mode]}"
    )


SGLANG = Exporter(
    name="sglang",
    about="SGLang 0.5.23 --init-expert-location (rows by absolute layer id)",
    suffixes=(".json", ".pt"),
    encode=_encode,
    decode=_decode,
    launch=_launch,
)
