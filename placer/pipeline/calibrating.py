"""Calibration: this machine's ranks, or a lab's, measured into a cluster that predictions can be compared on."""

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from placer.config.settings import CalibrateSettings, RunSettings
from placer.core.errors import UsageError

if TYPE_CHECKING:
    from placer.execute.calibrate import Calibration

__all__ = ["calibrate_cluster"]


def calibrate_cluster(
    *,
    ranks: int | None = None,
    lab: str | None = None,
    settings: CalibrateSettings | None = None,
    run: RunSettings | None = None,
    progress: Callable[[str], None] | None = None,
) -> "Calibration":
    """The measured cluster of `ranks` ranks of this machine, or of the lab described by `lab` (which needs root).

    Shapes that `settings` leaves open are those of `run`, so that a run with the same settings file is predicted.
    Raises UsageError unless exactly one of the two is given, ExecutionError where a fit is none.
    """
    from placer.execute.calibrate import CalibrationJob, calibrate
    from placer.execute.lab import Lab, LabSpec

    settings, run = settings or CalibrateSettings(), run or RunSettings()
    if (ranks is None) == (lab is None):
        raise UsageError("give either --ranks N (this machine) or --lab SHAPE (a shaped cluster on it)")
    spec = None if lab is None else LabSpec.parse(lab)
    nodes, per_node = (1, ranks or 0) if spec is None else (spec.nodes, spec.ranks_per_node)
    job = CalibrationJob(
        nodes=nodes,
        ranks_per_node=per_node,
        hidden_size=settings.hidden_size or run.hidden_size,
        moe_intermediate_size=settings.moe_intermediate_size or run.moe_intermediate_size,
        dtype=settings.dtype or run.dtype,
        message_bytes=settings.message_bytes,
        rows=settings.rows,
        experts_per_rank=settings.experts_per_rank,
        tokens_per_rank=max(4, run.tokens_per_iteration // max(1, nodes * per_node)),
        top_k=settings.top_k,
        repetitions=settings.repetitions,
        realtime=settings.realtime,
    )
    options = {"launches": settings.launches, "timeout_s": run.timeout_s, "progress": progress}
    if spec is None:
        return calibrate(job, name=f"calibrated-{ranks}", **options)  # type: ignore[arg-type]
    name = f"calibrated-{spec}"
    with Lab.open(spec) as opened:
        if spec.mbit is None:
            return calibrate(job, name=name, hosts=opened.hosts, **options)  # type: ignore[arg-type]
        with Lab.open(replace(spec, mbit=None)) as plain:
            return calibrate(job, name=name, hosts=opened.hosts, unshaped=plain.hosts, **options)  # type: ignore[arg-type]
