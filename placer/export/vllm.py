"""vLLM: three forms that open pull requests would read. No released vLLM (0.33.0 is the newest seen) reads any.

    vllm-initial-mapping   #41141  JSONL, one record; eplb_config.initial_mapping_path
    vllm-expert-map        #49572  JSON list of lists; eplb_config.initial_expert_map_path
    vllm-placement-file    #34811  JSON rank of each expert, one for all layers, no replicas; --expert-placement-file

`vllm` picks the first for .jsonl and the second for .json. Rows are positions in vLLM's list of MoE layers: dense
layers are absent. To place experts on a running vLLM 0.33.0, a plugin has to replace its EPLB policy.

Legend: L routing sites (MoE layers), P physical slots, E logical experts, R ranks.
"""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import InputFileError, ViolationError
from placer.core.model import ModelSpec
from placer.core.plan import Plan
from placer.export.exporter import Exporter, expert_matrix
from placer.export.jsontext import json_bytes_of_rows, parse_json

__all__ = ["VLLM", "VLLM_EXPERT_MAP", "VLLM_INITIAL_MAPPING", "VLLM_PLACEMENT_FILE"]

RECORD_TYPE = "eplb_initial_mapping"
RECORD_VERSION = 1


def _encode_initial_mapping(plan: Plan, model: ModelSpec, suffix: str) -> bytes:
    record = {
        "record_type": RECORD_TYPE,
        "version": RECORD_VERSION,
        "num_redundant_experts": plan.num_slots - plan.num_experts,
        "num_slots": plan.num_slots,
        "initial_global_assignments": {str(row): ids for row, ids in enumerate(plan.slot_expert_LP.tolist())},
    }
    return (json.dumps(record) + "\n").encode()


def _decode_initial_mapping(payload: bytes, model: ModelSpec, suffix: str) -> npt.NDArray[np.int64]:
    lines = payload.splitlines()
    if len(lines) != 1:
        raise InputFileError(f"has {len(lines)} lines; a mapping is one {RECORD_TYPE} record")
    record = parse_json(lines[0])
    if (
        not isinstance(record, dict)
        or record.get("record_type") != RECORD_TYPE
        or record.get("version") != RECORD_VERSION
    ):
        raise InputFileError(f"is not a {RECORD_TYPE} record of version {RECORD_VERSION}")
    assignments: Any = record.get("initial_global_assignments")
    if not isinstance(assignments, dict) or list(assignments) != [str(row) for row in range(model.num_sites)]:
        raise InputFileError(f"initial_global_assignments needs the keys 0 to {model.num_sites - 1}, one per MoE layer")
    expert_LP = expert_matrix(list(assignments.values()), "initial_global_assignments")
    slots = expert_LP.shape[1]
    if record.get("num_slots") != slots or record.get("num_redundant_experts") != slots - model.num_experts:
        raise InputFileError(f"num_slots or num_redundant_experts does not fit rows of {slots} slots")
    return expert_LP


def _encode_expert_map(plan: Plan, model: ModelSpec, suffix: str) -> bytes:
    return json_bytes_of_rows(plan.slot_expert_LP.tolist())


def _decode_expert_map(payload: bytes, model: ModelSpec, suffix: str) -> npt.NDArray[np.int64]:
    expert_LP = expert_matrix(parse_json(payload), "expert map")
    if len(expert_LP) != model.num_sites:
        raise InputFileError(f"has {len(expert_LP)} rows; the model has {model.num_sites} MoE layers")
    return expert_LP


