"""vllm-ascend: the expert map of its static mode (`eplb_config.expert_map_path`), layers counted over MoE layers only.

Read against commit 182b75ea (2026-08). Its documentation announces the removal of the static mode in v0.25.1.

Legend: L routing sites (MoE layers), P physical slots, R ranks (devices).
"""

import json
import shlex
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import InputFileError
from placer.core.model import ModelSpec
from placer.core.plan import Plan
from placer.export.exporter import Exporter, expert_matrix
from placer.export.jsontext import json_bytes_of_rows, parse_json

__all__ = ["ASCEND"]


def _encode(plan: Plan, model: ModelSpec, suffix: str) -> bytes:
    layers, ranks = len(plan.moe_layers), plan.num_ranks
    expert_LRP = plan.slot_expert_LP.reshape(layers, ranks, plan.slots_per_rank).tolist()
    layer_list = [
        {
            "layer_id": layer,
            "device_count": ranks,
            "device_list": [{"device_id": rank, "device_expert": expert_LRP[layer][rank]} for rank in range(ranks)],
        }
        for layer in range(layers)
    ]
    return json_bytes_of_rows(layer_list, before=f'{{"moe_layer_count": {layers}, "layer_list": [\n', after="\n]}\n")


def _decode(payload: bytes, model: ModelSpec, suffix: str) -> npt.NDArray[np.int64]:
    data = parse_json(payload)
    if not isinstance(data, dict) or not isinstance(data.get("layer_list"), list):
        raise InputFileError("has no layer_list")
    layer_list = data["layer_list"]
    if data.get("moe_layer_count") != len(layer_list) or len(layer_list) != model.num_sites:
        raise InputFileError(f"has {len(layer_list)} layers; the model has {model.num_sites} MoE layers")
    return expert_matrix([_layer_row(number, layer) for number, layer in enumerate(layer_list)], "layer_list")


def _layer_row(number: int, layer: Any) -> list[Any]:
    if not isinstance(layer, dict) or layer.get("layer_id") != number or not isinstance(layer.get("device_list"), list):
        raise InputFileError(f"layer_list entry {number} is not layer_id {number} with a device_list")
    devices = layer["device_list"]
    if layer.get("device_count") != len(devices):
        raise InputFileError(f"layer {number} says {layer.get('device_count')!r} devices and lists {len(devices)}")
    row: list[Any] = []
    lengths = set()
    for rank, device in enumerate(devices):
        experts = device.get("device_expert") if isinstance(device, dict) else None
        if not isinstance(experts, list) or device.get("device_id") != rank:
            raise InputFileError(f"layer {number} device {rank} is not device_id {rank} with a device_expert list")
        row += experts
        lengths.add(len(experts))
    if len(lengths) > 1:
        raise InputFileError(f"layer {number} has devices with different numbers of experts")
    return row


def _launch(plan: Plan, path: Path) -> str:
    settings = {"expert_map_path": str(path), "num_redundant_experts": plan.num_slots - plan.num_experts}
    return f"--enable-expert-parallel --additional-config {shlex.quote(json.dumps({'eplb_config': settings}))}"


ASCEND = Exporter(
    name="ascend",
    about="vllm-ascend expert_map_path (static mode, model runner V1; layers counted over MoE layers)",
    suffixes=(".json",),
    encode=_encode,
    decode=_decode,
    launch=_launch,
)
