"""A device plan from demand to Timelines: plan, predict, measure, generate, export."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from placer.config.device_settings import DevicePlanSettings, DeviceSettings
from placer.config.devices import load_device
from placer.core.device.check import check_device_plan
from placer.core.device.ladder import BitLadder
from placer.core.device.plan import DevicePlan
from placer.core.device.planes import PlaneIndex
from placer.core.device.spec import DeviceSpec
from placer.core.device.work import DeviceWork
from placer.core.errors import InfeasibleError, MismatchError, SolverError, UsageError
from placer.core.timeline import Timeline
from placer.pipeline.device_planning import plan_device
from placer.pipeline.generating import read_prompts
from traces.demand import drawn_demand
from traces.device_work import decode_batches, device_work, prefill_batches
from traces.locality import offload_advice
from traces.plane_store import load_plane_index
from traces.predictors.fit import fit_predictor, predict
from traces.predictors.work import level_shares, predicted_work
from traces.trace import RoutingTrace

__all__ = [
    "export_device",
    "generate_with_device",
    "measure_plan",
    "plan_for_device",
    "predict_device",
    "work_of",
]

Progress = Callable[[int, int], None]

AHEAD_SHARES = (0.0, 0.1, 0.2, 0.3)
"""Shares of the memory that are tried as room to read ahead."""


def work_of(
    trace: RoutingTrace,
    ladder: BitLadder,
    settings: DeviceSettings,
    *,
    learn: RoutingTrace | None = None,
) -> tuple[DeviceWork, list[str]]:
    """What the settings' batches of the trace demand, and what should be told.

    Bits are `settings.bits` of every token; else the trace's own; else drawn by `settings.bit_shares`; else the
    ladder's highest. `learn`: other requests, from which the settings' predictor learns what to read ahead.
    """
    told = []
    level = None if settings.bits is None else ladder.level_of(settings.bits)
    if trace.bits_LTK is None and settings.bit_shares and level is None:
        rng = np.random.default_rng(settings.seed)
        trace = drawn_demand(trace, ladder, settings.bit_shares, rng)
        told.append("the trace has no bits: demand is drawn at random, with device.bit_shares")
    elif trace.bits_LTK is None and level is None:
        told.append(f"the trace has no bits: every token demands {ladder.bits_K[-1]}")
    cut = decode_batches if settings.batching == "decode" else prefill_batches
    batches = cut(trace, settings.batch)[: settings.iterations]
    if not batches:
        raise UsageError("the trace has no tokens; record at least one request")
    work = device_work(trace, batches, ladder, level=level)
    if settings.predictor == "none":
        if learn is not None:
            raise UsageError("--learn is given, but device.predictor is none; name one in --config, or leave it out")
        return work, told
    if learn is None:
        raise UsageError(
            f"device.predictor is {settings.predictor}; give --learn, a trace of other requests to learn from"
        )
    has_bits = trace.bits_LTK is not None and level is None
    shares = None
    if has_bits:
        shares = level_shares(learn if learn.bits_LTK is not None else drawn_like(learn, ladder, settings), ladder)
    predicted_LTK = predict(fit_predictor(learn, settings.predictor), trace)
    return predicted_work(work, trace, batches, predicted_LTK, ladder, level=level, share_LEK=shares), told


def drawn_like(trace: RoutingTrace, ladder: BitLadder, settings: DeviceSettings) -> RoutingTrace:
    """A trace without bits, its demand drawn as the settings say."""
    shares = settings.bit_shares or tuple(float(level == ladder.levels) for level in range(1, ladder.levels + 1))
    return drawn_demand(trace, ladder, shares, np.random.default_rng(settings.seed))


def plan_for_device(
    trace: RoutingTrace,
    planes: Path,
    device: Path,
    *,
    memory_bytes: int | None = None,
    max_quality_cost: float | None = None,
    learn: RoutingTrace | None = None,
    settings: DeviceSettings | None = None,
) -> tuple[DevicePlan, dict[str, Any], list[str]]:
    """The plan for a trace on a machine, what else is known of it, and warnings.

    Raises InfeasibleError for a budget below the smallest legal plan.
    """
    settings = settings or DeviceSettings()
    index, spec = load_plane_index(planes), load_device(device)
    refuse_other_model(trace, index.model, index.shape_LEK[:2], str(planes))
    if memory_bytes is not None:
        spec = replace(spec, memory_mib=memory_bytes / 2**20)
    work, told = work_of(trace, index.ladder, settings, learn=learn)
    chosen = settings.plan
    if max_quality_cost is not None:
        chosen = replace(chosen, most_quality_cost=max_quality_cost)
    plan = plan_device(
        work,
        spec,
        index,
        chosen,
        hashes={"trace": trace.sha256, "model": trace.model.sha256},
        seed=settings.seed,
    )
    if settings.predictor != "none":
        plan, line = _reading_ahead(plan, work, spec, index, chosen, trace)
        told.append(line)
    advice = offload_advice(trace)
    return plan, {"iterations": work.num_iterations, "advice": advice.text, "offloading_pays": advice.pays}, told


def _reading_ahead(
    plan: DevicePlan,
    work: DeviceWork,
    spec: DeviceSpec,
    index: PlaneIndex,
    settings: DevicePlanSettings,
    trace: RoutingTrace,
) -> tuple[DevicePlan, str]:
    """The plan with the next layer's planes read ahead, where that is predicted to be faster, and what is to be said.

    Tried with shares of the memory moved from residents to the buffer. The planner's bound is for plans that do not
    read ahead, so such a plan has none.
    """

    def mean_ns(one: DevicePlan) -> float:
        return float(_simulated(one, work, spec, trace).iteration_ns().mean())

    before = mean_ns(plan)
    best, least = plan, before
    for share in AHEAD_SHARES:
        smaller = plan
        if share:
            try:
                less = replace(spec, memory_mib=spec.memory_mib * (1 - share))
                smaller = plan_device(work, less, index, settings, hashes=plan.hashes, seed=plan.seed)
            except InfeasibleError:
                continue
        ahead = replace(
            smaller,
            prefetch_layers=1,
            memory_bytes=spec.memory_bytes,
            buffer_bytes=spec.memory_bytes - smaller.resident_bytes - smaller.cache_bytes,
            hashes={**smaller.hashes, "device": spec.sha256},
            bound=None,
            bound_by="",
            stopped_by="",
            objective_name="mean_iteration_ns_flow",
        )
        found = mean_ns(ahead)
        if found < least:
            best, least = replace(ahead, objective=found), found
    if best is plan:
        return plan, f"reading ahead is not predicted to help ({before / 1e3:.1f} us an iteration without); left out"
    if broken := check_device_plan(best, index=index, device=spec, work=work):
        raise SolverError(f"the plan that reads ahead is illegal: {broken[0]}")
    return (
        best,
        f"reading ahead: {least / 1e3:.1f} us an iteration instead of {before / 1e3:.1f}; no bound holds for it",
    )


def _warnings(plan: DevicePlan, work: DeviceWork, spec: DeviceSpec, trace: RoutingTrace) -> list[str]:
    """Where what runs is not what the plan was made for."""
    found = []
    if plan.prefetch_layers and work.predicted_BLEK is None:
        found.append("the plan reads ahead, but device.predictor of --config is none: nothing is read ahead")
    # `plan --memory` changes the budget alone
    machines = {spec.sha256, replace(spec, memory_mib=plan.memory_bytes / 2**20).sha256}
    if plan.hashes.get("device", spec.sha256) not in machines:
        found.append("the plan was made for another machine; plan again for this device file")
    if plan.hashes.get("model", trace.model.sha256) != trace.model.sha256:
        found.append(f"the plan was made for another model than {trace.model.name!r} of the same shape")
    return found


def predict_device(
    plan: DevicePlan,
    trace: RoutingTrace,
    device: Path,
    *,
    learn: RoutingTrace | None = None,
    fidelity: str = "flow",
    settings: DeviceSettings | None = None,
    progress: Progress | None = None,
) -> tuple[Timeline, list[str]]:
    """The simulated Timeline of the plan on a trace, and warnings."""
    settings = settings or DeviceSettings()
    refuse_other_model(trace, plan.model, (len(plan.moe_layers), plan.num_experts), "the plan")
    work, told = work_of(trace, plan.ladder, settings, learn=learn)
    spec = load_device(device)
    told += _warnings(plan, work, spec, trace)
    return _simulated(plan, work, spec, trace, fidelity, progress), told


def _simulated(
    plan: DevicePlan,
    work: DeviceWork,
    device: DeviceSpec,
    trace: RoutingTrace,
    fidelity: str = "flow",
    progress: Progress | None = None,
) -> Timeline:
    from sim.device import simulate_device

    chosen: Any = fidelity  # unknown names are refused there
    return simulate_device(plan, work, device, fidelity=chosen, trace_sha256=trace.sha256, progress=progress)


def measure_plan(
    plan: DevicePlan,
    planes: Path,
    trace: RoutingTrace,
    device: Path,
    *,
    learn: RoutingTrace | None = None,
    settings: DeviceSettings | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[list[Timeline], list[str], list[str]]:
    """The measured Timeline of the trace replayed under the plan and the predicted one, their names, and warnings.

    Order and bandwidth limit are those that the device file gives. The prediction is made first. Raises MismatchError
    for planes or a trace of another model, and what `run_device` does.
    """
    from placer.execute.launch import require_torch

    require_torch()
    from placer.execute.device import run_device

    settings = settings or DeviceSettings()
    index = load_plane_index(planes)
    refuse_other_model(trace, plan.model, (len(plan.moe_layers), plan.num_experts), "the plan")
    work, told = work_of(trace, plan.ladder, settings, learn=learn)
    spec = load_device(device)
    predicted = _simulated(plan, work, spec, trace)
    measured = run_device(
        plan,
        work,
        index,
        spec,
        warm_up=settings.warmup,
        seed=settings.seed,
        about={"trace_sha256": trace.sha256},
        progress=progress,
    )
    return [measured, predicted], ["measured", "predicted"], told + _warnings(plan, work, spec, trace)


def generate_with_device(
    plan: DevicePlan,
    planes: Path,
    model: Path,
    text: Path,
    routers: Path | None,
    device: Path,
    *,
    max_new_tokens: int,
    settings: DeviceSettings | None = None,
    progress: Callable[[str], None] | None = None,
) -> tuple[Timeline, list[str], list[str]]:
    """Greedy generation by the real model, its experts read from the disk: Timeline, texts for a person, warnings."""
    from placer.execute.hf import decode, encode, require_transformers

    require_transformers()
    from placer.execute.device import generate_on_device

    settings = settings or DeviceSettings()
    index, spec, told = load_plane_index(planes), load_device(device), []
    levels_of = None
    if routers is not None:
        from placer.execute.demand import BitRouters

        loaded = BitRouters.load(routers)
        levels_of = loaded.for_planes(index)
        if loaded.about.get("planes_sha256", index.sha256) != index.sha256:
            told.append("the bit routers were trained on other planes")
    if plan.prefetch_layers:
        told.append("the plan reads ahead; generation does not, since nothing predicts it")
    prompts = encode(model, read_prompts(text))
    tokens, timeline = generate_on_device(
        model,
        plan,
        index,
        spec,
        prompts,
        max_new_tokens,
        levels_of=levels_of,
        warm_up=settings.warmup,
        progress=progress,
    )
    return timeline, [repr(said) for said in decode(model, tokens)], told


def export_device(plan: DevicePlan, to: str, output: Path, planes: Path | None) -> tuple[str, list[str]]:
    """Writes the plan for an engine; returns the flags that load the file, and warnings."""
    from placer.export import export_device_plan

    launch, warnings = export_device_plan(plan, None if planes is None else load_plane_index(planes), to, output)
    return launch, list(warnings)


def refuse_other_model(trace: RoutingTrace, name: str, shape: tuple[int, int], what: str) -> None:
    """Raises MismatchError where the trace does not have these sites and experts."""
    if (trace.model.num_sites, trace.model.num_experts) != shape:
        raise MismatchError(
            f"the trace is of {trace.model.name!r} with {trace.model.num_sites} sites of {trace.model.num_experts} "
            f"experts, {what} is for {name!r} with {shape[0]} of {shape[1]}; use the same model's"
        )
