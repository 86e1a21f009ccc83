"""The replay loop of one rank: what it holds, and one timed iteration.

Legend: L sites, T tokens (own ones unless said), K top-k, H hidden size, P slots of one rank, M marks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from time import perf_counter_ns
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from placer.core.dispatch import assign_layer
from placer.core.errors import InputFileError, MismatchError
from placer.core.plan import Plan
from placer.execute.dispatch import combine, dispatch
from placer.execute.experts import ExpertFile, ExpertWeights, grouped_ffn
from placer.execute.job import ReplayJob
from placer.execute.reference import attention_stand_in, hidden_states

__all__ = ["Batch", "Clock", "PreparedJob", "Routing", "first_hidden", "load_routing", "prepare", "run_iteration"]

IntArray = npt.NDArray[np.int64]
Beat = Callable[[int, int], None]
ExpertCache = dict[tuple[str, torch.dtype, int, int], ExpertWeights]


@dataclass(frozen=True, slots=True, kw_only=True)
class Routing:
    """The tokens of all recorded iterations: slot_LTK serves each choice (-1: none), weight_LTK float32, source_T."""

    expert_LTK: npt.NDArray[np.integer[Any]]
    weight_LTK: npt.NDArray[np.float32]
    slot_LTK: IntArray
    source_T: IntArray
    token_T: IntArray


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One rank's own tokens of one iteration."""

    token_T: IntArray
    slot_LTK: Tensor
    weight_LTK: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedJob:
    """A job with everything one rank needs in memory."""

    job: ReplayJob
    plan: Plan
    batches: list[Batch]
    experts_LP: list[list[ExpertWeights | None]]
    hidden_size: int
    moe_intermediate_size: int
    dtype: torch.dtype
    device: torch.device


class Clock:
    """Time stamps of one iteration: the processor's clock, or device events where there is a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._marks: list[Any] = []
        self._zero_ns = 0

    def start(self) -> None:
        """Forgets earlier marks; the first mark is now."""
        if self._cuda:
            torch.cuda.synchronize()
        self._zero_ns = perf_counter_ns()
        self._marks = []
        self.mark()

    def mark(self) -> None:
        """Stamps the end of one phase and the start of the next."""
        if self._cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append(event)
        else:
            self._marks.append(perf_counter_ns())

    def read_ns(self) -> IntArray:
        """All marks in nanoseconds of this host's monotonic clock, (M,)."""
        if not self._cuda:
            return np.array(self._marks, dtype=np.int64)
        torch.cuda.synchronize()
        elapsed_ms = [self._marks[0].elapsed_time(event) for event in self._marks]
        return self._zero_ns + np.rint(np.array(elapsed_ms) * 1e6).astype(np.int64)


def load_routing(job: ReplayJob, plan: Plan, rank: int | None = None) -> Routing:
    """The job's tokens (those whose source is `rank`, where given) and the slots that serve them.

    Every rank gets the same slots for the same token: the choice depends on the plan and the token alone. Raises
    InputFileError, or MismatchError where arrays and plan do not fit together.
    """
    expert_LTK, source_T = _load_array(job.expert_path, 3), _load_array(job.source_path, 1)
    weight_LTK = None if job.weight_path is None else _load_array(job.weight_path, 3)
    layers, tokens, _ = expert_LTK.shape
    if len(plan.slot_expert_LP) != layers or len(job.stored_layers) != layers:
        raise MismatchError(
            f"the trace has {layers} MoE layers, the plan {len(plan.slot_expert_LP)}, the expert file's map "
            f"{len(job.stored_layers)}; use the trace that the plan was solved for"
        )
    if tokens < job.num_tokens or len(source_T) != tokens or (weight_LTK is not None and len(weight_LTK[0]) != tokens):
        raise MismatchError(
            f"{job.expert_path}: {tokens} tokens, {len(source_T)} sources; the job replays {job.num_tokens}"
        )
    source_T = np.asarray(source_T[: job.num_tokens], dtype=np.int64)
    if source_T.min(initial=0) < 0 or source_T.max(initial=0) >= plan.num_ranks:
        raise MismatchError(
            f"{job.source_path}: source ranks go from {source_T.min()} to {source_T.max()}; the plan has "
            f"{plan.num_ranks} ranks"
        )
    token_T = np.arange(job.num_tokens) if rank is None else np.flatnonzero(source_T == rank)
    expert_LTK = np.stack([expert_TK[token_T] for expert_TK in expert_LTK])
    source_T = source_T[token_T]
    slot_LTK = np.stack([assign_layer(plan, layer, expert_LTK[layer], source_T, token_T)[0] for layer in range(layers)])
    if weight_LTK is None:
        count_LT = (slot_LTK >= 0).sum(axis=2, keepdims=True)
        weight = np.broadcast_to(1.0 / np.maximum(1, count_LT), slot_LTK.shape).astype(np.float32)
    else:
        weight = np.stack([weight_TK[token_T] for weight_TK in weight_LTK]).astype(np.float32)
    return Routing(expert_LTK=expert_LTK, weight_LTK=weight, slot_LTK=slot_LTK, source_T=source_T, token_T=token_T)


