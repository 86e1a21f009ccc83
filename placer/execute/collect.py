"""From what each rank recorded to one Timeline, and to one verdict on the outputs; both on rank 0.

Legend: R ranks, I iterations, L sites, G spans of one iteration, T tokens, K top-k, H hidden size.
"""

import hashlib
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor

from placer.core.errors import ExecutionError
from placer.core.timeline import Timeline
from placer.execute.dispatch import exchange
from placer.execute.experts import ExpertFile, ExpertWeights
from placer.execute.loop import PreparedJob
from placer.execute.reference import reference_forward
from placer.execute.routing import load_routing

__all__ = ["TOLERANCE", "align_clocks", "build_timeline", "gather_outputs", "gather_to_first", "judge_outputs"]

IntArray = npt.NDArray[np.int64]

TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1}
"""Largest difference to the plan-free reference, as a share of its largest value, that a run may have.

`per_expert` runs sum in the reference's order and are normally bit-identical to it; the other modes round partial sums,
which stays near 1e-6 a layer in float32 and 1e-2 in bfloat16. A wrong token or expert is off by 1e-1 or more."""


def gather_to_first(array: IntArray, rank: int, num_ranks: int) -> IntArray | None:
    """Every rank's array of one shape, stacked (R, ...) on rank 0; None elsewhere. Collective, over the CPU backend."""
    mine = torch.from_numpy(np.ascontiguousarray(array))
    parts = [torch.empty_like(mine) for _ in range(num_ranks)] if rank == 0 else None
    dist.gather(mine, parts)
    return None if parts is None else torch.stack(parts).numpy()


def gather_outputs(prepared: PreparedJob, outputs: list[Tensor], rank: int) -> Tensor | None:
    """Outputs of all recorded iterations in the trace's token order, (T, H), on rank 0; None elsewhere. Collective."""
    source_T = np.load(prepared.job.source_path, mmap_mode="r")[: prepared.job.num_tokens]
    count_R = np.bincount(source_T, minlength=dist.get_world_size()).tolist()
    own_TH = torch.cat(outputs)
    nothing_R = [0] * len(count_R)
    arrived_TH = exchange(own_TH, [len(own_TH), *nothing_R[1:]], count_R if rank == 0 else nothing_R)
    if rank != 0:
        return None
    result_TH = torch.empty_like(arrived_TH[:-1])
    # ranks sent their tokens in trace order, so a stable sort by source says whose row is whose
    result_TH[torch.from_numpy(np.argsort(source_T, kind="stable")).to(own_TH.device)] = arrived_TH[:-1]
    return result_TH


def align_clocks(time_RIG2: IntArray, host_R: IntArray) -> IntArray:
    """The times on rank 0's clock. Ranks on its host share it; for the others the barrier before an iteration is one
    moment, so their clocks are set by its end (an error of the barrier's skew, a fraction of a millisecond)."""
    start_RI = time_RIG2[:, :, 0, 0]
    shift_RI = np.where(host_R[:, None] == host_R[0], 0, start_RI[:1] - start_RI)
    return time_RIG2 + shift_RI[:, :, None, None]


def build_timeline(
    time_RIG2: IntArray,
    count_RIG3: IntArray,
    layer_G: IntArray,
    phase_G: IntArray,
    token_bytes: int,
    about: dict[str, Any],
) -> Timeline:
    """Every rank's spans from aligned times (zero: the caller's) and counts (copies sent, received, `tokens`).

    Bytes are hidden states only (copies * token_bytes), as the cost model counts them; `about` has what travels beside.
    """
    ranks, iterations, spans = time_RIG2.shape[:3]
    shape = (ranks, iterations, spans)
    start, end = np.moveaxis(time_RIG2, -1, 0)
    sent, received, tokens = np.moveaxis(count_RIG3, -1, 0)
    columns = {
        "iteration": np.broadcast_to(np.arange(iterations)[None, :, None], shape),
        "layer": np.broadcast_to(layer_G, shape),
        "phase": np.broadcast_to(phase_G, shape),
        "rank": np.broadcast_to(np.arange(ranks)[:, None, None], shape),
        "start_ns": start,
        "duration_ns": end - start,
        "sent_bytes": sent * token_bytes,
        "received_bytes": received * token_bytes,
        "tokens": tokens,
    }
    order = np.lexsort((columns["rank"].ravel(), start.ravel(), columns["iteration"].ravel()))
    types = {"iteration": np.int32, "layer": np.int32, "phase": np.int8, "rank": np.int32}
    return Timeline(
        about=about, **{name: c.ravel()[order].astype(types.get(name, np.int64)) for name, c in columns.items()}
    )


def judge_outputs(prepared: PreparedJob, output_TH: Tensor) -> dict[str, Any]:
    """What verification adds to a Timeline's `about`; raises ExecutionError where outputs are wrong.

    max_abs_error, max_rel_error   against the plan-free reference; relative to its largest value
    bit_identical                  to the reference that sums in the mode's order
    output_sha256                  of the outputs' bytes in trace order
    """
    job = prepared.job
    routing = load_routing(job, prepared.plan)
    placed = routing.slot_LTK >= 0
    device = prepared.device
    expert_LTK = torch.from_numpy(np.where(placed, routing.expert_LTK.astype(np.int64), -1)).to(device)
    weight_LTK = torch.from_numpy(routing.weight_LTK).to(device)
    rank_LTK = torch.from_numpy(np.where(placed, routing.slot_LTK // prepared.plan.slots_per_rank, -1)).to(device)
    with ExpertFile(Path(job.experts_path)) as file, torch.inference_mode():

        def load(site: int, expert: int) -> ExpertWeights:
            return file.load(job.stored_layers[site], expert, dtype=prepared.dtype, device=device)

        forward = partial(
            reference_forward, job.seed, prepared.hidden_size, expert_LTK, weight_LTK, load, dtype=prepared.dtype
        )
        plain_TH = forward()
        per_node = prepared.plan.ranks_per_node if job.mode == "per_node" else None
        ordered_TH = plain_TH
        if job.mode != "per_expert":
            ordered_TH = forward(rank_LTK=rank_LTK, ranks_per_node=per_node)
    error = float((output_TH.double() - plain_TH.double()).abs().max()) if len(output_TH) else 0.0
    scale = float(plain_TH.abs().max()) if len(output_TH) else 1.0
    # negated, so that a NaN among the outputs is refused too
    if not error <= TOLERANCE[job.dtype] * scale:
        raise ExecutionError(
            f"outputs differ from the single-process reference by {error:.3g} (largest value {scale:.3g}, tolerance "
            f"{TOLERANCE[job.dtype] * scale:.3g}); the run is wrong, please report it with its plan"
        )
    raw = output_TH.cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return {
        "max_abs_error": error,
        "max_rel_error": error / scale if scale else 0.0,
        "bit_identical": bool(torch.equal(output_TH, ordered_TH)),
        "output_sha256": hashlib.sha256(raw).hexdigest(),
    }
