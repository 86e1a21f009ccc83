"""`python -m placer.execute.worker JOB.json [JOB.json ...]`: one rank, started by torchrun on any number of machines.

Several jobs are measured together: every round runs one iteration of each, in a seeded random order, so that drift of
the machine falls on all alike (paired comparison). The same code runs on gloo and on NCCL.

Legend: R ranks, I iterations, G spans of one iteration.
"""

import gc
import os
import platform
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from placer.core.errors import ExecutionError, UsageError
from placer.execute.collect import align_clocks, build_timeline, gather_outputs, gather_to_first, judge_outputs
from placer.execute.dispatch import Fabric
from placer.execute.dispatch.lanes import Lanes
from placer.execute.heartbeat import Heartbeat
from placer.execute.job import ReplayJob, metadata_bytes
from placer.execute.loop import Clock, PreparedJob, Record, first_hidden, prepare, run_iteration
from placer.execute.rank import (
    RankEnvironment,
    ask_for_realtime,
    barrier,
    choose_device,
    first_line,
    host_id,
    join_ranks,
    make_fabrics,
    say,
    serve,
)

__all__ = ["RankEnvironment", "choose_device", "main"]


@dataclass(slots=True)
class Kept:
    """What one rank keeps of one job's recorded iterations."""

    records: list[Record]
    outputs: list[Tensor]


def main(arguments: Sequence[str]) -> int:
    """Runs the jobs named; returns the exit code, having said in one line on standard error what went wrong."""

    def run(environment: RankEnvironment, paths: list[Path]) -> None:
        _run(environment, [ReplayJob.load(path) for path in paths])

    return serve("placer.execute.worker", arguments, run)