def prepare(job: ReplayJob, rank: int, num_ranks: int, device: torch.device, cache: ExpertCache) -> PreparedJob:
    """Loads one rank's share: its own tokens, and only the experts that the plan puts on it.

    `cache` keeps experts that several sites or jobs of a launch have in common.
    """
    plan = Plan.load(Path(job.plan_path))
    if plan.num_ranks != num_ranks:
        raise MismatchError(f"the plan is for {plan.num_ranks} ranks, {num_ranks} were started; start as many")
    if plan.num_slots % num_ranks:
        raise MismatchError(f"{plan.num_slots} slots do not divide over {num_ranks} ranks; run `placer check`")
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[job.dtype]
    routing = load_routing(job, plan, rank)
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
    batches = [
        Batch(
            token_T=routing.token_T[start:stop],
            slot_LTK=torch.from_numpy(routing.slot_LTK[:, start:stop].copy()).to(device),
            weight_LTK=torch.from_numpy(routing.weight_LTK[:, start:stop].copy()).to(device),
        )
        for start, stop in pairwise(bounds.tolist())
    ]
    return PreparedJob(
        job=job,
        plan=plan,
        batches=batches,
        experts_LP=experts_LP,
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
    prepared: PreparedJob, index: int, hidden_TH: Tensor, rank: int, clock: Clock, beat: Beat
) -> tuple[IntArray, Tensor]:
    """Copies sent, copies received and pairs computed per layer, (L, 3), and the last residual stream (T, H).

    Leaves 1 + 4 L marks in `clock`: the start, then the end of each phase of each layer. Collective; the caller puts a
    barrier before it.
    """
    batch, mode, per_rank = prepared.batches[index], prepared.job.mode, prepared.plan.slots_per_rank
    counts_L3 = np.zeros((len(prepared.experts_LP), 3), dtype=np.int64)
    residual_TH, update_TH = hidden_TH, torch.zeros_like(hidden_TH)
    clock.start()
    for layer, experts_P in enumerate(prepared.experts_LP):
        beat(layer, 0)
        residual_TH = residual_TH + update_TH
        x_TH = attention_stand_in(residual_TH)
        clock.mark()
        beat(layer, 1)
        slot_TK, weight_TK = batch.slot_LTK[layer], batch.weight_LTK[layer]
        rows_XH, rows_P, metadata = dispatch(x_TH, slot_TK, weight_TK, mode=mode, slots_per_rank=per_rank)
        clock.mark()
        beat(layer, 2)
        out_XH = grouped_ffn(rows_XH, rows_P, experts_P)
        clock.mark()
        beat(layer, 3)
        update_TH = combine(out_XH, metadata)
        clock.mark()
        sent, received = sum(metadata.send_R), sum(metadata.receive_R)
        counts_L3[layer] = sent - metadata.send_R[rank], received - metadata.receive_R[rank], metadata.pairs
    return counts_L3, residual_TH + update_TH


def _load_array(path: str, axes: int) -> npt.NDArray[Any]:
    try:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputFileError(f"{path}: cannot be read as .npy ({error})") from error
    if array.ndim != axes:
        raise InputFileError(f"{path}: has {array.ndim} axes; the job needs {axes}")
    return array
