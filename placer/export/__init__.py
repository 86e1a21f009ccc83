"""Plans in the files that serving engines read: one module per engine, each plan checked before and after writing."""

from pathlib import Path

from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex
from placer.core.errors import UsageError
from placer.core.model import ModelSpec
from placer.core.modes import ReplicaChoice
from placer.core.plan import Plan
from placer.export.ascend import ASCEND
from placer.export.device_exporter import DeviceExporter
from placer.export.eplb import EPLB
from placer.export.exporter import Exporter
from placer.export.ktransformers import KTRANSFORMERS
from placer.export.legal import assert_exportable, export_violations
from placer.export.llamacpp import LLAMACPP
from placer.export.planes_manifest import PLANES_MANIFEST
from placer.export.sglang import SGLANG
from placer.export.trtllm import TRTLLM
from placer.export.vllm import VLLM, VLLM_EXPERT_MAP, VLLM_INITIAL_MAPPING, VLLM_PLACEMENT_FILE

__all__ = [
    "DEVICE_EXPORTERS",
    "ENGINE_CHOICES",
    "EXPORTERS",
    "DeviceExporter",
    "Exporter",
    "assert_exportable",
    "export_device_plan",
    "export_plan",
    "export_violations",
    "export_warnings",
]

EXPORTERS: dict[str, Exporter] = {
    exporter.name: exporter
    for exporter in (SGLANG, VLLM, VLLM_INITIAL_MAPPING, VLLM_EXPERT_MAP, VLLM_PLACEMENT_FILE, TRTLLM, ASCEND, EPLB)
}
"""Name on the command line to exporter."""


def export_plan(plan: Plan, model: ModelSpec, to: str, path: Path) -> str:
    """Writes `plan` for the engine `to` and returns the engine's flags that load the file.

    `model` gives the number of hidden layers and which of them are MoE layers: engines differ in how they number
    layers. The file is read back and compared with the plan before it takes its name; a failure changes nothing.

    Raises UsageError (unknown engine, wrong file suffix), ViolationError (the engine would load the plan and answer
    with wrong tokens or crash late; names layer, slot and expert), DependencyError (torch for .pt), InputFileError.
    """
    if to not in EXPORTERS:
        raise UsageError(f"no exporter for {to!r}; placer exports to {', '.join(EXPORTERS)}")
    path = Path(path)
    EXPORTERS[to].write(plan, model, path)
    return EXPORTERS[to].launch(plan, path)


ENGINE_CHOICES: dict[str, tuple[ReplicaChoice, ...]] = {
    "sglang": ("nearest", "local_or_uniform"),
    "vllm": ("token_hash",),
    "trtllm": ("round_robin",),
    "ascend": ("fixed_source",),
}
"""Replica choices that an engine has, the one it uses by default first; by the exporter's name up to its first dash."""


def export_warnings(plan: Plan, to: str) -> tuple[str, ...]:
    """What the engine `to` will do otherwise than the plan assumes: its replica choice, its dispatch."""
    warnings = []
    choices = ENGINE_CHOICES.get(to.split("-")[0])
    if choices and plan.num_slots > plan.num_experts and plan.replica_choice not in choices:
        warnings.append(
            f"the plan counts on replica choice {plan.replica_choice}, {to} uses {choices[0]}: ranks touched will be "
            f"higher than planned; set solve.replica_choice: {choices[0]} in --config and solve again to plan for it"
        )
    if plan.mode == "coherent" and choices:
        warnings.append(
            f"{to} has no coherent execution: tokens return to their source rank, so affinity gains nothing"
        )
    return tuple(warnings)


DEVICE_EXPORTERS: dict[str, DeviceExporter] = {
    exporter.name: exporter for exporter in (KTRANSFORMERS, LLAMACPP, PLANES_MANIFEST)
}
"""Name on the command line to exporter of device plans."""


def export_device_plan(plan: DevicePlan, planes: PlaneIndex | None, to: str, path: Path) -> tuple[str, tuple[str, ...]]:
    """Writes a device plan for `to`; returns the flags that use the file, and warnings of what it cannot say.

    The file is read back and compared before it takes its name. `planes` is needed for "planes" and checked where
    given. Raises UsageError (unknown exporter, wrong suffix, planes missing), MismatchError (planes of another plan),
    DependencyError (torch for .pt), InputFileError.
    """
    if to not in DEVICE_EXPORTERS:
        raise UsageError(f"no exporter for {to!r}; placer exports device plans to {', '.join(DEVICE_EXPORTERS)}")
    path = Path(path)
    exporter = DEVICE_EXPORTERS[to]
    exporter.write(plan, planes, path)
    return exporter.launch(plan, path), exporter.warnings(plan)
