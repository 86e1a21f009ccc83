"""From a device plan and a device's work to a predicted Timeline.

Legend: B iterations, L routing sites, E experts, K levels of the ladder.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal, get_args

from placer.core.device.plan import DevicePlan
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import DeviceWork
from placer.core.errors import InfeasibleError, MismatchError, UsageError
from placer.core.timeline import Timeline
from sim.device.port import port_rows
from sim.device.rows import Rows
from sim.device.sites import Sites

__all__ = ["DEVICE_FIDELITIES", "DeviceFidelity", "device_rows", "simulate_device"]

DeviceFidelity = Literal["port", "flow"]
"""port: every site is a flow shop of its own, nothing is read ahead. flow: disk, copy engine and processor run on their
own, planes of the next site are read ahead. Equal to the nanosecond where nothing is read ahead."""

DEVICE_FIDELITIES: tuple[DeviceFidelity, ...] = get_args(DeviceFidelity)


def simulate_device(
    plan: DevicePlan,
    work: DeviceWork,
    device: DeviceSpec,
    *,
    fidelity: DeviceFidelity = "flow",
    iterations: int | None = None,
    trace_sha256: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> Timeline:
    """The Timeline of the first `iterations` (None: all) of `work` under `plan`; resident planes are there at 0.

    Demand is clipped to the plan's ceilings first. The processor runs `device.compute.io_slowdown` times slower while a
    plane is read, for just that part of a span. Planes are read ahead where the plan says so and the work predicts; a
    read ahead that nobody needs is finished, and counts to the iteration in which it ends.

    `about` counts planes: `cache_hits`, `demand_reads`, `prefetched` (to be read ahead), `prefetch_used` (of those),
    `lost_from_cache` (kept by the policy, but a read needed the room before the cache had it); and bytes:
    `peak_plane_bytes`, resident planes included, `ahead_bytes` that were read ahead, `wasted_bytes` of those that
    nobody needed. `progress(done, of)` is called after every iteration.

    Raises UsageError for a value that makes no sense, MismatchError where plan and work disagree, InfeasibleError where
    the plan needs more memory than it or the device allows, or an expert does not fit the buffer.
    """
    rows, about = device_rows(plan, work, device, fidelity=fidelity, iterations=iterations, progress=progress)
    return rows.timeline({**about, "trace_sha256": trace_sha256})


def device_rows(
    plan: DevicePlan,
    work: DeviceWork,
    device: DeviceSpec,
    *,
    fidelity: DeviceFidelity = "flow",
    iterations: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[Rows, dict[str, Any]]:
    """What `simulate_device` makes its Timeline of: spans with the planes that they are about, and `about`."""
    work = _checked(plan, work, device, fidelity, iterations).clipped(plan.ceiling_LE)
    sites = Sites(plan, device, work)
    ahead_bytes = 0
    if fidelity == "port":
        rows = port_rows(plan, work, device, sites, progress)
    else:
        from sim.device.flow import flow_rows  # SimPy takes longer to import than fidelity port to run

        rows, ahead_bytes = flow_rows(plan, work, device, sites, progress)
    tokens_B = work.tokens_B.tolist()
    return rows, {
        "source": "simulated",
        "fidelity": fidelity,
        "mode": "device",
        "num_ranks": 1,
        "ranks_per_node": 1,
        "model": plan.model,
        "device": device.name,
        "order": plan.order,
        "cache": plan.cache,
        "prefetch_layers": plan.prefetch_layers,
        "plan_sha256": plan.sha256,
        "device_sha256": device.sha256,
        "batch": max(tokens_B),
        "tokens_per_iteration": max(tokens_B),
        "tokens_by_iteration": tokens_B,
        "memory_bytes": plan.memory_bytes,
        "resident_bytes": plan.resident_bytes,
        "cache_bytes": plan.cache_bytes,
        "buffer_bytes": plan.buffer_bytes,
        "peak_plane_bytes": plan.resident_bytes + sites.memory.peak_bytes(),
        "cache_hits": sites.cache_hits,
        "demand_reads": sites.demand_reads,
        "prefetched": sites.prefetched,
        "prefetch_used": sites.prefetch_used,
        "lost_from_cache": sites.memory.lost,
        "ahead_bytes": ahead_bytes,
        "wasted_bytes": ahead_bytes - sites.used_ahead_bytes,
    }


def _checked(
    plan: DevicePlan, work: DeviceWork, device: DeviceSpec, fidelity: str, iterations: int | None
) -> DeviceWork:
    """The iterations of `work` to simulate, once everything is known to fit together."""
    if fidelity not in DEVICE_FIDELITIES:
        raise UsageError(f"fidelity is {fidelity!r}; use one of {', '.join(DEVICE_FIDELITIES)}")
    if fidelity == "port" and plan.prefetch_layers and work.predicted_BLEK is not None:
        raise UsageError("fidelity 'port' knows no reading ahead and the plan prefetches; use flow")
    if work.count_BLEK.shape[1:] != plan.present_LEK.shape:
        raise MismatchError(
            f"the work is for {work.count_BLEK.shape[1:]} (sites, experts, levels), the plan for "
            f"{plan.present_LEK.shape}; use the work of the model that was planned for"
        )
    count = work.num_iterations if iterations is None else iterations
    if not 1 <= count <= work.num_iterations:
        raise UsageError(f"iterations is {count}; the work has {work.num_iterations}, give 1 or more of them")
    needed = plan.resident_bytes + plan.cache_bytes + plan.buffer_bytes
    for name, budget in (("the plan's memory_bytes", plan.memory_bytes), ("the device", device.memory_bytes)):
        if needed > budget:
            raise InfeasibleError(
                f"resident planes, cache and buffer need {needed} bytes and {name} allows {budget}; plan for that "
                "budget"
            )
    predicted = work.predicted_BLEK
    return replace(
        work,
        tokens_B=work.tokens_B[:count],
        count_BLEK=work.count_BLEK[:count],
        predicted_BLEK=None if predicted is None else predicted[:count],
    )
