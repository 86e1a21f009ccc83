"""DeepSeek EPLB's three arrays, for anything that takes what `eplb.rebalance_experts` returns.

    phy2log int64 (L, P)      logical expert of each slot
    log2phy int64 (L, E, X)   slots of each expert, ascending, padded with -1; X = the largest number of replicas
    logcnt  int64 (L, E)      replicas of each expert

Legend: L routing sites (MoE layers), P physical slots, E logical experts, X replicas.
"""

import io
import zipfile
import zlib
from pathlib import Path

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from placer.core.errors import InputFileError
from placer.core.model import ModelSpec
from placer.core.plan import Plan
from placer.export.exporter import Exporter

__all__ = ["EPLB", "eplb_maps"]

DAMAGED = (
    SafetensorError,
    zipfile.BadZipFile,
    zlib.error,
    ValueError,
    KeyError,
    EOFError,
    OSError,
    RuntimeError,
    MemoryError,
    OverflowError,
)
"""What the two readers raise on bytes that are not, or no longer, their own."""
NAMES = ("phy2log", "log2phy", "logcnt")


def eplb_maps(slot_expert_LP: npt.NDArray[np.int64], num_experts: int) -> dict[str, npt.NDArray[np.int64]]:
    """phy2log (L, P), log2phy (L, E, X) padded with -1 and logcnt (L, E) of a placement, all int64."""
    layers, slots = slot_expert_LP.shape
    row_LP = np.arange(layers)[:, None]
    logcnt_LE = np.zeros((layers, num_experts), dtype=np.int64)
    np.add.at(logcnt_LE, (row_LP, slot_expert_LP), 1)
    order_LP = np.argsort(slot_expert_LP, axis=1, kind="stable")
    expert_LP = np.take_along_axis(slot_expert_LP, order_LP, axis=1)
    first_LE = np.cumsum(logcnt_LE, axis=1) - logcnt_LE
    replica_LP = np.arange(slots)[None, :] - np.take_along_axis(first_LE, expert_LP, axis=1)
    log2phy_LEX = np.full((layers, num_experts, int(logcnt_LE.max())), -1, dtype=np.int64)
    log2phy_LEX[row_LP, expert_LP, replica_LP] = order_LP
    return {"phy2log": np.ascontiguousarray(slot_expert_LP), "log2phy": log2phy_LEX, "logcnt": logcnt_LE}


def _encode(plan: Plan, model: ModelSpec, suffix: str) -> bytes:
    maps = eplb_maps(plan.slot_expert_LP, plan.num_experts)
    if suffix == ".safetensors":
        return bytes(save_safetensors(maps))
    buffer = io.BytesIO()
    np.savez(buffer, phy2log=maps["phy2log"], log2phy=maps["log2phy"], logcnt=maps["logcnt"])
    return buffer.getvalue()


def _decode(payload: bytes, model: ModelSpec, suffix: str) -> npt.NDArray[np.int64]:
    try:
        if suffix == ".safetensors":
            maps = dict(load_safetensors(payload))
        else:
            with np.load(io.BytesIO(payload), allow_pickle=False) as archive:
                maps = {name: archive[name] for name in archive.files}
    except DAMAGED as error:
        raise InputFileError(f"is not a {suffix} file of arrays ({error})") from error
    if set(maps) != set(NAMES) or not all(np.issubdtype(array.dtype, np.integer) for array in maps.values()):
        raise InputFileError(f"must hold the integer arrays {', '.join(NAMES)}")
    phy2log_LP, log2phy_LEX, logcnt_LE = (maps[name] for name in NAMES)
    shapes = (phy2log_LP.ndim, log2phy_LEX.ndim, logcnt_LE.shape)
    if shapes != (2, 3, (model.num_sites, model.num_experts)) or len(phy2log_LP) != model.num_sites:
        raise InputFileError(f"the arrays do not fit {model.num_sites} MoE layers of {model.num_experts} experts")
    for layer in range(model.num_sites):
        for expert in range(model.num_experts):
            slots = np.flatnonzero(phy2log_LP[layer] == expert)
            padding = np.full(max(0, log2phy_LEX.shape[2] - len(slots)), -1)
            same = np.array_equal(log2phy_LEX[layer, expert], np.concatenate([slots, padding]))
            if not same or logcnt_LE[layer, expert] != len(slots):
                raise InputFileError(f"log2phy and logcnt of row {layer} expert {expert} do not invert phy2log")
    return np.asarray(phy2log_LP, dtype=np.int64)


def _launch(plan: Plan, path: Path) -> str:
    return f"{path}: phy2log, log2phy, logcnt as deepseek-ai/EPLB's rebalance_experts returns them"


EPLB = Exporter(
    name="eplb",
    about="DeepSeek EPLB arrays phy2log, log2phy, logcnt (rows by position among the MoE layers)",
    suffixes=(".npz", ".safetensors"),
    encode=_encode,
    decode=_decode,
    launch=_launch,
)
