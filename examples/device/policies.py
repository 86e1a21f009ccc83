"""What the device gates run: D2MoE's steps one after another, and budgets, on one trace and one plane file.

Legend: L routing sites, E experts, K levels.
"""

from dataclasses import dataclass, replace

import numpy as np

from placer.core.device.ladder import BitLadder
from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import DeviceWork

__all__ = ["STEPS", "Policy", "as_copies", "baseline_plan", "whole_bytes"]

STEPS = ("hold", "on demand", "+MWQ", "+HEBF")
"""hold: every plane in memory. on demand: whole copies, expert by expert. +MWQ: nested planes, expert by expert. +HEBF: the
hottest expert-bit first. Budgets come on top of the last."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A plan to run, the planes it reads and the work in that format's levels."""

    name: str
    plan: DevicePlan
    index: PlaneIndex
    work: DeviceWork


def whole_bytes(ladder: BitLadder, index: PlaneIndex) -> int:
    """Bytes of one expert with every plane."""
    return sum(ladder.plane_bytes_K(index.shapes))


def baseline_plan(index: PlaneIndex, work: DeviceWork, *, order: str, resident: bool) -> DevicePlan:
    """Nothing resident and a buffer for the busiest layer, or everything resident."""
    sites, experts, levels = index.shape_LEK
    sizes = np.asarray(index.plane_bytes_K)
    used_BLEK = np.flip(np.cumsum(np.flip(work.count_BLEK, -1), -1), -1) if index.ladder.nested else work.count_BLEK
    buffer = 0 if resident else int(((used_BLEK > 0) @ sizes).sum(-1).max())
    resident_LE = np.full((sites, experts), levels if resident else 0)
    plan = DevicePlan(
        model=index.model,
        num_hidden_layers=index.num_hidden_layers,
        moe_layers=index.moe_layers,
        num_experts=experts,
        ladder=index.ladder,
        plane_bytes_K=index.plane_bytes_K,
        resident_LE=resident_LE,
        ceiling_LE=np.full((sites, experts), levels),
        order=order,
        buffer_bytes=buffer,
        hashes={"planes": index.sha256},
    )
    return replace(plan, memory_bytes=plan.resident_bytes + buffer)


def as_copies(work: DeviceWork) -> DeviceWork:
    """The same demand on whole copies: levels are the same, only what must be read for them differs."""
    return replace(work, predicted_BLEK=None)


def limited(device: DeviceSpec, mbytes_per_s: float) -> DeviceSpec:
    """The device with its disk held to a bandwidth."""
    disk = replace(device.disk, gbytes_per_s=min(device.disk.gbytes_per_s, mbytes_per_s / 1e3))
    return replace(device, disk=disk, disk_limit_mbytes_per_s=mbytes_per_s)
