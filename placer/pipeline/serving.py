"""A serving run of a plan: settings become a workload, pools, a placement policy and a solver for every window."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from placer.config.clusters import load_cluster
from placer.config.serving import ServeSettings
from placer.config.settings import SolveSettings
from placer.core.check import assert_runnable
from placer.core.cluster import ClusterSpec
from placer.core.errors import InfeasibleError, UsageError
from placer.core.homes import request_touch
from placer.core.model import ModelSpec
from placer.core.modes import DISPATCH_MODES, DispatchMode
from placer.core.plan import Plan
from placer.pipeline.planning import solve
from placer.pipeline.sources import warn_mismatch
from sim.serving import (
    HandoffSpec,
    PlanPricer,
    Policy,
    PoolSpec,
    Streams,
    Window,
    Workload,
    by_affinity,
    least_loaded,
    make_workload,
    read_workload,
    report,
    round_robin,
)
from sim.serving import serve as serve_workload
from solvers.registry import SOLVERS
from traces.ids import convert_ids, id_dtype
from traces.trace import RoutingTrace

__all__ = ["serve"]

PREFILL = 0


def serve(
    plan: Plan,
    trace: RoutingTrace,
    cluster: ClusterSpec,
    settings: ServeSettings,
    *,
    mode: DispatchMode | None = None,
    folder: Path = Path(),
    note: Callable[[str], None] | None = None,
) -> tuple[dict[str, Any], list[str]]:
    """The report (sim.serving.report, plain JSON types) of serving requests routed like `trace`, and warnings.

    Files that the settings name are looked for in `folder`. `note` is told of every plan that rebalancing adopts.
    Raises ViolationError, MismatchError, UsageError, InputFileError.
    """
    if mode is not None and mode not in DISPATCH_MODES:
        raise UsageError(f"mode is {mode!r}; use one of {', '.join(DISPATCH_MODES)}")
    warnings = warn_mismatch(plan, trace.model, cluster)
    assert_runnable(plan)
    workload_rng, stream_rng = np.random.default_rng(settings.seed).spawn(2)
    workload = _workload(settings, folder, workload_rng)
    streams = Streams.of(trace.request_id_T, trace.phase_T)
    stream_Q = np.arange(len(workload)) % streams.num_requests
    if settings.routing == "random":
        stream_Q = stream_rng.integers(0, streams.num_requests, len(workload))
    pools: tuple[PoolSpec, ...] = (_pool(plan, trace, cluster, settings, mode, note),)
    handoff = None
    if (apart := settings.disaggregated) is not None:
        first_plan = plan if apart.prefill_plan is None else Plan.load(folder / apart.prefill_plan)
        first_cluster = cluster if apart.prefill_cluster is None else load_cluster(apart.prefill_cluster)
        warnings += [f"prefill pool: {text}" for text in warn_mismatch(first_plan, trace.model, first_cluster)]
        assert_runnable(first_plan)
        pools = (_pool(first_plan, trace, first_cluster, settings, mode, note), *pools)
        handoff = HandoffSpec(link=cluster.inter, kv_bytes_per_token=apart.kv_bytes_per_token)
    served = serve_workload(workload, streams, pools, handoff=handoff, stream_Q=stream_Q)
    result = report(served, settings.slo)
    about = {
        "model": trace.model.name,
        "cluster": cluster.name,
        "mode": plan.mode if mode is None else mode,
        "plan_sha256": plan.sha256,
        "trace_sha256": trace.sha256,
        "seed": settings.seed,
        "placement": settings.placement,
        "routing": settings.routing,
    }
    if served.message:
        warnings.append(served.message)
    if served.refused:
        warnings.append(
            f"{len(served.refused)} requests are longer than a rank's {settings.limits.blocks_per_rank} KV blocks of "
            f"{settings.limits.block_tokens} tokens and were refused"
        )
    return {"format": "placer-serving", "version": 1, "about": about, **result}, warnings


def _workload(settings: ServeSettings, folder: Path, rng: np.random.Generator) -> Workload:
    if settings.requests is not None:
        return read_workload(folder / settings.requests, settings.arrivals.requests)
    return make_workload(settings.arrivals, settings.limits.horizon_s, rng)


def _pool(
    plan: Plan,
    trace: RoutingTrace,
    cluster: ClusterSpec,
    settings: ServeSettings,
    mode: DispatchMode | None,
    note: Callable[[str], None] | None,
) -> PoolSpec:
    wanted = settings.rebalance.solver
    if wanted is not None and wanted != "auto" and wanted not in SOLVERS:
        raise UsageError(f"rebalance.solver is {wanted!r}; use auto or one of {', '.join(sorted(SOLVERS))}")
    return PoolSpec(
        pricer=PlanPricer(plan, trace.model, cluster, trace.expert_LTK, mode),
        ranks=plan.num_ranks,
        policy=_policy(plan, trace, settings),
        limits=settings.limits,
        rebalancing=settings.rebalance.rebalancing(),
        solver=None if wanted is None else _solver(wanted, trace.model, cluster, settings, note),
    )


def _policy(plan: Plan, trace: RoutingTrace, settings: ServeSettings) -> Policy:
    if settings.placement == "round_robin":
        return round_robin()
    if settings.placement == "least_loaded":
        return least_loaded()
    # what a router may know when a request comes: the routing of its prompt
    known_T = np.ones(trace.num_tokens, dtype=bool) if trace.phase_T is None else trace.phase_T == PREFILL
    index_T = np.unique(trace.request_id_T, return_inverse=True)[1].reshape(-1)
    touch_LQR = request_touch(plan, trace.expert_LTK[:, known_T], index_T[known_T], int(index_T.max()) + 1)
    return by_affinity(touch_LQR.sum(axis=0), settings.affinity_slack)


def _solver(
    name: str,
    model: ModelSpec,
    cluster: ClusterSpec,
    settings: ServeSettings,
    note: Callable[[str], None] | None,
) -> Callable[[Window], Plan | None]:
    """A solver that plans on the window's sample, starting from the plan that runs; keeps that where none is legal."""

    def ask(window: Window) -> Plan | None:
        plan = window.plan
        sample = RoutingTrace(
            model=model,
            expert_LTK=convert_ids(window.expert_LHK, id_dtype(model.num_ids)),
            request_id_T=window.request_H.astype(np.int32),
            source_rank_T=window.source_H.astype(np.int32),
        )
        try:
            solved = solve(
                sample,
                cluster,
                mode=plan.mode,
                redundant=plan.num_slots - plan.num_experts,
                solver=name,
                time_limit_s=settings.rebalance.solver_time_s,
                seed=settings.seed,
                current=plan,
                solve_settings=SolveSettings(replica_choice=plan.replica_choice),
            )
        except InfeasibleError as error:
            if note is not None:
                note(f"{window.pool} pool at {window.end_ns / 1e9:.3f} s: plan kept ({error})")
            return None
        if not solved.moved_experts:
            return None
        if note is not None:
            note(f"{window.pool} pool at {window.end_ns / 1e9:.3f} s: {solved.moved_experts} experts move")
        return solved.plan

    return ask
