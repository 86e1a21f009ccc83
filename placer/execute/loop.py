"""The replay loop of one rank: what it holds, and one timed iteration.

Legend: L sites, T tokens (own ones unless said), K top-k, H hidden size, P slots of one rank, G spans of one iteration.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from placer.core.errors import MismatchError
from placer.core.plan import Plan
from placer.core.timeline import PHASES
from placer.execute.dispatch import SHIPMENTS, Carriage, Fabric, exchange
from placer.execute.dispatch.coherent import Coherent
from placer.execute.dispatch.fabric import exchange_counts
from placer.execute.dispatch.lanes import Lanes, stamp
from placer.execute.dispatch.layer import Span, chunk_bounds, run_layer
from placer.execute.experts import ExpertFile, ExpertWeights, grouped_ffn
from placer.execute.job import ReplayJob
from placer.execute.reference import attention_stand_in, hidden_states
from placer.execute.routing import load_routing

__all__ = ["Batch", "Clock", "PreparedJob", "Record", "first_hidden", "prepare", "run_iteration"]

IntArray = npt.NDArray[np.int64]
Beat = Callable[[int, int], None]
ExpertCache = dict[tuple[str, torch.dtype, int, int], ExpertWeights]
ATTENTION, GATHER = PHASES.index("attention"), PHASES.index("gather")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One rank's own tokens of one iteration, token_T in the trace. `name_T` counts from the iteration's first token.

    The routing is that of the own tokens; in `coherent` mode, where others' tokens come by, of all of the iteration's.
    """

    token_T: IntArray
    name_T: Tensor
    slot_LTK: Tensor
    weight_LTK: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedJob:
    """A job with everything one rank needs in memory; how each layer's all-to-alls run: carriage_L, degree_L."""

    job: ReplayJob
    plan: Plan
    batches: list[Batch]
    experts_LP: list[list[ExpertWeights | None]]
    carriage_L: list[Carriage]
    degree_L: tuple[int, ...]
    hidden_size: int
    moe_intermediate_size: int
    dtype: torch.dtype
    device: torch.device


@dataclass(frozen=True, slots=True)
class Record:
    """What one rank did in one iteration: layer and phase of each span, its start and end in nanoseconds of this host's
    clock (G, 2), copies sent, copies received and Timeline's `tokens` (G, 3)."""

    layer_G: IntArray
    phase_G: IntArray
    time_G2: IntArray
    count_G3: IntArray

    @classmethod
    def of(cls, spans: "Spans", clock: "Clock") -> "Record":
        """From (layer, span) pairs whose stamps `clock` reads."""
        times_ns = clock.read_ns([mark for _, span in spans for mark in (span.begin, span.end)])
        return cls(
            np.array([layer for layer, _ in spans]),
            np.array([span.phase for _, span in spans]),
            times_ns.reshape(-1, 2),
            np.array([(span.sent, span.received, span.tokens) for _, span in spans], dtype=np.int64),
        )


