"""From a plan and routed tokens to a predicted Timeline.

Legend: L routing sites, T tokens, K top-k, W windows (one window is one iteration).
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from placer.core.cluster import ClusterSpec
from placer.core.errors import MismatchError, UsageError
from placer.core.evaluate import window_index
from placer.core.model import ModelSpec
from placer.core.modes import DISPATCH_MODES, DispatchMode
from placer.core.plan import Plan
from placer.core.schedule import Schedule
from placer.core.timeline import Timeline
from sim.port import port_times
from sim.stages import stages_of, timeline_of
from sim.traffic import work_of

__all__ = ["FIDELITIES", "Fidelity", "simulate"]

Fidelity = Literal["port", "phase", "flow"]
"""port: every phase lasts as long as its slowest port (the closed form). phase: ranks run on without barriers.
flow: and every message is a flow that shares links max-min fairly."""

FIDELITIES: tuple[Fidelity, ...] = get_args(Fidelity)


def simulate(
    plan: Plan,
    model: ModelSpec,
    cluster: ClusterSpec,
    expert_LTK: npt.NDArray[np.integer],
    source_T: npt.NDArray[np.integer],
    *,
    fidelity: Fidelity = "phase",
    mode: DispatchMode | None = None,
    batch_tokens: int = 2048,
    iterations: int | None = None,
    schedule: Schedule | None = None,
    metadata_bytes: int = 0,
    trace_sha256: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Timeline:
    """The Timeline of serving `expert_LTK` in order, `batch_tokens` an iteration, under `plan` on `cluster`.

    `source_T` is the rank each token's attention runs on, `mode` the dispatch mode (None: the plan's), `iterations`
    how many to simulate from the first on (None: all). `schedule` says how the all-to-alls run (None: linear, nothing
    pipelined; a plan's own is `plan.schedule(kind)`), `metadata_bytes` what travels beside each dispatched copy.
    Windows are cut as `placer.core.evaluate` cuts them, so that the mean of `iteration_ns()` at fidelity `port` is
    `evaluate(...).iteration_us` where there is no schedule. `progress(done, of)` is called as layers are replayed and
    again as iterations are simulated.
    Raises UsageError for a value that makes no sense, MismatchError where plan, model, cluster and tokens disagree.
    """
    mode = plan.mode if mode is None else mode
    if mode not in DISPATCH_MODES:
        raise UsageError(f"mode is {mode!r}; use one of {', '.join(DISPATCH_MODES)}")
    if fidelity not in FIDELITIES:
        raise UsageError(f"fidelity is {fidelity!r}; use one of {', '.join(FIDELITIES)}")
    for name, value in (("batch_tokens", batch_tokens), ("iterations", iterations)):
        if value is not None and value < 1:
            raise UsageError(f"{name} is {value}; give 1 or more")
    source_T = _checked_source(plan, model, cluster, expert_LTK, source_T)
    window_T, windows = window_index(expert_LTK.shape[1], batch_tokens)
    if iterations is not None and iterations < windows:
        windows = iterations
        kept = int(np.searchsorted(window_T, windows))
        expert_LTK, source_T, window_T = expert_LTK[:, :kept], source_T[:kept], window_T[:kept]
    # Round-robin replica choice counts earlier tokens only, so cutting the tail changes no assignment.
    work = work_of(
        plan,
        model,
        cluster,
        mode,
        expert_LTK,
        source_T,
        window_T,
        windows,
        progress,
        schedule=schedule,
        metadata_bytes=metadata_bytes,
    )
    stages = stages_of(work)
    if fidelity == "port":
        times = port_times(work, stages)
    elif fidelity == "flow":
        from sim.flow import flow_times

        times = flow_times(work, stages, progress)
    else:
        from sim.phase import phase_times  # numba and SimPy take longer to import than fidelity port to run

        times = phase_times(work, stages, progress)
    about: dict[str, Any] = {
        "source": "simulated",
        "fidelity": fidelity,
        "mode": mode,
        "num_ranks": cluster.num_ranks,
        "ranks_per_node": cluster.ranks_per_node,
        "plan_sha256": plan.sha256,
        "trace_sha256": trace_sha256,
        "tokens_per_iteration": min(batch_tokens, expert_LTK.shape[1]),
        "model": model.name,
        "cluster": cluster.name,
    }
    return timeline_of(work, stages, times, about)


def _checked_source(
    plan: Plan,
    model: ModelSpec,
    cluster: ClusterSpec,
    expert_LTK: npt.NDArray[np.integer],
    source_T: npt.NDArray[np.integer],
) -> npt.NDArray[np.int64]:
    """`source_T` as int64 once everything is known to fit together."""
    if expert_LTK.ndim != 3:
        raise UsageError(f"expert_LTK has {expert_LTK.ndim} axes; it needs (layers, tokens, top-k)")
    layers, tokens, _ = expert_LTK.shape
    if layers != plan.slot_expert_LP.shape[0]:
        raise MismatchError(
            f"the trace has {layers} MoE layers, the plan {plan.slot_expert_LP.shape[0]}; "
            "use the trace that the plan was solved for, or solve again"
        )
    if (plan.num_ranks, plan.ranks_per_node) != (cluster.num_ranks, cluster.ranks_per_node):
        raise MismatchError(
            f"the plan is for {plan.num_ranks} ranks, {plan.ranks_per_node} a node; cluster {cluster.name!r} has "
            f"{cluster.num_ranks}, {cluster.ranks_per_node} a node; use the plan's cluster or solve again"
        )
    if plan.num_experts != model.num_experts:
        raise MismatchError(
            f"the plan places {plan.num_experts} experts, model {model.name!r} has {model.num_experts}; "
            "use the model that the plan was solved for"
        )
    if tokens == 0:
        raise UsageError("the trace has 0 tokens; give at least one to simulate")
    if source_T.shape != (tokens,):
        raise MismatchError(f"source_T has shape {source_T.shape}; the trace has {tokens} tokens, one rank for each")
    if int(source_T.min()) < 0 or int(source_T.max()) >= cluster.num_ranks:
        raise UsageError(
            f"source_T has ranks {source_T.min()} to {source_T.max()}; the cluster has 0 to {cluster.num_ranks - 1}"
        )
    return source_T.astype(np.int64)
