"""A manifest of expert planes: where every plane lies, how its bytes become weights, and which stay in memory.

A loader needs this JSON and the plane file, and neither safetensors nor placer.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex
from placer.core.errors import InputFileError, UsageError
from placer.export.device_exporter import DeviceExporter
from placer.export.jsontext import parse_json

__all__ = ["MANIFEST_FORMAT", "PLANES_MANIFEST"]

MANIFEST_FORMAT = "placer-plane-manifest"
VERSION = 1
READ_BYTES = 1 << 20
MATRICES = ("gate_up", "down")
LAYOUT = (
    "A plane is the bytes [offset, offset + length) of the file; crc32 is zlib's of them.",
    "It holds one part for each matrix of `matrices`, in that order, without gaps.",
    "A part is: codes; then scales, IEEE half precision, (rows, groups); then, in a base plane or a whole copy, "
    "offsets, IEEE half precision, (rows, groups). All little-endian, row by row.",
    "groups = ceil(columns / group_size); column c belongs to group c // group_size.",
    "Codes are packed row by row, least significant bit first: code c of a row is bits [c * width, (c + 1) * width) of "
    "the row's bits; each row is filled up to a whole byte. width is planes[].width: bits of a code in that plane.",
    "Base plane or copy: weight = offset + scale * code.",
    "Residual plane (nested ladders, plane 1 and up; width 1): add scale where the code is 1, subtract it where "
    "it is 0.",
    "Level k (from 1) of a nested ladder is planes 0 to k - 1 together, of another ladder plane k - 1 alone.",
)


def _encode(plan: DevicePlan, planes: PlaneIndex | None) -> bytes:
    planes = _needed(planes)
    size, sha256 = _hashed(planes.path)
    head = {
        "format": MANIFEST_FORMAT,
        "version": VERSION,
        "file": {"name": planes.path.name, "bytes": size, "sha256": sha256},
        "model": planes.model,
        "num_hidden_layers": planes.num_hidden_layers,
        "moe_layers": list(planes.moe_layers),
        "num_experts": planes.num_experts,
        "ladder": planes.ladder.to_dict(),
        "matrices": [
            {"name": MATRICES[at] if len(planes.shapes) == len(MATRICES) else str(at), "rows": rows, "columns": columns}
            for at, (rows, columns) in enumerate(planes.shapes)
        ],
        "layout": list(LAYOUT),
        "memory_bytes": plan.memory_bytes,
        "resident_bytes": plan.resident_bytes,
        "order": plan.order,
        "cache": plan.cache,
        "cache_bytes": plan.cache_bytes,
        "buffer_bytes": plan.buffer_bytes,
        "prefetch_layers": plan.prefetch_layers,
    }
    nested, bits_K, bytes_K = planes.ladder.nested, planes.ladder.bits_K, planes.plane_bytes_K
    offset_LEK, crc32_LEK, present_LEK = (
        planes.offset_LEK.tolist(),
        planes.crc32_LEK.tolist(),
        plan.present_LEK.tolist(),
    )
    rows: list[dict[str, Any]] = [
        {
            "layer": layer,
            "expert": expert,
            "plane": plane,
            "width": 1 if nested and plane else bits_K[plane],
            "offset": offset_LEK[site][expert][plane],
            "length": bytes_K[plane],
            "crc32": crc32_LEK[site][expert][plane],
            "resident": present_LEK[site][expert][plane],
        }
        for site, layer in enumerate(planes.moe_layers)
        for expert in range(planes.num_experts)
        for plane in range(planes.ladder.levels)
    ]
    ceilings = [
        {"layer": layer, "level_of_expert": plan.ceiling_LE[site].tolist()}
        for site, layer in enumerate(plan.moe_layers)
    ]
    lines = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in head.items()]
    for name, table in (("ceilings", ceilings), ("planes", rows)):
        lines.append(f' "{name}": [\n' + ",\n".join(f"  {json.dumps(row)}" for row in table) + "\n ]")
    return ("{\n" + ",\n".join(lines) + "\n}\n").encode()


def _differs(payload: bytes, plan: DevicePlan, planes: PlaneIndex | None) -> str:
    """Looks every plane up in the index and the plan, and its length in the file."""
    planes = _needed(planes)
    data = parse_json(payload)
    site_of = {layer: site for site, layer in enumerate(data["moe_layers"])}
    seen = set()
    for row in data["planes"]:
        key = site_of[row["layer"]], row["expert"], row["plane"]
        seen.add(key)
        wanted = (int(planes.offset_LEK[key]), int(planes.crc32_LEK[key]), bool(plan.present_LEK[key]))
        if (row["offset"], row["crc32"], row["resident"]) != wanted:
            return f"plane {row['plane']} of layer {row['layer']} expert {row['expert']}"
        if row["offset"] + row["length"] > data["file"]["bytes"]:
            return f"plane {row['plane']} of layer {row['layer']} expert {row['expert']} ends beyond the file"
    return "" if len(seen) == len(data["planes"]) == planes.offset_LEK.size else f"{len(seen)} planes"


def _needed(planes: PlaneIndex | None) -> PlaneIndex:
    if planes is None:
        raise UsageError("a plane manifest says where planes lie: give the plane file that the plan was made for")
    return planes


def _hashed(path: Path) -> tuple[int, str]:
    """Bytes and SHA-256 of a file, read in parts."""
    digest, size = hashlib.sha256(), 0
    try:
        with path.open("rb") as file:
            while part := file.read(READ_BYTES):
                digest.update(part)
                size += len(part)
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror or error})") from error
    return size, digest.hexdigest()


def _launch(plan: DevicePlan, path: Path) -> str:
    return f"{path}: offsets, checksums and layout of every plane; keep the plane file beside it"


def _warnings(plan: DevicePlan) -> tuple[str, ...]:
    return ()


PLANES_MANIFEST = DeviceExporter(
    name="planes",
    about="a JSON manifest of the plane file for loaders without safetensors",
    suffixes=(".json",),
    encode=_encode,
    differs=_differs,
    launch=_launch,
    warnings=_warnings,
)
