"""The Timelines: predicted by the simulator, measured on real ranks, or both for the very same job."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np

from placer.config.settings import RunSettings
from placer.core.check import assert_runnable
from placer.core.cluster import ClusterSpec
from placer.core.errors import UsageError
from placer.core.plan import Plan
from placer.core.timeline import Timeline
from placer.pipeline.sources import Progress, sources_of, warn_mismatch
from traces.trace import RoutingTrace

__all__ = ["measure", "predict"]


def predict(
    plan: Plan,
    trace: RoutingTrace,
    cluster: ClusterSpec,
    *,
    fidelity: str = "phase",
    mode: str | None = None,
    batch_tokens: int = 2048,
    iterations: int | None = None,
    progress: Progress | None = None,
) -> tuple[Timeline, list[str]]:
    """The simulated Timeline of `trace` under `plan`, and warnings.

    Raises ViolationError for a plan that cannot be run, MismatchError for one of another shape, UsageError.
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
        trace_sha256=trace.sha256,
        progress=progress,
    )
    return timeline, warnings


def measure(
    plan: Plan,
    trace: RoutingTrace,
    *,
    checkpoint: Path | None = None,
    ranks: int | None = None,
    mode: str | None = None,
    settings: RunSettings | None = None,
    cluster: ClusterSpec | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[Timeline], list[str]]:
    """The measured Timeline of `plan` on this machine's ranks and, given a cluster, the prediction of the same job.

    Raises DependencyError without torch, ExecutionError for a rank that failed, MismatchError for other ranks.
    """
    from placer.execute.measure import replay, replayed_model

    settings = settings or RunSettings()
    assert_runnable(plan)
    if cluster is not None:
        warn_mismatch(plan, trace.model, cluster)
    used = settings.iterations * settings.tokens_per_iteration
    if used > trace.num_tokens:
        raise UsageError(
            f"the trace has {trace.num_tokens} tokens; run.iterations x run.tokens_per_iteration is {used}; lower them"
        )
    source_T = sources_of(trace, plan.num_ranks)
    measured = replay(
        plan,
        trace.expert_LTK,
        trace.weight_LTK,
        model=trace.model,
        mode=mode,  # type: ignore[arg-type]  # ReplayJob refuses unknown names
        source_T=source_T,
        experts_path=checkpoint,
        tokens_per_iteration=settings.tokens_per_iteration,
        iterations=settings.iterations,
        warmup=settings.warmup,
        dtype=settings.dtype,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.moe_intermediate_size,
        num_ranks=ranks,
        timeout_s=settings.timeout_s,
        trace_sha256=trace.sha256,
        progress=progress,
    )
    timelines, names = [measured], ["measured"]
    if cluster is not None:
        model = replayed_model(trace.model, measured.about)
        part = replace(trace.select_tokens(slice(0, used)), source_rank_T=source_T[:used].astype(np.int32))
        same = replace(part, model=model, checked=True, known_sha256=trace.sha256)
        predicted, _ = predict(plan, same, cluster, mode=mode, batch_tokens=settings.tokens_per_iteration)
        timelines.append(predicted)
        names.append("predicted")
    return timelines, names
