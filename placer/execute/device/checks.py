"""Whether plan, planes, work and device belong together, before anything is read."""

from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import DeviceWork
from placer.core.errors import InfeasibleError, MismatchError, UsageError

__all__ = ["check_run", "check_work"]

MEND = "plan again for these planes"


def check_run(plan: DevicePlan, index: PlaneIndex, device: DeviceSpec) -> None:
    """Raises MismatchError for planes that the plan is not for, InfeasibleError for a plan that needs too much memory.

    UsageError for a device with an accelerator's memory: placer computes where the planes land.
    """
    for name, planned, found in (
        ("MoE layers", list(plan.moe_layers), list(index.moe_layers)),
        ("experts", plan.num_experts, index.num_experts),
        ("ladder", plan.ladder.to_dict(), index.ladder.to_dict()),
        ("plane_bytes_K", list(plan.plane_bytes_K), list(index.plane_bytes_K)),
        ("planes of sha256", plan.hashes.get("planes", index.sha256), index.sha256),
    ):
        if planned != found:
            raise MismatchError(f"the plan is for {name} {planned}, {index.path} has {found}; {MEND}")
    needed = plan.resident_bytes + plan.cache_bytes + plan.buffer_bytes
    for name, budget in (("the plan's memory_bytes", plan.memory_bytes), ("the device", device.memory_bytes)):
        if needed > budget:
            raise InfeasibleError(
                f"resident planes, cache and buffer need {needed} bytes and {name} allows {budget}; plan for that "
                "budget"
            )
    if plan.cache == "belady":
        raise UsageError("the plan's cache is belady, which has to know the future; simulate it, or run lru or d2moe")
    if device.to_device is not None:
        raise UsageError("device.to_device is set; runs compute on the processor, so leave it out")


def check_work(plan: DevicePlan, work: DeviceWork) -> None:
    """Raises MismatchError for work of another shape, UsageError where an expert has more tokens than the iteration."""
    wanted = (len(plan.moe_layers), plan.num_experts, plan.ladder.levels)
    if work.count_BLEK.shape[1:] != wanted:
        raise MismatchError(f"the work is for {work.count_BLEK.shape[1:]} (sites, experts, levels), the plan {wanted}")
    if not work.num_iterations:
        raise UsageError("work has no iterations; give one or more")
    too_many_B = work.count_BLEK.sum(axis=-1).max(axis=(1, 2)) > work.tokens_B
    if too_many_B.any():
        at = int(too_many_B.argmax())
        raise UsageError(
            f"work.count_BLEK sends an expert more than the {int(work.tokens_B[at])} tokens of iteration {at}; a token "
            "has an expert once at most"
        )
