"""From demand, a machine and sizes to a device plan: resident planes, ceilings, buffer, cache and order under a budget.

The planner is placer's own. D2MoE plans no bit-widths: its trained routers choose them and its memory budget only
decides which planes stay (section 4.4); here demand comes from the work and can only be clipped at a stated cost.
Legend: L routing sites, E experts, K levels of the ladder.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.config.device_settings import DevicePlanSettings
from placer.core.device.check import check_device_plan
from placer.core.device.ladder import BitLadder
from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import DeviceWork
from placer.core.errors import MismatchError, SolverError, UsageError
from solvers.bits.budget import BudgetSearch

__all__ = ["DevicePlanSettings", "PlaneSizes", "plan_device"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlaneSizes:
    """What of a model and its planes a plan needs where no file of planes exists yet."""

    model: str
    num_hidden_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    ladder: BitLadder
    plane_bytes_K: tuple[int, ...]


def plan_device(
    work: DeviceWork,
    device: DeviceSpec,
    planes: PlaneIndex | PlaneSizes,
    settings: DevicePlanSettings | None = None,
    *,
    hashes: dict[str, str] | None = None,
    seed: int = 0,
) -> DevicePlan:
    """The plan with the least predicted mean iteration time found for `work` (by `evaluate_device`), and a bound on it.

    Parameters
    ----------
    planes
        sizes of the planes; its `error_LEK` is what clipping costs, needed where `most_quality_cost` is given
    hashes
        of trace and model, written to the plan beside the device's and the planes'

    The bound holds for the class of plans that `bound_by` names: without cache or prefetch, every residency, order and
    buffer (and every ceiling within the quality limit); where the plan has a cache, every cache too, at its ceilings.

    Raises
    ------
    InfeasibleError
        for a budget below the smallest legal plan, which it names
    MismatchError, UsageError
        for work of another shape or with levels above the ladder, no iterations, or a quality limit without errors

    Notes
    -----
    Guarantee: legal by `check_device_plan`; never worse, on this work, than nothing resident (all memory a buffer) and
    than whole experts resident, most used first (a buffer of one). Deterministic, unless CP-SAT's time limit stops it.
    """
    settings = settings or DevicePlanSettings()
    error_LEK = planes.error_LEK if isinstance(planes, PlaneIndex) else None
    _refuse(work, planes, settings, error_LEK)
    known = {**(hashes or {}), "device": device.sha256}
    if isinstance(planes, PlaneIndex):
        known["planes"] = planes.sha256
    shape = (len(planes.moe_layers), planes.num_experts)
    empty = DevicePlan(
        model=planes.model,
        num_hidden_layers=planes.num_hidden_layers,
        moe_layers=tuple(planes.moe_layers),
        num_experts=planes.num_experts,
        ladder=planes.ladder,
        plane_bytes_K=tuple(planes.plane_bytes_K),
        resident_LE=np.zeros(shape, dtype=np.int64),
        ceiling_LE=np.full(shape, planes.ladder.levels, dtype=np.int64),
        memory_bytes=device.memory_bytes,
        solver="device-budget",
        status="solved",
        objective_name="mean_iteration_ns",
        quality_name="" if error_LEK is None else "mean_added_error_per_use",
        seed=seed,
        hashes=known,
    )
    search = BudgetSearch.of(
        work,
        device,
        empty,
        orders=settings.orders,
        caches=settings.caches,
        most_loss=settings.most_quality_cost,
        error_LEK=error_LEK,
        solver=settings.solver,
        time_limit_s=settings.time_limit_s,
    )
    plan = search.found()
    if broken := check_device_plan(
        plan, index=planes if isinstance(planes, PlaneIndex) else None, device=device, work=work
    ):
        raise SolverError(f"the device planner made an illegal plan: {broken[0]}")
    return plan


def _refuse(
    work: DeviceWork, planes: PlaneIndex | PlaneSizes, settings: DevicePlanSettings, error_LEK: FloatArray | None
) -> None:
    shape = (len(planes.moe_layers), planes.num_experts, planes.ladder.levels)
    sites, experts, levels = work.count_BLEK.shape[1:]
    if not work.num_iterations:
        raise UsageError("the work has no iterations; give a trace with tokens")
    if (sites, experts) != shape[:2]:
        raise MismatchError(f"the work is for {(sites, experts)} (sites, experts), the planes for {shape[:2]}")
    if levels != shape[2]:
        raise MismatchError(
            f"demand goes to level {levels}, the ladder has {shape[2]} ({', '.join(map(str, planes.ladder.bits_K))} "
            "bits): quantise the widths demanded, or count the work on this ladder"
        )
    if settings.most_quality_cost is not None and error_LEK is None:
        raise UsageError(
            "plan.most_quality_cost needs the error of every expert at every level; give planes that have it"
        )
