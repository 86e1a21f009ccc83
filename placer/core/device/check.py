"""Is this device plan legal for these planes, this machine and this work? Shares no code with any solver.

Legend: L routing sites, E experts, K planes.
"""

import numpy as np
import numpy.typing as npt

from placer.core.check import Violation
from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import DeviceWork

__all__ = ["check_device_plan"]

IntArray = npt.NDArray[np.int64]
MIB = 2**20
TOLERANCE = 1e-6


def check_device_plan(
    plan: DevicePlan,
    *,
    index: PlaneIndex | None = None,
    device: DeviceSpec | None = None,
    work: DeviceWork | None = None,
) -> list[Violation]:
    """Every rule that `plan` breaks, in reading order; empty means legal.

    Codes: levels, waste, budget, buffer, cache, bound; against the planes: model, layers, experts, ladder, plane-bytes,
    planes-hash; against the machine: memory; against the work: work. `work` is what the plan is to replay: without it a
    plan may not use a cache that must know the future.
    """
    found = _check_levels(plan)
    if not found:
        found += _check_bytes(plan)
    found += _check_cache(plan, work)
    objective = np.inf if plan.objective is None else plan.objective
    if plan.bound is not None and plan.bound > objective + TOLERANCE * abs(objective):
        message = f"{plan.bound:g} is above the objective {objective:g}; a bound is never above it"
        found.append(Violation("bound", "plan.bound", message))
    if index is not None:
        found += _check_planes(plan, index)
    if device is not None and plan.memory_bytes > device.memory_bytes:
        message = f"{_size(plan.memory_bytes)}; {device.name!r} has {_size(device.memory_bytes)}: plan for its memory"
        found.append(Violation("memory", "plan.memory_bytes", message))
    if work is not None:
        shape = (*plan.ceiling_LE.shape, plan.ladder.levels)
        if work.count_BLEK.shape[1:] != shape:
            message = f"{shape} (sites, experts, levels), the work has {work.count_BLEK.shape[1:]}; plan for this trace"
            found.append(Violation("work", "plan", message))
    return found


def _check_levels(plan: DevicePlan) -> list[Violation]:
    found = []
    for name, least in (("resident_LE", 0), ("ceiling_LE", 1)):
        table: IntArray = getattr(plan, name)
        wrong = np.argwhere((table < least) | (table > plan.ladder.levels))
        if len(wrong):
            site, expert = wrong[0].tolist()
            message = f"level {table[site, expert]} ({len(wrong)} such); the ladder has {least} to {plan.ladder.levels}"
            found.append(Violation("levels", f"plan.{name}, {_where(plan, site, expert)}", message))
    if found:
        return found
    above = np.argwhere(plan.resident_LE > plan.ceiling_LE)
    if len(above):
        site, expert = above[0].tolist()
        message = (
            f"level {plan.resident_LE[site, expert]} is resident and the ceiling is {plan.ceiling_LE[site, expert]} "
            f"({len(above)} such): planes above a ceiling are never used, keep fewer"
        )
        found.append(Violation("waste", _where(plan, site, expert), message))
    return found


def _check_bytes(plan: DevicePlan) -> list[Violation]:
    found = []
    needed = plan.resident_bytes + plan.cache_bytes + plan.buffer_bytes
    if needed > plan.memory_bytes:
        message = (
            f"resident planes {plan.resident_bytes}, cache {plan.cache_bytes} and buffer {plan.buffer_bytes} are "
            f"{needed} bytes; the budget is {plan.memory_bytes}"
        )
        found.append(Violation("budget", "plan.memory_bytes", message))
    missing_LE = _missing_bytes_LE(plan)
    if missing_LE.size and int(missing_LE.max()) > plan.buffer_bytes:
        site, expert = np.unravel_index(int(missing_LE.argmax()), missing_LE.shape)
        message = (
            f"{plan.buffer_bytes} bytes; {_where(plan, int(site), int(expert))} needs {missing_LE.max()} at its "
            "ceiling: give the buffer that much, or keep more of it resident"
        )
        found.append(Violation("buffer", "plan.buffer_bytes", message))
    return found


def _missing_bytes_LE(plan: DevicePlan) -> IntArray:
    """The most that one use of each expert may have to load, (L, E)."""
    bytes_K = plan.plane_bytes_K
    missing_LE = np.zeros(plan.ceiling_LE.shape, dtype=np.int64)
    for (site, expert), ceiling in np.ndenumerate(plan.ceiling_LE):
        resident = int(plan.resident_LE[site, expert])
        if plan.ladder.nested:
            missing_LE[site, expert] = sum(bytes_K[resident:ceiling])
        else:
            # tokens at different levels of one iteration need a copy each
            missing_LE[site, expert] = sum(bytes_K[plane] for plane in range(ceiling) if plane != resident - 1)
    return missing_LE


def _check_cache(plan: DevicePlan, work: DeviceWork | None) -> list[Violation]:
    found = []
    if plan.cache == "none" and plan.cache_bytes:
        message = f"{plan.cache_bytes} bytes for a cache that keeps nothing; use 0, or name a policy"
        found.append(Violation("cache", "plan.cache_bytes", message))
    if plan.cache != "none" and plan.cache_bytes < min(plan.plane_bytes_K):
        message = f"{plan.cache_bytes} bytes do not hold one plane; give cache {plan.cache!r} more, or use none"
        found.append(Violation("cache", "plan.cache_bytes", message))
    if plan.cache == "belady" and work is None:
        message = "belady has to know the future, so only a replay of a trace can use it; use lru or lfu"
        found.append(Violation("cache", "plan.cache", message))
    return found


def _check_planes(plan: DevicePlan, index: PlaneIndex) -> list[Violation]:
    found = []
    for code, name, here, there in (
        ("model", "model", plan.model, index.model),
        ("layers", "moe_layers", tuple(plan.moe_layers), tuple(index.moe_layers)),
        ("layers", "num_hidden_layers", plan.num_hidden_layers, index.num_hidden_layers),
        ("experts", "num_experts", plan.num_experts, index.num_experts),
        ("ladder", "ladder", plan.ladder.to_dict(), index.ladder.to_dict()),
        ("plane-bytes", "plane_bytes_K", tuple(plan.plane_bytes_K), tuple(index.plane_bytes_K)),
    ):
        if here != there:
            message = f"{here!r}; the planes in {index.path.name} have {there!r}: plan for these planes"
            found.append(Violation(code, f"plan.{name}", message))
    known = plan.hashes.get("planes")
    if known is not None and known != index.sha256:
        message = f"{known[:12]}; {index.path.name} has {index.sha256[:12]}: these are not the planes it was made for"
        found.append(Violation("planes-hash", "plan.hashes", message))
    return found


def _where(plan: DevicePlan, site: int, expert: int) -> str:
    return f"layer {plan.moe_layers[site]} expert {expert}"


def _size(count: int) -> str:
    return f"{count / MIB:.1f} MiB ({count} bytes)"
