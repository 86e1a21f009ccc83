"""What the device gates and regimes run: D2MoE's steps one after another, then budgets, caches and reading ahead.

Plans know one half of the requests; the work is of the other. Legend: L sites, E experts, K levels, B iterations.
"""

from dataclasses import dataclass, replace

import numpy as np

from placer.config.device_settings import DevicePlanSettings
from placer.core.device.ladder import BitLadder
from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import DeviceWork, tokens_on_planes
from placer.pipeline.device_planning import plan_device
from traces.demand import drawn_demand
from traces.device_work import decode_batches, device_work
from traces.predictors.fit import fit_predictor, predict
from traces.predictors.work import level_shares, predicted_work
from traces.trace import RoutingTrace

__all__ = ["Bank", "Policy", "budget_policies", "halves_of", "steps_of", "work_on"]

CAPACITIES = {3: (0.3, 0.4, 0.3), 4: (0.25, 0.25, 0.25, 0.25)}
"""Shares of the levels as D2MoE trains its routers, for a trace without bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bank:
    """Planes of the same experts, nested and as copies, with the machine as calibrated for either."""

    name: str
    nested: PlaneIndex
    copies: PlaneIndex
    device: DeviceSpec
    copies_device: DeviceSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """A plan, the planes that it reads, the machine it was planned for, and the work that it is judged on."""

    name: str
    plan: DevicePlan
    index: PlaneIndex
    device: DeviceSpec
    work: DeviceWork


def halves_of(trace: RoutingTrace, ladder: BitLadder, seed: int) -> tuple[RoutingTrace, RoutingTrace]:
    """Requests to plan on and requests to run, bits drawn where none were recorded."""
    if trace.bits_LTK is None:
        trace = drawn_demand(
            trace,
            ladder,
            CAPACITIES.get(ladder.levels, (1 / ladder.levels,) * ladder.levels),
            np.random.default_rng(seed),
        )
    return trace.split_by_request(0.5, seed)


def work_on(
    trace: RoutingTrace, ladder: BitLadder, batch: int, iterations: int, learn: RoutingTrace | None = None
) -> DeviceWork:
    """Decoding, `batch` requests at a time, iterations spread evenly; with `learn`, the next layer is predicted."""
    batches = decode_batches(trace, batch)
    full = [index_T for index_T in batches if len(index_T) == batch]
    chosen = [full[at] for at in np.linspace(0, len(full) - 1, iterations).astype(int)]
    work = device_work(trace, chosen, ladder)
    if learn is None:
        return work
    predicted_LTK = predict(fit_predictor(learn, "transition"), trace)
    return predicted_work(work, trace, chosen, predicted_LTK, ladder, share_LEK=level_shares(learn, ladder))


def steps_of(bank: Bank, test: RoutingTrace, batch: int, iterations: int) -> list[Policy]:
    """On demand (copies, by id), + MWQ (nested planes, by id), + HEBF; chain-Johnson; and everything in memory."""
    nested = work_on(test, bank.nested.ladder, batch, iterations)
    # the same demand: a level of the copies' ladder is the same width
    found = [_step(bank, "on demand", nested, "by_id", copies=True), _step(bank, "+MWQ", nested, "by_id")]
    found += [_step(bank, "+HEBF", nested, "hebf"), _step(bank, "johnson", nested, "johnson")]
    return [*found, _step(bank, "hold", nested, "hebf", resident=True)]


def _step(
    bank: Bank, name: str, work: DeviceWork, order: str, *, copies: bool = False, resident: bool = False
) -> Policy:
    index, device = (bank.copies, bank.copies_device) if copies else (bank.nested, bank.device)
    sites, experts, levels = index.shape_LEK
    used_BLEK = tokens_on_planes(work.count_BLEK, nested=index.ladder.nested) > 0
    busiest = int((used_BLEK.sum(axis=2) @ np.asarray(index.plane_bytes_K)).max())
    plan = DevicePlan(
        model=index.model,
        num_hidden_layers=index.num_hidden_layers,
        moe_layers=index.moe_layers,
        num_experts=experts,
        ladder=index.ladder,
        plane_bytes_K=index.plane_bytes_K,
        resident_LE=np.full((sites, experts), levels if resident else 0),
        ceiling_LE=np.full((sites, experts), levels),
        order=order,  # type: ignore[arg-type] # the examples' own names
        buffer_bytes=0 if resident else busiest,
        hashes={"planes": index.sha256},
    )
    plan = replace(plan, memory_bytes=plan.resident_bytes + plan.buffer_bytes)
    return Policy(name=name, plan=plan, index=index, device=_with_memory(device, plan.memory_bytes), work=work)


def budget_policies(
    bank: Bank,
    train: RoutingTrace,
    test: RoutingTrace,
    batch: int,
    iterations: int,
    shares: tuple[float, ...],
    variants: float,
) -> list[Policy]:
    """placer's plan at each share of the planes' bytes; at share `variants` also its caches, and reading ahead."""
    ladder, total = bank.nested.ladder, bank.nested.total_bytes
    planned_on = work_on(train, ladder, batch, 2 * iterations)
    judged = work_on(test, ladder, batch, iterations)
    found = []
    for share in shares:
        device = _with_memory(bank.device, int(share * total))
        plan = plan_device(planned_on, device, bank.nested, DevicePlanSettings())
        found.append(Policy(name=f"budget {share:.0%}", plan=plan, index=bank.nested, device=device, work=judged))
        if share != variants:
            continue
        for cache in ("lru", "d2moe"):
            # half of what is resident goes to the cache, least useful planes first by the planner itself
            resident = plan_device(
                planned_on, _with_memory(bank.device, int(share * total / 2)), bank.nested, DevicePlanSettings()
            )
            resident = replace(resident, cache="none", cache_bytes=0)
            spent = resident.resident_bytes + resident.buffer_bytes
            cached = replace(
                resident, cache=cache, cache_bytes=device.memory_bytes - spent, memory_bytes=device.memory_bytes
            )
            name = f"budget {share:.0%}, half of it {cache}"
            found.append(Policy(name=name, plan=cached, index=bank.nested, device=device, work=judged))
        room = min(device.memory_bytes - plan.resident_bytes, 2 * plan.buffer_bytes)
        ahead = replace(plan, cache="none", cache_bytes=0, buffer_bytes=max(plan.buffer_bytes, room), prefetch_layers=1)
        ahead = replace(ahead, order="resident_first")
        predicted = work_on(test, ladder, batch, iterations, learn=train)
        found.append(
            Policy(name=f"budget {share:.0%}, read ahead", plan=ahead, index=bank.nested, device=device, work=predicted)
        )
    return found


def _with_memory(device: DeviceSpec, nbytes: int) -> DeviceSpec:
    return replace(device, memory_mib=-(-nbytes // 2**10) / 2**10)
