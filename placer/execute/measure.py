"""Measure plans: replay a trace's routing through real ranks, real messages and real expert arithmetic.

Legend: L sites, T tokens, K top-k, P slots, E experts.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypedDict, Unpack

import numpy as np
import numpy.typing as npt

from placer.core.dispatch import source_ranks
from placer.core.errors import MismatchError, UsageError
from placer.core.model import ModelSpec, Site
from placer.core.plan import Plan
from placer.core.schedule import Kind, Schedule
from placer.core.timeline import Timeline
from placer.execute.job import DTYPES, Backend, DType, ExecutionMode, ReplayJob
from placer.execute.launch import Host, require_torch, run_ranks
from placer.execute.random_experts import stored_layers, write_random_experts

__all__ = ["ReplayOptions", "replay", "replay_plans", "replayed_model"]

RANDOM_EXPERTS_BYTES = 1 << 29
"""Random experts on disk stay below this; deeper models use the same weights for several layers."""


class ReplayOptions(TypedDict, total=False):
    """Keyword arguments that `replay` hands on to `replay_plans`."""

    request_id_T: npt.NDArray[np.integer[Any]] | None
    source_T: npt.NDArray[np.integer[Any]] | None
    kind: Kind
    launches: int
    realtime: bool
    hosts: Sequence[Host]
    experts_path: Path | None
    tokens_per_iteration: int
    iterations: int | None
    warmup: int
    seed: int
    dtype: DType
    hidden_size: int
    intermediate_size: int
    num_ranks: int | None
    backend: Backend
    timeout_s: float
    verify: bool
    trace_sha256: str
    progress: Callable[[str], None] | None


def replay(
    plan: Plan,
    expert_LTK: npt.NDArray[np.integer[Any]],
    weight_LTK: npt.NDArray[np.floating[Any]] | None = None,
    *,
    model: ModelSpec,
    mode: ExecutionMode | None = None,
    **options: Unpack[ReplayOptions],
) -> Timeline:
    """Measured Timeline of one plan under `mode` (None: the plan's own); `replay_plans` says what the options are."""
    return replay_plans([plan], expert_LTK, weight_LTK, model=model, modes=[mode], **options)[0]


def replay_plans(
    plans: Sequence[Plan],
    expert_LTK: npt.NDArray[np.integer[Any]],
    weight_LTK: npt.NDArray[np.floating[Any]] | None = None,
    *,
    model: ModelSpec,
    request_id_T: npt.NDArray[np.integer[Any]] | None = None,
    source_T: npt.NDArray[np.integer[Any]] | None = None,
    sources: Sequence[npt.NDArray[np.integer[Any]]] | None = None,
    experts_path: Path | None = None,
    modes: Sequence[ExecutionMode | None] | None = None,
    schedules: Sequence[Schedule | None] | None = None,
    kind: Kind = "prefill",
    launches: int = 1,
    realtime: bool = False,
    hosts: Sequence[Host] = (),
    tokens_per_iteration: int = 1024,
    iterations: int | None = None,
    warmup: int = 1,
    seed: int = 0,
    dtype: DType = "float32",
    hidden_size: int = 256,
    intermediate_size: int = 512,
    num_ranks: int | None = None,
    backend: Backend = "auto",
    timeout_s: float = 600.0,
    verify: bool = True,
    trace_sha256: str = "",
    progress: Callable[[str], None] | None = None,
) -> list[Timeline]:
    """Measured Timelines of the plans, all in each launch, their iterations interleaved in a seeded random order.

    expert_LTK, weight_LTK    routing of the trace, entries that are no expert of the model counting as nothing; no
                              weights means equal ones
    request_id_T or source_T  which rank a token's attention runs on: `source_ranks` of the former, or the latter; or
    sources                   one such array for each plan
    experts_path              a checkpoint; without one, random experts of `hidden_size` and `intermediate_size`
    modes                     dispatch mode for each plan; None means the plan's own
    schedules                 how each plan's all-to-alls run; None means the plan's own schedule for `kind`
    launches                  how often everything is started afresh, each time in another order; the iterations of all
                              launches follow each other in a Timeline (`Timeline.join`)
    realtime, hosts           ranks at real-time priority (root only); where ranks run (none: all on this machine)
    iterations                of `tokens_per_iteration` tokens each, from the trace's first token on; None means as many
                              as the trace fills
    timeout_s                 for each launch
    `about` of each Timeline has the sizes with which the simulator predicts the same job, and what verification found.

    Raises UsageError, MismatchError where plan, model and tokens do not fit, InputFileError for a checkpoint that lacks
    an expert, ExecutionError for a rank that failed, DependencyError without torch.
    """
    require_torch()
    expert_LTK = np.asarray(expert_LTK)
    modes = [None] * len(plans) if modes is None else modes
    schedules = [None] * len(plans) if schedules is None else schedules
    iterations = _check_tokens(expert_LTK, weight_LTK, tokens_per_iteration, iterations)
    if not plans or len(modes) != len(plans):
        raise UsageError(f"{len(plans)} plans and {len(modes)} modes; give at least one plan and one mode for each")
    if dtype not in DTYPES:
        raise UsageError(f"dtype is {dtype!r}; use one of {', '.join(DTYPES)}")
    used = iterations * tokens_per_iteration
    for plan in plans:
        _check_plan(plan, model, expert_LTK[:, :used], plans[0].num_ranks if num_ranks is None else num_ranks)
    num_ranks = plans[0].num_ranks
    if launches < 1:
        raise UsageError(f"launches is {launches}; give 1 or more")
    if sources is None:
        sources = [_sources(request_id_T, source_T, expert_LTK.shape[1], num_ranks)] * len(plans)
    elif request_id_T is not None or source_T is not None or len(sources) != len(plans):
        raise UsageError(f"{len(sources)} arrays of source ranks for {len(plans)} plans; give one for each, alone")
    else:
        sources = [_sources(None, np.asarray(one_T), expert_LTK.shape[1], num_ranks) for one_T in sources]

    with tempfile.TemporaryDirectory(prefix="placer-replay-") as name:
        folder = Path(name)
        np.save(folder / "expert_LTK.npy", expert_LTK[:, :used])
        if weight_LTK is not None:
            np.save(folder / "weight_LTK.npy", np.asarray(weight_LTK[:, :used], dtype=np.float32))
        about: dict[str, Any] = {"model": model.name, "trace_sha256": trace_sha256}
        if experts_path is None:
            shape = replace(model, hidden_size=hidden_size, moe_intermediate_size=intermediate_size)
            random_model, stored = _random_layers(shape, dtype)
            about |= {"experts": "random", "distinct_expert_layers": random_model.num_sites}
        else:
            stored = stored_layers(model)
            about |= {"experts": Path(experts_path).name, "distinct_expert_layers": len(set(stored))}
        experts_file = folder / "experts.safetensors" if experts_path is None else Path(experts_path)
        jobs = []
        for index, (plan, mode, schedule) in enumerate(zip(plans, modes, schedules, strict=True)):
            plan.save(folder / f"plan-{index}.json")
            np.save(folder / f"source_T-{index}.npy", sources[index][:used].astype(np.int64))
            jobs.append(
                ReplayJob(
                    plan_path=str(folder / f"plan-{index}.json"),
                    expert_path=str(folder / "expert_LTK.npy"),
                    weight_path=None if weight_LTK is None else str(folder / "weight_LTK.npy"),
                    source_path=str(folder / f"source_T-{index}.npy"),
                    experts_path=str(experts_file.resolve()),
                    result_path=str(folder / f"result-{index}.json"),
                    stored_layers=stored,
                    mode=plan.mode if mode is None else mode,  # type: ignore[arg-type] # ReplayJob checks it
                    tokens_per_iteration=tokens_per_iteration,
                    iterations=iterations,
                    warmup=warmup,
                    seed=seed,
                    dtype=dtype,
                    verify=verify,
                    backend=backend,
                    timeout_s=timeout_s,
                    schedule=schedule,
                    kind=kind,
                    realtime=realtime,
                    about=about,
                )
            )
        # last, because it takes longest: the jobs have checked every option by now
        if experts_path is None:
            write_random_experts(experts_file, random_model, seed, dtype=dtype)
        measured = []
        for launch in range(launches):
            if progress is not None and launches > 1:
                progress(f"launch {launch + 1} of {launches}")
            # another order of the plans; the tokens and their hidden states stay
            again = [replace(job, order_seed=seed + launch) for job in jobs]
            measured.append(run_ranks(again, num_ranks=num_ranks, timeout_s=timeout_s, progress=progress, hosts=hosts))
        if launches == 1:
            return measured[0]
        return [Timeline.join(parts) for parts in zip(*measured, strict=True)]


def replayed_model(model: ModelSpec, about: Mapping[str, Any]) -> ModelSpec:
    """`model` with the sizes that a measured Timeline's `about` states: what the simulator predicts that run with.

    Replay has no attention and no shared experts. `per_rank` runs also send `metadata_bytes_per_copy` with each copy.
    """
    return replace(
        model,
        hidden_size=about["hidden_size"],
        moe_intermediate_size=about["moe_intermediate_size"],
        weight_bytes=float(about["weight_bytes"]),
        activation_bytes=float(about["activation_bytes"]),
        matrices_per_expert=3,
        shared_intermediate_size=0,
        attention_params=0,
    )


def _check_tokens(
    expert_LTK: npt.NDArray[np.integer[Any]],
    weight_LTK: npt.NDArray[np.floating[Any]] | None,
    tokens_per_iteration: int,
    iterations: int | None,
) -> int:
    """How many iterations to replay."""
    if expert_LTK.ndim != 3:
        raise UsageError(f"expert_LTK has {expert_LTK.ndim} axes; it needs (layers, tokens, k)")
    if weight_LTK is not None and weight_LTK.shape != expert_LTK.shape:
        raise MismatchError(f"weight_LTK is {weight_LTK.shape}, expert_LTK {expert_LTK.shape}; they must agree")
    if tokens_per_iteration < 1 or (iterations is not None and iterations < 1):
        raise UsageError(f"{iterations} iterations of {tokens_per_iteration} tokens; both must be at least 1")
    tokens = expert_LTK.shape[1]
    count = tokens // tokens_per_iteration if iterations is None else iterations
    if count < 1 or count * tokens_per_iteration > tokens:
        raise UsageError(
            f"the trace has {tokens} tokens, {max(1, count)} iterations of {tokens_per_iteration} need "
            f"{max(1, count) * tokens_per_iteration}; lower the iterations or the tokens per iteration"
        )
    return count


def _check_plan(plan: Plan, model: ModelSpec, expert_LTK: npt.NDArray[np.integer[Any]], num_ranks: int) -> None:
    layers = expert_LTK.shape[0]
    if plan.num_ranks != num_ranks:
        raise MismatchError(f"the plan is for {plan.num_ranks} ranks, not {num_ranks}; use that many or solve again")
    if not layers == model.num_sites == len(plan.slot_expert_LP):
        raise MismatchError(
            f"the trace has {layers} MoE layers, model {model.name!r} {model.num_sites}, the plan "
            f"{len(plan.slot_expert_LP)}; use the trace that the plan was solved for"
        )
    if plan.num_experts != model.num_experts:
        raise MismatchError(
            f"the plan is for {plan.num_experts} experts, model {model.name!r} has {model.num_experts}; solve again"
        )
    if plan.num_slots % plan.num_ranks:
        raise MismatchError(f"{plan.num_slots} slots do not divide over {plan.num_ranks} ranks; run `placer check`")
    for site, expert_TK, slot_P in zip(model.sites, expert_LTK, plan.slot_expert_LP, strict=True):
        if slot_P.min() < -1 or slot_P.max() >= site.num_experts:
            raise MismatchError(
                f"layer {site.layer}: the plan has expert {max(slot_P, key=abs)}; ids go from 0 to "
                f"{site.num_experts - 1}; run `placer check`"
            )
        chosen = np.unique(expert_TK)
        chosen = chosen[(chosen >= 0) & (chosen < site.num_experts)]
        lost = chosen[~np.isin(chosen, slot_P)]
        if len(lost):
            raise MismatchError(
                f"layer {site.layer}: expert {lost[0]} has no slot in the plan, but the trace routes tokens to it "
                f"({len(lost)} such experts); run `placer check`"
            )


def _sources(
    request_id_T: npt.NDArray[np.integer[Any]] | None,
    source_T: npt.NDArray[np.integer[Any]] | None,
    tokens: int,
    num_ranks: int,
) -> npt.NDArray[np.integer[Any]]:
    if (request_id_T is None) == (source_T is None):
        raise UsageError("give either request_id_T or source_T, to say where each token's attention runs")
    if source_T is None:
        assert request_id_T is not None
        source_T = source_ranks(request_id_T, num_ranks)
    if source_T.shape != (tokens,):
        raise MismatchError(f"{source_T.shape} source ranks for {tokens} tokens; give one for each token")
    if source_T.min() < 0 or source_T.max() >= num_ranks:
        raise MismatchError(
            f"source ranks go from {source_T.min()} to {source_T.max()}; the plan has {num_ranks} ranks"
        )
    return source_T


def _random_layers(model: ModelSpec, dtype: DType) -> tuple[ModelSpec, tuple[int, ...]]:
    """The model whose experts to write, no larger than RANDOM_EXPERTS_BYTES, and the layer of it for each site."""
    layer_bytes = model.num_experts * model.expert_params * (4 if dtype == "float32" else 2)
    own = {layer: index for index, layer in enumerate(dict.fromkeys(stored_layers(model)))}
    distinct = max(1, min(len(own), RANDOM_EXPERTS_BYTES // layer_bytes))
    sites = tuple(Site(layer=layer, num_experts=model.num_experts) for layer in range(distinct))
    stored = tuple(own[layer] % distinct for layer in stored_layers(model))
    return replace(model, sites=sites, num_hidden_layers=distinct, matrices_per_expert=3), stored