class Clock:
    """Turns stamps of one iteration into nanoseconds of this host's monotonic clock."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._zero_ns, self._zero = 0, None
        self._marks: list[Any] = []

    def start(self) -> Any:
        """The first stamp of an iteration."""
        if self._device.type == "cuda":
            torch.cuda.synchronize()
        self._zero_ns = perf_counter_ns()
        self._zero = stamp(self._device)
        self._marks = [self._zero]
        return self._zero

    def mark(self) -> None:
        """Keeps a stamp of now, for phases that follow each other without gaps."""
        self._marks.append(stamp(self._device))

    def read_ns(self, stamps: list[Any] | None = None) -> IntArray:
        """The stamps in nanoseconds, (len(stamps),); None: the start and what `mark` kept."""
        stamps = self._marks if stamps is None else stamps
        if self._device.type != "cuda":
            return np.array(stamps, dtype=np.int64)
        torch.cuda.synchronize()
        assert self._zero is not None
        elapsed_ms = [self._zero.elapsed_time(event) for event in stamps]
        return self._zero_ns + np.rint(np.array(elapsed_ms) * 1e6).astype(np.int64)


def prepare(job: ReplayJob, rank: int, num_ranks: int, device: torch.device, cache: ExpertCache) -> PreparedJob:
    """Loads one rank's share: its own tokens, and only the experts that the plan puts on it.

    `cache` keeps experts that several sites or jobs of a launch have in common.
    """
    plan = Plan.load(Path(job.plan_path))
    if plan.num_ranks != num_ranks:
        raise MismatchError(f"the plan is for {plan.num_ranks} ranks, {num_ranks} were started; start as many")
    if plan.num_slots % num_ranks:
        raise MismatchError(f"{plan.num_slots} slots do not divide over {num_ranks} ranks; run `placer check`")
    schedule = plan.schedule(job.kind) if job.schedule is None else job.schedule
    schedule.refuse_misfit(job.mode, len(plan.slot_expert_LP), num_ranks)
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[job.dtype]
    coherent = job.mode == "coherent"
    routing = load_routing(job, plan, None if coherent else rank)
    per_rank = plan.slots_per_rank
    experts_LP: list[list[ExpertWeights | None]] = []
    with ExpertFile(Path(job.experts_path)) as file:
        for row, stored in zip(plan.slot_expert_LP, job.stored_layers, strict=True):
            held: list[ExpertWeights | None] = []
            for expert in row[rank * per_rank : (rank + 1) * per_rank].tolist():
                key = (job.experts_path, dtype, stored, expert)
                if expert >= 0 and key not in cache:
                    cache[key] = file.load(stored, expert, dtype=dtype, device=device)
                held.append(cache[key] if expert >= 0 else None)
            experts_LP.append(held)
        hidden_size, inner = file.hidden_size, file.moe_intermediate_size
    if hidden_size * dtype.itemsize % 4:
        raise MismatchError(f"{job.experts_path}: hidden size {hidden_size} in {job.dtype}; the executor needs it even")
    bounds = np.searchsorted(routing.token_T, np.arange(job.iterations + 1) * job.tokens_per_iteration)
    batches = []
    for iteration, (start, stop) in enumerate(pairwise(bounds.tolist())):
        own = np.arange(start, stop)[routing.source_T[start:stop] == rank]
        token_T = routing.token_T[own]
        batches.append(
            Batch(
                token_T=token_T,
                name_T=torch.from_numpy(token_T - iteration * job.tokens_per_iteration).to(device),
                slot_LTK=torch.from_numpy(routing.slot_LTK[:, start:stop].copy()).to(device),
                weight_LTK=torch.from_numpy(routing.weight_LTK[:, start:stop].copy()).to(device),
            )
        )
    return PreparedJob(
        job=job,
        plan=plan,
        batches=batches,
        experts_LP=experts_LP,
        carriage_L=[
            Carriage(algorithm, rounds, None if rounds is None else rounds.transposed())
            for algorithm, rounds in zip(schedule.algorithm_L, schedule.rounds_L, strict=True)
        ],
        degree_L=schedule.degree_L,
        hidden_size=hidden_size,
        moe_intermediate_size=inner,
        dtype=dtype,
        device=device,
    )


def first_hidden(prepared: PreparedJob, index: int) -> Tensor:
    """Seeded hidden states (T, H) of the rank's own tokens of one iteration; made outside the timed part."""
    hidden_TH = hidden_states(prepared.job.seed, prepared.batches[index].token_T, prepared.hidden_size)
    return torch.from_numpy(hidden_TH).to(dtype=prepared.dtype, device=prepared.device)


@torch.inference_mode()
def run_iteration(
    prepared: PreparedJob, index: int, hidden_TH: Tensor, fabric: Fabric, lanes: Lanes, clock: Clock, beat: Beat
) -> tuple[Record, Tensor]:
    """What the rank did, and the last residual stream (T, H) of its own tokens. `hidden_TH` are their first ones.

    The spans of a layer of degree 1 follow each other without gaps. Collective; the caller puts a barrier before it.
    """
    if prepared.job.mode == "coherent":
        layers, residual_TH = _wander(prepared, index, hidden_TH, fabric, lanes, clock, beat)
    else:
        layers, residual_TH = _stay(prepared, index, hidden_TH, fabric, lanes, clock, beat)
    return Record.of(layers, clock), residual_TH


Spans = list[tuple[int, Span]]


def _experts(experts_P: list[ExpertWeights | None]) -> Callable[[Tensor, Sequence[int]], Tensor]:
    return lambda rows_XH, rows_P: grouped_ffn(rows_XH, rows_P, experts_P)


