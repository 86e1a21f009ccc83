"""Plans in the files that serving engines read: one module per engine, each plan checked before and after writing."""

from pathlib import Path

from placer.core.errors import UsageError
from placer.core.model import ModelSpec
from placer.core.plan import Plan
from placer.export.ascend import ASCEND
from placer.export.eplb import EPLB
from placer.export.exporter import Exporter
from placer.export.legal import assert_exportable, export_violations
from placer.export.sglang import SGLANG
from placer.export.trtllm import TRTLLM
from placer.export.vllm import VLLM, VLLM_EXPERT_MAP, VLLM_INITIAL_MAPPING, VLLM_PLACEMENT_FILE

__all__ = ["EXPORTERS", "Exporter", "assert_exportable", "export_plan", "export_violations"]

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
