"""One rank's share of a generation: its requests, the model without experts, and the experts that the plan gives it.

Legend: L MoE layers, P slots of one rank.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from placer.core.errors import MismatchError
from placer.core.model import ModelSpec
from placer.core.plan import Plan
from placer.core.replicas import layer_slots
from placer.core.schedule import KINDS, Kind
from placer.execute.dispatch import Carriage, Fabric
from placer.execute.dispatch.lanes import Lanes
from placer.execute.experts import ExpertFile, ExpertWeights
from placer.execute.hf.architectures import check_model, require_transformers
from placer.execute.hf.backbone import Backbone, load_backbone
from placer.execute.hf.batch import RankBatch
from placer.execute.hf.experts import DistributedExperts, Step
from placer.execute.hf.job import GenerateJob
from placer.execute.hf.schedules import schedule_of
from placer.execute.loop import Clock

__all__ = ["Caches", "PreparedGeneration", "prepare"]


class Caches:
    """What several jobs of a launch have in common: models without experts, and experts."""

    def __init__(self) -> None:
        self.backbones: dict[tuple[str, torch.dtype], Backbone] = {}
        self.experts: dict[tuple[str, torch.dtype, int, int], ExpertWeights] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedGeneration:
    """A job with everything that one rank needs in memory."""

    job: GenerateJob
    plan: Plan
    spec: ModelSpec
    backbone: Backbone
    layers_L: tuple[DistributedExperts, ...]
    step: Step
    clock: Clock
    request_B: tuple[int, ...]

    @property
    def two_level(self) -> bool:
        """Whether exchanges go inside nodes and across them separately."""
        carriages = [one for carriage_L in self.step.carriages.values() for one in carriage_L]
        return self.job.mode == "per_node" or any(one.algorithm == "2dh" for one in carriages)

    def start(self, fabric: Fabric) -> RankBatch:
        """Puts this job's experts into the model and its requests into a new batch, to be run on `fabric`."""
        self.step.fabric = fabric
        for block, layer in zip(self.backbone.blocks_L, self.layers_L, strict=True):
            block.experts = layer
        return RankBatch(
            self.backbone,
            self.layers_L,
            self.step,
            [self.job.prompts[request] for request in self.request_B],
            self.request_B,
            len(self.job.prompts),
            self.job.max_new_tokens,
        )


def prepare(
    job: GenerateJob, rank: int, num_ranks: int, device: torch.device, caches: Caches, beat: Any
) -> PreparedGeneration:
    """Loads one rank's share; `beat(layer, phase)` is called at the beginning of each phase.

    Raises UsageError for a schedule that the mode does not have, MismatchError where plan, model, prompts and ranks do
    not fit together, InputFileError for a checkpoint that lacks something.
    """
    require_transformers()
    plan, model_path = Plan.load(Path(job.plan_path)), Path(job.model_path)
    if plan.num_ranks != num_ranks:
        raise MismatchError(f"the plan is for {plan.num_ranks} ranks, {num_ranks} were started; start as many")
    if max(job.rank_Q) >= num_ranks:
        raise MismatchError(f"generate.rank_Q has rank {max(job.rank_Q)}; the plan has {num_ranks} ranks")
    spec = check_model(plan, model_path)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[job.dtype]
    key = (job.model_path, dtype)
    if key not in caches.backbones:
        caches.backbones[key] = load_backbone(model_path, dtype=dtype, device=device)
    backbone = caches.backbones[key]
    if backbone.layer_L != plan.moe_layers:
        raise MismatchError(f"the plan has MoE layers {plan.moe_layers}, transformers builds {backbone.layer_L}")
    largest = max(max(prompt) for prompt in job.prompts)
    if largest >= backbone.vocab_size:
        raise MismatchError(f"a prompt has token {largest}; the model's vocabulary has {backbone.vocab_size} tokens")
    step = Step(
        plan=plan,
        mode=job.mode,
        rank=rank,
        carriages={kind: _carriages(plan, kind, job) for kind in KINDS},
        lanes=Lanes(device),
        beat=beat,
    )
    return PreparedGeneration(
        job=job,
        plan=plan,
        spec=spec,
        backbone=backbone,
        layers_L=_load_experts(job, plan, backbone, step, caches),
        step=step,
        clock=Clock(device),
        request_B=tuple(request for request, where in enumerate(job.rank_Q) if where == rank),
    )


def _carriages(plan: Plan, kind: Kind, job: GenerateJob) -> tuple[Carriage, ...]:
    schedule = schedule_of(plan, kind, job.mode)
    return tuple(
        Carriage(algorithm, rounds, None if rounds is None else rounds.transposed())
        for algorithm, rounds in zip(schedule.algorithm_L, schedule.rounds_L, strict=True)
    )


def _load_experts(
    job: GenerateJob, plan: Plan, backbone: Backbone, step: Step, caches: Caches
) -> tuple[DistributedExperts, ...]:
    per_rank, layers = plan.slots_per_rank, []
    with ExpertFile(Path(job.model_path), clamped=backbone.clamped) as file:
        if file.hidden_size != backbone.hidden_size:
            raise MismatchError(
                f"{job.model_path}: experts have hidden size {file.hidden_size}, config.json {backbone.hidden_size}"
            )
        for site, (row_P, layer) in enumerate(zip(plan.slot_expert_LP, plan.moe_layers, strict=True)):
            held: list[ExpertWeights | None] = []
            for expert in row_P[step.rank * per_rank : (step.rank + 1) * per_rank].tolist():
                key = (job.model_path, backbone.dtype, layer, expert)
                if expert >= 0 and key not in caches.experts:
                    caches.experts[key] = file.load(layer, expert, dtype=backbone.dtype, device=backbone.device)
                held.append(caches.experts[key] if expert >= 0 else None)
            share_P = None if plan.replica_share_LP is None else plan.replica_share_LP[site]
            slots = layer_slots(row_P, plan.num_experts, plan.num_ranks, plan.ranks_per_node, share_P)
            layers.append(DistributedExperts(site, slots, held, step))
    return tuple(layers)
