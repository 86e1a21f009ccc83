"""KTransformers: resident experts as synthetic counts, from which it makes exactly that set of experts on the GPU.

Read against kvcache-ai's SGLang fork and kt-kernel of August 2026: `--kt-expert-placement-strategy frequency` loads a
.pt table with `logical_count` (steps, hidden layers, experts) from `--init-expert-location`, adds the steps and puts
the experts of the largest counts over all layers on the GPU, int(ratio * experts of all MoE layers) of them. Counts of
1 and 0 say any set. Rows of dense layers are zeros.
"""

import io
import shlex
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex
from placer.core.errors import DependencyError
from placer.export.device_exporter import DeviceExporter

__all__ = ["KTRANSFORMERS", "gpu_ratio"]

KEY = "logical_count"


def gpu_ratio(plan: DevicePlan) -> float:
    """The ratio of which KTransformers' int(ratio * experts) is the number of resident experts."""
    resident, total = int((plan.resident_LE > 0).sum()), plan.resident_LE.size
    # the middle between two whole numbers survives any rounding
    return 1.0 if resident == total else (resident + 0.5) / total


def _encode(plan: DevicePlan, planes: PlaneIndex | None) -> bytes:
    count_1HE = np.zeros((1, plan.num_hidden_layers, plan.num_experts), dtype=np.int64)
    count_1HE[0, list(plan.moe_layers)] = plan.resident_LE > 0
    torch = _torch()
    buffer = io.BytesIO()
    torch.save({KEY: torch.from_numpy(count_1HE)}, buffer)
    return buffer.getvalue()


def _differs(payload: bytes, plan: DevicePlan, planes: PlaneIndex | None) -> str:
    """Reads the one tensor's bytes out of the archive, without torch."""
    shape = (plan.num_hidden_layers, plan.num_experts)
    with zipfile.ZipFile(io.BytesIO(payload)) as archive:
        raw = next(archive.read(name) for name in archive.namelist() if name.endswith("/data/0"))
    count_HE: npt.NDArray[Any] = np.frombuffer(raw, dtype=np.int64)
    if count_HE.size != shape[0] * shape[1]:
        return f"{count_HE.size} counts, not {shape}"
    chosen = np.argsort(-count_HE, kind="stable")[: int(plan.resident_LE.size * gpu_ratio(plan))]
    mask_HE = np.zeros(count_HE.size, dtype=np.bool_)
    mask_HE[chosen] = True
    same = np.array_equal(mask_HE.reshape(shape)[list(plan.moe_layers)], plan.resident_LE > 0)
    return "" if same else "other experts would be on the GPU"


def _launch(plan: DevicePlan, path: Path) -> str:
    return (
        f"--kt-expert-placement-strategy frequency --init-expert-location {shlex.quote(str(path))} "
        f"--kt-gpu-experts-ratio {gpu_ratio(plan)!r}"
    )


def _warnings(plan: DevicePlan) -> tuple[str, ...]:
    found = []
    partly = int(((plan.resident_LE > 0) & (plan.resident_LE < plan.ceiling_LE)).sum())
    if partly:
        found.append(
            f"{partly} experts are resident with some of their planes; KTransformers keeps them whole, in the "
            "precision of the weights it is given, so its memory is larger than the plan's"
        )
    if plan.cache_bytes or plan.prefetch_layers:
        found.append(
            "the plan's cache and prefetching are not exported: KTransformers computes the other experts on the CPU; "
            "leave out --kt-enable-dynamic-expert-update, which replaces the set"
        )
    return tuple(found)


def _torch() -> Any:
    try:
        import torch
    except ImportError as error:
        raise DependencyError("KTransformers' .pt file needs torch: pip install 'placer[torch]'") from error
    return torch


KTRANSFORMERS = DeviceExporter(
    name="ktransformers",
    about="KTransformers --init-expert-location counts: 1 for a resident expert (rows by absolute layer id)",
    suffixes=(".pt",),
    encode=_encode,
    differs=_differs,
    launch=_launch,
    warnings=_warnings,
)