def _encode_placement_file(plan: Plan, model: ModelSpec, suffix: str) -> bytes:
    if plan.num_slots != plan.num_experts:
        raise ViolationError(
            f"vLLM's placement file (#34811) has no replicas; the plan has {plan.num_slots - plan.num_experts} "
            "redundant slots: export to vllm-expert-map, or solve with --redundant 0"
        )
    rank_LE = np.argsort(plan.slot_expert_LP, axis=1) // plan.slots_per_rank
    differs = np.argwhere(rank_LE != rank_LE[0])
    if len(differs):
        row, expert = differs[0].tolist()
        raise ViolationError(
            f"vLLM's placement file (#34811) has one placement for all layers; expert {expert} is on rank "
            f"{rank_LE[0, expert]} in layer {plan.moe_layers[0]} and on rank {rank_LE[row, expert]} in layer "
            f"{plan.moe_layers[row]}: export to vllm-expert-map"
        )
    return (json.dumps({"expert_to_ep_rank": rank_LE[0].tolist()}) + "\n").encode()


def _decode_placement_file(payload: bytes, model: ModelSpec, suffix: str) -> npt.NDArray[np.int64]:
    data = parse_json(payload)
    if not isinstance(data, dict) or set(data) != {"expert_to_ep_rank"}:
        raise InputFileError("must hold the one key 'expert_to_ep_rank'")
    rank_E = expert_matrix([data["expert_to_ep_rank"]], "expert_to_ep_rank")[0]
    if len(rank_E) != model.num_experts:
        raise InputFileError(f"names the ranks of {len(rank_E)} experts; the model has {model.num_experts}")
    held = np.bincount(rank_E) if rank_E.min() >= 0 else np.zeros(1)
    if held.min() != held.max() or held.min() == 0:
        raise InputFileError("does not give every rank the same number of experts")
    return np.tile(np.argsort(rank_E, kind="stable"), (model.num_sites, 1))


def _launch_initial_mapping(plan: Plan, path: Path) -> str:
    return _eplb_flags(plan, "initial_mapping_path", path, "#41141")


def _launch_expert_map(plan: Plan, path: Path) -> str:
    return _eplb_flags(plan, "initial_expert_map_path", path, "#49572")


def _eplb_flags(plan: Plan, field: str, path: Path, pull: str) -> str:
    settings = {field: str(path), "num_redundant_experts": plan.num_slots - plan.num_experts}
    config = shlex.quote(json.dumps(settings))
    return f"--enable-expert-parallel --enable-eplb --eplb-config {config} (a vLLM with pull request {pull})"


def _launch_placement_file(plan: Plan, path: Path) -> str:
    return (
        f"--enable-expert-parallel --expert-placement-file {shlex.quote(str(path))} (a vLLM with pull request #34811)"
    )


VLLM_INITIAL_MAPPING = Exporter(
    name="vllm-initial-mapping",
    about="vLLM pull request #41141, open (rows by position among the MoE layers)",
    suffixes=(".jsonl",),
    encode=_encode_initial_mapping,
    decode=_decode_initial_mapping,
    launch=_launch_initial_mapping,
)
VLLM_EXPERT_MAP = Exporter(
    name="vllm-expert-map",
    about="vLLM pull request #49572, open (rows by position among the MoE layers)",
    suffixes=(".json",),
    encode=_encode_expert_map,
    decode=_decode_expert_map,
    launch=_launch_expert_map,
)
VLLM_PLACEMENT_FILE = Exporter(
    name="vllm-placement-file",
    about="vLLM pull request #34811, open (one placement for all layers, no replicas)",
    suffixes=(".json",),
    encode=_encode_placement_file,
    decode=_decode_placement_file,
    launch=_launch_placement_file,
    keeps_slot_order=False,
)
_BY_SUFFIX = {".jsonl": VLLM_INITIAL_MAPPING, ".json": VLLM_EXPERT_MAP}
VLLM = Exporter(
    name="vllm",
    about="vllm-initial-mapping for .jsonl, vllm-expert-map for .json; both need an open pull request",
    suffixes=(".jsonl", ".json"),
    encode=lambda plan, model, suffix: _BY_SUFFIX[suffix].encode(plan, model, suffix),
    decode=lambda payload, model, suffix: _BY_SUFFIX[suffix].decode(payload, model, suffix),
    launch=lambda plan, path: _BY_SUFFIX[path.suffix].launch(plan, path),
)
