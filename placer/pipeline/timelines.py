"""The Timelines: predicted by the simulator, measured on real ranks, or both for the very same job."""

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from placer.config.settings import RunSettings
from placer.core.check import assert_runnable
from placer.core.cluster import ClusterSpec
from placer.core.errors import MismatchError, UsageError
from placer.core.plan import Plan
from placer.core.schedule import KINDS, Kind, Schedule
from placer.core.timeline import Timeline
from placer.pipeline.sources import Progress, sources_of, warn_mismatch
from traces.trace import RoutingTrace

if TYPE_CHECKING:
    from placer.execute.lab import LabSpec

__all__ = ["Measured", "lab_of", "measure", "predict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """Timelines by name: "measured", "predicted" where a cluster was given, and both again for the baseline."""

    timelines: dict[str, Timeline]
    warnings: tuple[str, ...]


def predict(
    plan: Plan,
    trace: RoutingTrace,
    cluster: ClusterSpec,
    *,
    fidelity: str = "phase",
    mode: str | None = None,
    kind: str = "prefill",
    batch_tokens: int = 2048,
    iterations: int | None = None,
    metadata_bytes: int = 0,
    progress: Progress | None = None,
) -> tuple[Timeline, list[str]]:
    """The simulated Timeline of `trace` under `plan` and its schedule for iterations of `kind`, and warnings.

    `metadata_bytes` travel beside each dispatched copy. Raises ViolationError for a plan that cannot be run,
    MismatchError for one of another shape, UsageError.
    """
    from sim import simulate

    warnings = warn_mismatch(plan, trace.model, cluster)
    assert_runnable(plan)
    timeline = simulate(
        plan,
        trace.model,
        cluster,
        trace.expert_LTK,
        sources_of(trace, cluster.num_ranks),
        fidelity=fidelity,  # type: ignore[arg-type]  # simulate refuses unknown names
        mode=mode,  # type: ignore[arg-type]
        batch_tokens=batch_tokens,
        iterations=iterations,
        schedule=_schedule(plan, kind, mode, warnings),
        metadata_bytes=metadata_bytes,
        trace_sha256=trace.sha256,
        progress=progress,
    )
    return timeline, warnings


def measure(
    plan: Plan,
    trace: RoutingTrace,
    *,
    baseline: Plan | None = None,
    checkpoint: Path | None = None,
    ranks: int | None = None,
    mode: str | None = None,
    kind: str = "prefill",
    settings: RunSettings | None = None,
    cluster: ClusterSpec | None = None,
    fidelity: str = "phase",
    lab: str | None = None,
    progress: Callable[[str], None] | None = None,
) -> Measured:
    """The measured Timeline of `plan` on this machine's ranks and, given a cluster, the prediction of the same job.

    baseline   another plan, measured in the same launches under its own mode, iteration by iteration in random order
    lab        shape of a cluster of namespaces to run in, such as 2x2@200mbit (needs root)
    Raises DependencyError without torch, ExecutionError for a rank that failed, MismatchError for other ranks.
    """
    from placer.execute.lab import Lab
    from placer.execute.measure import replay_plans, replayed_model

    settings, spec, kind = settings or RunSettings(), lab_of(plan, lab), _kind(kind)
    plans = {"": plan} if baseline is None else {"": plan, "baseline ": baseline}
    warnings: list[str] = []
    for one in plans.values():
        assert_runnable(one)
        warnings += [] if cluster is None else warn_mismatch(one, trace.model, cluster)
    used = settings.iterations * settings.tokens_per_iteration
    if used > trace.num_tokens:
        raise UsageError(
            f"the trace has {trace.num_tokens} tokens; run.iterations x run.tokens_per_iteration is {used}; lower them"
        )
    # the baseline keeps its own mode: what it would be without this plan
    modes = [mode] + [None] * (len(plans) - 1)
    source_T = sources_of(trace, plan.num_ranks)
    with nullcontext() if spec is None else Lab.open(spec) as opened:
        measured = replay_plans(
            list(plans.values()),
            trace.expert_LTK,
            trace.weight_LTK,
            model=trace.model,
            modes=modes,  # type: ignore[arg-type]  # ReplayJob refuses unknown names
            schedules=[_schedule(one, kind, how, warnings) for one, how in zip(plans.values(), modes, strict=True)],
            kind=kind,
            source_T=source_T,
            experts_path=checkpoint,
            tokens_per_iteration=settings.tokens_per_iteration,
            iterations=settings.iterations,
            warmup=settings.warmup,
            launches=settings.launches,
            realtime=settings.realtime,
            dtype=settings.dtype,
            hidden_size=settings.hidden_size,
            intermediate_size=settings.moe_intermediate_size,
            num_ranks=ranks,
            timeout_s=settings.timeout_s,
            trace_sha256=trace.sha256,
            hosts=() if opened is None else opened.hosts,
            progress=progress,
        )
    timelines = {}
    for (name, one), how, seen in zip(plans.items(), modes, measured, strict=True):
        timelines[f"{name}measured"] = seen
        if cluster is not None:
            part = replace(trace.select_tokens(slice(0, used)), source_rank_T=source_T[:used].astype(np.int32))
            model = replayed_model(trace.model, seen.about)
            same = replace(part, model=model, checked=True, known_sha256=trace.sha256)
            timelines[f"{name}predicted"], _ = predict(
                one,
                same,
                cluster,
                fidelity=fidelity,
                mode=how,
                kind=kind,
                batch_tokens=settings.tokens_per_iteration,
                metadata_bytes=seen.about["metadata_bytes_per_copy"],
            )
    return Measured(timelines=timelines, warnings=tuple(dict.fromkeys(warnings)))


def lab_of(plan: Plan, lab: str | None) -> "LabSpec | None":
    """The lab described by `lab`, None where there is none. Raises UsageError, MismatchError for another shape."""
    from placer.execute.lab import LabSpec

    spec = None if lab is None else LabSpec.parse(lab)
    if spec is not None and (spec.num_ranks, spec.ranks_per_node) != (plan.num_ranks, plan.ranks_per_node):
        raise MismatchError(
            f"the lab {lab} has {spec.num_ranks} ranks, {spec.ranks_per_node} a node; the plan is for "
            f"{plan.num_ranks}, {plan.ranks_per_node} a node; give a lab of the plan's shape"
        )
    return spec


def _schedule(plan: Plan, kind: str, mode: str | None, warnings: list[str]) -> Schedule | None:
    """The plan's own schedule, which holds for its own mode only."""
    kind_ = _kind(kind)
    if mode is None or mode == plan.mode:
        return plan.schedule(kind_)
    if plan.prefill is not None or plan.decode is not None:
        warnings.append(f"the plan's schedule is for mode {plan.mode}; under {mode} every all-to-all is linear")
    return Schedule.uniform(len(plan.slot_expert_LP))


def _kind(kind: str) -> Kind:
    for known in KINDS:
        if kind == known:
            return known
    raise UsageError(f"kind is {kind!r}; use one of {', '.join(KINDS)}")
