"""Forced routing: the tokens of a replay job, the slots that serve them, and where each token is in each layer.

Legend: L sites, T tokens, K top-k.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.dispatch import assign_layer
from placer.core.errors import InputFileError, MismatchError
from placer.core.plan import Plan
from placer.execute.job import ReplayJob

__all__ = ["Routing", "load_routing"]

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The tokens of all recorded iterations: slot_LTK serves each choice (-1: none), weight_LTK float32, source_T."""

    expert_LTK: npt.NDArray[np.integer[Any]]
    weight_LTK: npt.NDArray[np.float32]
    slot_LTK: IntArray
    source_T: IntArray
    token_T: IntArray


def load_routing(job: ReplayJob, plan: Plan, rank: int | None = None) -> Routing:
    """The job's tokens (those whose source is `rank`, where given) and the slots that serve them.

    Every rank gets the same slots for the same token: the choice depends on the plan and on where the token comes from,
    which in `coherent` mode is the rank of its first expert in the layer before. Raises InputFileError, or
    MismatchError where arrays and plan do not fit together.
    """
    expert_LTK, source_T = _load_array(job.expert_path, 3), _load_array(job.source_path, 1)
    weight_LTK = None if job.weight_path is None else _load_array(job.weight_path, 3)
    layers, tokens, _ = expert_LTK.shape
    if len(plan.slot_expert_LP) != layers or len(job.stored_layers) != layers:
        raise MismatchError(
            f"the trace has {layers} MoE layers, the plan {len(plan.slot_expert_LP)}, the expert file's map "
            f"{len(job.stored_layers)}; use the trace that the plan was solved for"
        )
    if tokens < job.num_tokens or len(source_T) != tokens or (weight_LTK is not None and len(weight_LTK[0]) != tokens):
        raise MismatchError(
            f"{job.expert_path}: {tokens} tokens, {len(source_T)} sources; the job replays {job.num_tokens}"
        )
    source_T = np.asarray(source_T[: job.num_tokens], dtype=np.int64)
    if source_T.min(initial=0) < 0 or source_T.max(initial=0) >= plan.num_ranks:
        raise MismatchError(
            f"{job.source_path}: source ranks go from {source_T.min()} to {source_T.max()}; the plan has "
            f"{plan.num_ranks} ranks"
        )
    token_T = np.arange(job.num_tokens) if rank is None else np.flatnonzero(source_T == rank)
    expert_LTK = np.stack([expert_TK[token_T] for expert_TK in expert_LTK])
    source_T = source_T[token_T]
    location_T, slot_LTK = source_T, np.empty(expert_LTK.shape, dtype=np.int64)
    for layer in range(layers):
        slot_LTK[layer], slots = assign_layer(plan, layer, expert_LTK[layer], location_T, token_T)
        if job.mode == "coherent":
            first_T = (slot_LTK[layer] >= 0).argmax(axis=1)
            slot_T = slot_LTK[layer][np.arange(len(first_T)), first_T]
            location_T = np.where(slot_T >= 0, slots.rank_P[slot_T], location_T)
    if weight_LTK is None:
        count_LT = (slot_LTK >= 0).sum(axis=2, keepdims=True)
        weight = np.broadcast_to(1.0 / np.maximum(1, count_LT), slot_LTK.shape).astype(np.float32)
    else:
        weight = np.stack([weight_TK[token_T] for weight_TK in weight_LTK]).astype(np.float32)
    return Routing(expert_LTK=expert_LTK, weight_LTK=weight, slot_LTK=slot_LTK, source_T=source_T, token_T=token_T)


def _load_array(path: str, axes: int) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputFileError(f"{path}: cannot be read as .npy ({error})") from error
    if array.ndim != axes:
        raise InputFileError(f"{path}: has {array.ndim} axes; the job needs {axes}")
    return array