def _run(environment: RankEnvironment, jobs: list[ReplayJob]) -> None:
    rank, num_ranks = environment.rank, environment.num_ranks
    if len({(job.iterations, job.warmup, job.backend, job.realtime) for job in jobs}) > 1:
        raise UsageError("jobs measured together need the same iterations, warmup, backend and realtime")
    if jobs[0].realtime:
        ask_for_realtime("replay")
    heartbeat = Heartbeat(environment.folder.heartbeats if environment.folder else None, rank)
    device = choose_device(jobs[0].backend, environment, torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cache: dict[Any, Any] = {}
    prepared = [prepare(job, rank, num_ranks, device, cache) for job in jobs]
    try:
        join_ranks(environment, device, max(job.timeout_s for job in jobs))
        kept = _measure(prepared, make_fabrics(_nodes(prepared), device), rank, heartbeat)
        heartbeat.finish()
        timelines = _collect(prepared, kept, environment)
        barrier()
        dist.destroy_process_group()
    except (RuntimeError, MemoryError, OSError) as error:
        # gloo, NCCL, CUDA and the rendezvous all report with these
        raise ExecutionError(first_line(error)) from error
    if rank == 0:
        say("checking outputs and writing results")
        for one, (timeline, output_TH) in zip(prepared, timelines, strict=True):
            if output_TH is not None:
                timeline.about.update(judge_outputs(one, output_TH))
            timeline.save(Path(one.job.result_path))


def _nodes(prepared: list[PreparedJob]) -> list[tuple[int, bool]]:
    """What `make_fabrics` needs to know of each job."""
    return [
        (
            one.plan.ranks_per_node,
            one.job.mode == "per_node" or any(carriage.algorithm == "2dh" for carriage in one.carriage_L),
        )
        for one in prepared
    ]


def _measure(prepared: list[PreparedJob], fabrics: list[Fabric], rank: int, heartbeat: Heartbeat) -> list[Kept]:
    """Runs every round; what was recorded of each job."""
    first = prepared[0].job
    rng = np.random.default_rng(first.order_seed)
    kept = [Kept([], []) for _ in prepared]
    clock, lanes = Clock(prepared[0].device), Lanes(prepared[0].device)
    said_ns = time.monotonic_ns()
    gc.collect()
    gc.disable()
    for round_ in range(first.warmup + first.iterations):
        recorded = round_ >= first.warmup
        index = round_ - first.warmup if recorded else round_ % first.iterations
        for turn, position in enumerate(rng.permutation(len(prepared)).tolist()):
            one = prepared[position]
            hidden_TH = first_hidden(one, index)
            step = round_ * len(prepared) + turn
            heartbeat.beat(step, 0, 0)
            barrier()
            record, output_TH = run_iteration(
                one, index, hidden_TH, fabrics[position], lanes, clock, partial(heartbeat.beat, step)
            )
            if recorded:
                kept[position].records.append(record)
                if one.job.verify:
                    kept[position].outputs.append(output_TH)
        if rank == 0 and time.monotonic_ns() - said_ns > 1_000_000_000:
            said_ns = time.monotonic_ns()
            say(f"round {round_ + 1} of {first.warmup + first.iterations}")
    gc.enable()
    lanes.close()
    return kept


def _collect(
    prepared: list[PreparedJob], kept: list[Kept], environment: RankEnvironment
) -> list[tuple[Any, Tensor | None]]:
    """Each job's Timeline and its outputs (None where not verified), on rank 0; nothing elsewhere. Collective."""
    rank, num_ranks = environment.rank, environment.num_ranks
    host_R = gather_to_first(np.array([host_id(rank)], dtype=np.int64), rank, num_ranks)
    gathered = []
    for one, mine in zip(prepared, kept, strict=True):
        time_RIG2 = gather_to_first(np.stack([record.time_G2 for record in mine.records]), rank, num_ranks)
        count_RIG3 = gather_to_first(np.stack([record.count_G3 for record in mine.records]), rank, num_ranks)
        output_TH = gather_outputs(one, mine.outputs, rank) if one.job.verify else None
        if time_RIG2 is not None and host_R is not None:
            gathered.append((one, mine.records[0], align_clocks(time_RIG2, host_R[:, 0]), count_RIG3, output_TH))
    if host_R is None:
        return []
    zero_ns = min(int(time_RIG2.min()) for _, _, time_RIG2, *_ in gathered)
    result = []
    for one, record, time_RIG2, count_RIG3, output_TH in gathered:
        assert count_RIG3 is not None
        about = _about(one, environment, len(np.unique(host_R)))
        spans = (record.layer_G, record.phase_G)
        timeline = build_timeline(time_RIG2 - zero_ns, count_RIG3, *spans, about["token_bytes"], about)
        result.append((timeline, output_TH))
    return result


def _about(one: PreparedJob, environment: RankEnvironment, hosts: int) -> dict[str, Any]:
    """What the Timeline says of the run: with `token_bytes` and the sizes, the simulator can predict the same job."""
    job, plan, width = one.job, one.plan, one.dtype.itemsize
    cuda = one.device.type == "cuda"
    return {
        **job.about,
        "source": "measured",
        "mode": job.mode,
        "kind": job.kind,
        "algorithms": [carriage.algorithm for carriage in one.carriage_L],
        "degrees": list(one.degree_L),
        "num_ranks": plan.num_ranks,
        "ranks_per_node": plan.ranks_per_node,
        "plan_sha256": plan.sha256,
        "replica_choice": plan.replica_choice,
        "tokens_per_iteration": job.tokens_per_iteration,
        "iterations": job.iterations,
        "warmup": job.warmup,
        "seed": job.seed,
        "realtime": job.realtime,
        "dtype": job.dtype,
        "weight_bytes": width,
        "activation_bytes": width,
        "hidden_size": one.hidden_size,
        "moe_intermediate_size": one.moe_intermediate_size,
        "token_bytes": one.hidden_size * width,
        "metadata_bytes_per_copy": metadata_bytes(job.mode, int(one.batches[0].slot_LTK.shape[2])),
        "backend": "nccl" if cuda else "gloo",
        "device": torch.cuda.get_device_name(one.device) if cuda else platform.machine(),
        "hosts": hosts,
        "threads_per_rank": torch.get_num_threads(),
        "torch": torch.__version__,
    }


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # not sys.exit: after a failed collective the back ends' destructors may wait for peers that are gone
    os._exit(code)
