"""What a plan costs on given work, the one definition: time of every iteration, bytes read, quality lost by clipping.

Every iteration runs its sites one after another: attention, then the items of the site as a flow shop in the plan's
order (`run_in_order`), with the planes present that are resident or in the plan's cache. `simulate` adds what is not in
here: prefetched planes and a slowdown of the processor while the disk is read.
Legend: B iterations, L routing sites, E experts, K levels of the ladder.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.device.buffer import fitting_order
from placer.core.device.cache import make_cache
from placer.core.device.flowshop import run_in_order
from placer.core.device.items import ItemTimes, layer_items, order_items
from placer.core.device.plan import DevicePlan
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import DeviceWork
from placer.core.errors import MismatchError, UsageError

__all__ = ["DeviceEvaluation", "clipping_loss_LEK", "evaluate_device", "mean_clipping_loss", "outside_ns_B"]

IntArray = npt.NDArray[np.int64]
FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DeviceEvaluation:
    """What a plan costs.

    iteration_ns_B    predicted nanoseconds of each iteration
    makespan_ns_BL    the part of it from a site's routing to its last item
    read_bytes_BL     bytes read from the disk
    quality_cost      mean over all (token, expert) uses of the error that clipping adds; None where no error is known
    """

    iteration_ns_B: IntArray
    makespan_ns_BL: IntArray
    read_bytes_BL: IntArray
    quality_cost: float | None

    @property
    def mean_iteration_ns(self) -> float:
        """The objective of device plans: predicted nanoseconds of an iteration, mean over iterations."""
        return float(self.iteration_ns_B.mean())

    @property
    def mean_read_bytes(self) -> float:
        """Bytes read in an iteration, mean over iterations."""
        return float(self.read_bytes_BL.sum(axis=1).mean())


def evaluate_device(
    plan: DevicePlan, work: DeviceWork, device: DeviceSpec, *, error_LEK: FloatArray | None = None
) -> DeviceEvaluation:
    """What `plan` costs on `work`, demand clipped to the plan's ceilings.

    error_LEK: error of every expert at every level (`PlaneIndex.error_LEK`).

    Raises MismatchError for work of another shape, UsageError for a plan that prefetches (`simulate` judges those) or
    no iterations, InfeasibleError where an expert does not fit the buffer. Complexity: O(B L I), I items of a site, and
    O(B L I^2 E) where the buffer is too small for a site's missing planes.
    """
    clipped = _refuse_or_clip(plan, work)
    iterations, sites, experts, levels = clipped.count_BLEK.shape
    cache = make_cache(
        plan.cache,
        (sites, experts, levels),
        plan.plane_bytes_K,
        plan.cache_bytes,
        future=clipped,
        nested=plan.ladder.nested,
    )
    resident_LEK = plan.present_LEK
    makespan_ns_BL = np.zeros((iterations, sites), dtype=np.int64)
    read_bytes_BL = np.zeros_like(makespan_ns_BL)
    for iteration in range(iterations):
        for site in range(sites):
            present_EK = resident_LEK[site] | cache.present_EK(site)
            items = layer_items(clipped.count_BLEK[iteration, site], present_EK, plan.ladder)
            times = ItemTimes.of(items, device, plan.ladder, plan.plane_bytes_K)
            order_I = fitting_order(items, times, order_items(items, plan.order, times), plan.buffer_bytes)
            items, times = items.taken(order_I), times.taken(order_I)
            makespan_ns_BL[iteration, site] = run_in_order(items, times, plan.buffer_bytes).makespan_ns
            read_bytes_BL[iteration, site] = times.bytes_I.sum()
            if plan.cache != "none":
                pairs = zip(items.expert_I.tolist(), items.plane_I.tolist(), strict=True)
                cache.end_site(site, [(site, *pair) for pair in pairs if not resident_LEK[(site, *pair)]])
    return DeviceEvaluation(
        iteration_ns_B=outside_ns_B(work, device) + makespan_ns_BL.sum(axis=1),
        makespan_ns_BL=makespan_ns_BL,
        read_bytes_BL=read_bytes_BL,
        quality_cost=None if error_LEK is None else mean_clipping_loss(work, plan.ceiling_LE, error_LEK),
    )


def outside_ns_B(work: DeviceWork, device: DeviceSpec) -> IntArray:
    """Nanoseconds of an iteration outside its experts, which no plan changes, (B,)."""
    tokens_U, where_B = np.unique(work.tokens_B, return_inverse=True)
    layer_ns_U = np.array([device.compute.layer_ns(int(tokens)) for tokens in tokens_U], dtype=np.int64)
    return layer_ns_U[where_B.reshape(-1)] * work.count_BLEK.shape[1]


def clipping_loss_LEK(count_LEK: IntArray, error_LEK: FloatArray) -> FloatArray:
    """What a ceiling at each level costs, (L, E, K): over uses above it, error there less error demanded, a sum."""
    loss_LEK = np.zeros(count_LEK.shape)
    for level in range(count_LEK.shape[2]):
        worse_LEK = error_LEK[..., level, None] - error_LEK[..., level:]
        loss_LEK[..., level] = (count_LEK[..., level:] * worse_LEK).sum(axis=-1)
    return loss_LEK


def mean_clipping_loss(work: DeviceWork, ceiling_LE: IntArray, error_LEK: FloatArray) -> float:
    """The quality cost of ceilings: `clipping_loss_LEK` over all experts, per (token, expert) use (0 without uses)."""
    if error_LEK.shape != work.count_BLEK.shape[1:]:
        raise MismatchError(
            f"errors are {error_LEK.shape}, the work is {work.count_BLEK.shape[1:]} (sites, experts, K)"
        )
    loss_LEK = clipping_loss_LEK(work.count_BLEK.sum(axis=0), error_LEK)
    return float(np.take_along_axis(loss_LEK, ceiling_LE[..., None] - 1, axis=2).sum()) / max(1, work.count_BLEK.sum())


def _refuse_or_clip(plan: DevicePlan, work: DeviceWork) -> DeviceWork:
    if work.count_BLEK.shape[1:] != plan.present_LEK.shape:
        raise MismatchError(
            f"the plan is for {plan.present_LEK.shape} (sites, experts, levels), the work {work.count_BLEK.shape[1:]}; "
            "plan for this model and ladder"
        )
    if not work.num_iterations:
        raise UsageError("the work has no iterations; give a trace with tokens")
    if plan.prefetch_layers:
        raise UsageError(f"plan.prefetch_layers is {plan.prefetch_layers}; evaluate knows no prefetch, use simulate")
    return work.clipped(plan.ceiling_LE)