def _stay(
    prepared: PreparedJob, index: int, hidden_TH: Tensor, fabric: Fabric, lanes: Lanes, clock: Clock, beat: Beat
) -> tuple[Spans, Tensor]:
    """Every mode in which a token's sums come back to its home rank."""
    batch, kind, per_rank = prepared.batches[index], SHIPMENTS[prepared.job.mode], prepared.plan.slots_per_rank
    spans: Spans = []
    residual_TH, update_TH = hidden_TH, torch.zeros_like(hidden_TH)
    tokens, begin = len(hidden_TH), clock.start()
    for layer, experts_P in enumerate(prepared.experts_LP):
        beat(layer, ATTENTION)
        residual_TH = residual_TH + update_TH
        x_TH = attention_stand_in(residual_TH)
        normed = stamp(prepared.device)
        slot_TK, weight_TK, carriage = batch.slot_LTK[layer], batch.weight_LTK[layer], prepared.carriage_L[layer]
        cuts = chunk_bounds(tokens, prepared.degree_L[layer])
        shipments = [
            kind(fabric, carriage, x_TH[a:b], slot_TK[a:b], weight_TK[a:b], per_rank) for a, b in pairwise(cuts)
        ]
        sums, done = run_layer(shipments, _experts(experts_P), lanes, normed, partial(beat, layer))
        update_TH = sums[0] if len(sums) == 1 else torch.cat(sums)
        spans += [(layer, span) for span in (Span(ATTENTION, begin, normed, tokens=tokens), *done)]
        begin = done[-1].end if len(shipments) == 1 else stamp(prepared.device)
    return spans, residual_TH + update_TH


def _wander(
    prepared: PreparedJob, index: int, hidden_TH: Tensor, fabric: Fabric, lanes: Lanes, clock: Clock, beat: Beat
) -> tuple[Spans, Tensor]:
    """`coherent`: tokens stay with their first expert, each rank's in the trace's order; all are lastly gathered."""
    batch, per_rank, device = prepared.batches[index], prepared.plan.slots_per_rank, prepared.device
    spans: Spans = []
    residual_TH, update_TH, name_T = hidden_TH, torch.zeros_like(hidden_TH), batch.name_T
    begin = clock.start()
    for layer, experts_P in enumerate(prepared.experts_LP):
        beat(layer, ATTENTION)
        residual_TH = residual_TH + update_TH
        slot_TK, weight_TK = batch.slot_LTK[layer][name_T], batch.weight_LTK[layer][name_T]
        added, tokens, carriage = stamp(device), len(name_T), prepared.carriage_L[layer]
        shipments = [
            Coherent(
                fabric,
                carriage,
                residual_TH[a:b],
                slot_TK[a:b],
                weight_TK[a:b],
                per_rank,
                name_T=name_T[a:b],
                norm=attention_stand_in,
            )
            for a, b in pairwise(chunk_bounds(tokens, prepared.degree_L[layer]))
        ]
        sums, done = run_layer(shipments, _experts(experts_P), lanes, added, partial(beat, layer))
        spans += [(layer, span) for span in (Span(ATTENTION, begin, added, tokens=tokens), *done)]
        begin = done[-1].end if len(shipments) == 1 else stamp(device)
        name_T, order_T = torch.cat([one.name_M for one in shipments]).sort()
        residual_TH = torch.cat([one.residual_MH for one in shipments])[order_T]
        update_TH = torch.cat(sums)[order_T]
    beat(len(prepared.experts_LP) - 1, GATHER)
    # adding the last update is what a next layer's attention would begin with
    all_TH = _gather(residual_TH + update_TH, name_T, fabric)
    copies = len(name_T) * (fabric.num_ranks - 1)
    spans.append((-1, Span(GATHER, begin, stamp(device), copies, len(all_TH) - len(name_T), copies)))
    return spans, all_TH[batch.name_T]


def _gather(residual_TH: Tensor, name_T: Tensor, fabric: Fabric) -> Tensor:
    """The hidden states of all of the iteration's tokens on every rank, in the trace's order."""
    ranks, tokens = fabric.num_ranks, len(name_T)
    _, heard_R = exchange_counts(torch.full((ranks,), tokens, dtype=torch.int32, device=name_T.device))
    raw_TB = torch.cat([name_T.to(torch.int32)[:, None].view(torch.uint8), residual_TH.view(torch.uint8)], dim=1)
    arrived_TB = exchange(raw_TB.repeat(ranks, 1), [tokens] * ranks, heard_R.tolist())[:-1]
    all_TH = torch.empty(len(arrived_TB), residual_TH.shape[1], dtype=residual_TH.dtype, device=name_T.device)
    # copied, so that the bytes begin where the type may
    all_TH[arrived_TB[:, :4].contiguous().view(torch.int32)[:, 0].long()] = (
        arrived_TB[:, 4:].contiguous().view(residual_TH.dtype)
    )
    return all_TH
