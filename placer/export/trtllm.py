"""TensorRT-LLM: the YAML of `moe_config.load_balancer`, static (no updates by the engine).

Keys of `initial_global_assignments` are absolute layer ids and dense layers are absent. The class that reads it refuses
unknown keys and raises KeyError for any MoE layer that is missing, multi-token-prediction layers included
(ids from num_hidden_layers up): add those by hand where the model has them.

Legend: L routing sites (MoE layers), P physical slots.
"""

from pathlib import Path

import numpy as np
import numpy.typing as npt
import yaml

from placer.core.errors import InputFileError
from placer.core.model import ModelSpec
from placer.core.plan import Plan
from placer.export.exporter import Exporter, expert_matrix

__all__ = ["TRTLLM"]

KEYS = {"num_slots", "initial_global_assignments", "layer_updates_per_iter"}
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def _encode(plan: Plan, model: ModelSpec, suffix: str) -> bytes:
    rows = zip(plan.moe_layers, plan.slot_expert_LP.tolist(), strict=True)
    lines = [f"num_slots: {plan.num_slots}", "initial_global_assignments:"]
    lines += [f"  {layer}: {experts}" for layer, experts in rows]
    return "\n".join([*lines, "layer_updates_per_iter: 0", ""]).encode()


def _decode(payload: bytes, model: ModelSpec, suffix: str) -> npt.NDArray[np.int64]:
    try:
        data = yaml.load(payload, Loader=LOADER)  # noqa: S506
    except (yaml.YAMLError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise InputFileError(f"is not YAML ({str(error).partition(chr(10))[0]})") from error
    if not isinstance(data, dict) or set(data) != KEYS:
        raise InputFileError(f"must hold the keys {', '.join(sorted(KEYS))} and no other")
    assignments = data["initial_global_assignments"]
    if not isinstance(assignments, dict) or list(assignments) != list(model.moe_layers):
        raise InputFileError("initial_global_assignments does not have one key for each MoE layer, by absolute id")
    if data["layer_updates_per_iter"] != 0:
        raise InputFileError(f"layer_updates_per_iter is {data['layer_updates_per_iter']!r}; a static plan has 0")
    expert_LP = expert_matrix(list(assignments.values()), "initial_global_assignments")
    if data["num_slots"] != expert_LP.shape[1]:
        raise InputFileError(f"num_slots is {data['num_slots']!r} but the rows have {expert_LP.shape[1]}")
    return expert_LP


def _launch(plan: Plan, path: Path) -> str:
    return f"moe_config: {{backend: WIDEEP, load_balancer: {path}}} with moe_expert_parallel_size: {plan.num_ranks}"


TRTLLM = Exporter(
    name="trtllm",
    about="TensorRT-LLM moe_config.load_balancer (keys by absolute layer id)",
    suffixes=(".yaml", ".yml"),
    encode=_encode,
    decode=_decode,
    launch=_launch,
)
