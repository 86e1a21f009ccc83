"""llama.cpp: whole layers on the accelerator or on the CPU, and one type for each layer's experts; nothing finer.

A layer's experts are one tensor per matrix, `blk.N.ffn_{gate,up,down}_exps`, so `-ot`, `--n-cpu-moe` and
`llama-quantize --tensor-type` act on layers. The layers with the most resident bytes are kept, as many as fit the
plan's memory with all their experts at the layer's highest bit-width. What that drops and adds is written into the
file.

Legend: L routing sites, E experts.
"""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex
from placer.export.device_exporter import DeviceExporter

__all__ = ["LLAMACPP", "LayerRounding", "round_to_layers"]

TENSORS = "ffn_(up|down|gate|gate_up)_(ch|)exps"
TYPES = {1: "iq1_s", 2: "q2_K", 3: "q3_K", 4: "q4_K", 5: "q5_K", 6: "q6_K", 7: "q8_0", 8: "q8_0"}
"""The nearest type of llama.cpp with at least so many bits (none has 7)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerRounding:
    """A plan rounded to whole layers.

    kept, on_cpu   absolute MoE layers                    bits     bit-width of each MoE layer, in the plan's order
    dropped        resident experts that go to the CPU    added    experts kept that the plan loads when needed, or has
                                                                   resident with fewer planes
    kept_bytes     of the layers kept, as placer's planes (llama.cpp's types differ by some percent)
    """

    kept: tuple[int, ...]
    on_cpu: tuple[int, ...]
    bits: tuple[int, ...]
    dropped: int
    added: int
    resident: int
    kept_bytes: int


def round_to_layers(plan: DevicePlan) -> LayerRounding:
    """The layers to keep: most resident bytes first, each if it fits into what is left of the plan's memory."""
    bytes_K = np.asarray(plan.plane_bytes_K, dtype=np.int64)
    resident_bytes_L = (plan.present_LEK @ bytes_K).sum(axis=1)
    level_L = plan.ceiling_LE.max(axis=1)
    whole_L = [plan.num_experts * int(bytes_K[list(plan.ladder.planes_of(int(level)))].sum()) for level in level_L]
    room = budget = max(plan.memory_bytes, plan.resident_bytes)
    kept = []
    for row in np.argsort(-resident_bytes_L, kind="stable").tolist():
        if whole_L[row] <= room:
            room -= whole_L[row]
            kept.append(row)
    kept_L = np.zeros(len(level_L), dtype=np.bool_)
    kept_L[kept] = True
    resident_LE = plan.resident_LE > 0
    whole_LE = plan.resident_LE >= level_L[:, None]
    return LayerRounding(
        kept=tuple(layer for layer, keep in zip(plan.moe_layers, kept_L, strict=True) if keep),
        on_cpu=tuple(layer for layer, keep in zip(plan.moe_layers, kept_L, strict=True) if not keep),
        bits=tuple(plan.ladder.bits_K[int(level) - 1] for level in level_L),
        dropped=int(resident_LE[~kept_L].sum()),
        added=int((~whole_LE[kept_L]).sum()),
        resident=int(resident_LE.sum()),
        kept_bytes=budget - room,
    )


def _pattern(layers: tuple[int, ...]) -> str:
    return rf"blk\.({'|'.join(map(str, layers))})\.{TENSORS}"


def _server_flags(plan: DevicePlan) -> str:
    on_cpu = round_to_layers(plan).on_cpu
    return "-ngl 999" + (f" -ot {shlex.quote(_pattern(on_cpu) + '=CPU')}" if on_cpu else "")


def _first_layers(plan: DevicePlan, rounding: LayerRounding) -> int | None:
    """N where `--n-cpu-moe N` says the same, or None: the MoE layers on the CPU are the model's first ones."""
    count = max(rounding.on_cpu, default=-1) + 1
    return count if all(layer >= count for layer in rounding.kept) else None


def _quantize_flags(plan: DevicePlan, rounding: LayerRounding) -> str:
    by_bits: dict[int, list[int]] = {}
    for layer, bits in zip(plan.moe_layers, rounding.bits, strict=True):
        by_bits.setdefault(bits, []).append(layer)
    return " ".join(
        f"--tensor-type {shlex.quote(f'{_pattern(tuple(layers))}={TYPES[bits]}')}"
        for bits, layers in sorted(by_bits.items())
    )


def _loss(rounding: LayerRounding) -> str:
    return (
        f"llama.cpp places and quantises whole layers, nothing finer: {rounding.dropped} of {rounding.resident} "
        f"resident experts go to the CPU with their layers, and {rounding.added} experts that the plan does not keep "
        "whole stay on the accelerator with theirs"
    )


def _encode(plan: DevicePlan, planes: PlaneIndex | None) -> bytes:
    rounding = round_to_layers(plan)
    first = _first_layers(plan, rounding)
    kept = ", ".join(map(str, rounding.kept)) or "none"
    on_cpu = ", ".join(map(str, rounding.on_cpu)) or "none"
    lines = [
        f"# from placer's device plan of {plan.model!r}".replace("\n", " "),
        f"# {_loss(rounding)}",
        f"# experts on the accelerator: layers {kept} ({rounding.kept_bytes} bytes of {plan.memory_bytes})",
        f"# experts on the CPU: layers {on_cpu}",
        "# not exported: order of loading, cache, prefetching; llama.cpp has none of them",
        f"llama-server -m MODEL.gguf {_server_flags(plan)}",
        f"# or, the same: --n-cpu-moe {first}" if first is not None else "# --n-cpu-moe cannot say these layers",
        "# the bit-width of a layer is its highest planned one; types are the nearest with as many bits",
        f"llama-quantize {_quantize_flags(plan, rounding)} MODEL-F16.gguf MODEL.gguf q8_0",
    ]
    return ("\n".join(lines) + "\n").encode()


def _differs(payload: bytes, plan: DevicePlan, planes: PlaneIndex | None) -> str:
    """Applies the file's own patterns to the names of the tensors."""
    rounding = round_to_layers(plan)
    commands = [shlex.split(line) for line in payload.decode().splitlines() if not line.startswith("#")]
    rules = [word.rpartition("=") for command in commands for word in command if word.startswith("blk")]
    for row, layer in enumerate(plan.moe_layers):
        for matrix in ("gate", "up", "down"):
            name = f"blk.{layer}.ffn_{matrix}_exps.weight"
            found = {value for pattern, _, value in rules if re.search(pattern, name)}
            wanted = {TYPES[rounding.bits[row]]} | ({"CPU"} if layer in rounding.on_cpu else set())
            if found != wanted:
                return f"{name} gets {', '.join(sorted(found)) or 'nothing'}"
    return ""


def _launch(plan: DevicePlan, path: Path) -> str:
    return _server_flags(plan)


def _warnings(plan: DevicePlan) -> tuple[str, ...]:
    return (_loss(round_to_layers(plan)),)


LLAMACPP = DeviceExporter(
    name="llamacpp",
    about="llama.cpp -ot / --n-cpu-moe and llama-quantize --tensor-type, by whole layers",
    suffixes=(".sh", ".txt"),
    encode=_encode,
    differs=_differs,
    launch=_launch,
    warnings=_warnings,
)
