"""`python -m placer.execute.worker JOB.json [JOB.json ...]`: one rank, started by torchrun on any number of machines.

Several jobs are measured together: every round runs one iteration of each, in a seeded random order, so that drift of
the machine falls on all alike (paired comparison). The same code runs on gloo and on NCCL.

Legend: R ranks, I iterations, G spans of one iteration.
"""

import gc
import hashlib
import os
import platform
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from placer.core.errors import ExecutionError, PlacerError, UsageError
from placer.execute.collect import align_clocks, build_timeline, gather_outputs, gather_to_first, judge_outputs
from placer.execute.dispatch import Fabric, exchange
from placer.execute.dispatch.lanes import Lanes
from placer.execute.heartbeat import Heartbeat, die_with
from placer.execute.job import Backend, ReplayJob, metadata_bytes
from placer.execute.loop import Clock, PreparedJob, Record, first_hidden, prepare, run_iteration
from placer.execute.protocol import PROGRESS_PREFIX, RunFolder

__all__ = ["RankEnvironment", "choose_device", "main"]

REALTIME_PRIORITY = 10


@dataclass(frozen=True, slots=True)
class RankEnvironment:
    """What the launcher tells a rank, read once."""

    rank: int
    num_ranks: int
    local_rank: int
    local_ranks: int
    folder: RunFolder | None

    @classmethod
    def read(cls, environ: Mapping[str, str]) -> "RankEnvironment":
        """From torchrun's variables and, where `run_ranks` started us, its folder. Raises UsageError."""
        try:
            rank, num_ranks = int(environ["RANK"]), int(environ["WORLD_SIZE"])
            local_rank, local_ranks = int(environ["LOCAL_RANK"]), int(environ["LOCAL_WORLD_SIZE"])
        except (KeyError, ValueError) as error:
            raise UsageError(f"the environment lacks {error}; start the worker with torchrun") from error
        folder = environ.get(RunFolder.VARIABLE)
        return cls(rank, num_ranks, local_rank, local_ranks, RunFolder(Path(folder)) if folder else None)


@dataclass(slots=True)
class Kept:
    """What one rank keeps of one job's recorded iterations."""

    records: list[Record]
    outputs: list[Tensor]


def choose_device(backend: Backend, environment: RankEnvironment, cuda_devices: int) -> torch.device:
    """The rank's device; a CUDA one means NCCL. Raises ExecutionError where NCCL is asked for and cannot be had."""
    enough = cuda_devices >= environment.local_ranks
    if backend == "nccl" and not enough:
        raise ExecutionError(
            f"backend nccl needs a CUDA device for each of the {environment.local_ranks} ranks of this machine, which "
            f"has {cuda_devices}; use backend gloo or fewer ranks"
        )
    if backend == "gloo" or not enough:
        return torch.device("cpu")
    return torch.device("cuda", environment.local_rank)


def main(arguments: Sequence[str]) -> int:
    """Runs the jobs named; returns the exit code, having said in one line on standard error what went wrong."""
    rank, folder = int(os.environ.get("RANK", "0")), None
    try:
        environment = RankEnvironment.read(os.environ)
        folder = environment.folder
        _watch(environment)
        if not arguments:
            raise UsageError("no job given; usage: torchrun ... -m placer.execute.worker JOB.json")
        _run(environment, [ReplayJob.load(Path(argument)) for argument in arguments])
    except PlacerError as error:
        lost = isinstance(error.__cause__, RuntimeError) and _is_lost_contact(error.__cause__)
        if folder is not None:
            folder.report(rank, type(error).__name__, str(error), lost_contact=lost)
        print(f"rank {rank}: {error}", file=sys.stderr, flush=True)
        return error.exit_code
    return 0


def _watch(environment: RankEnvironment) -> None:
    """Makes this rank end with its launcher, and a programming error leave its reason where the launcher looks."""
    folder = environment.folder
    if folder is None:
        return
    if folder.lock.exists():
        die_with(folder.lock)

    def report(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        folder.report(environment.rank, "ExecutionError", f"{kind.__name__}: {error}", lost_contact=False)
        sys.__excepthook__(kind, error, trace)

    sys.excepthook = report


def _run(environment: RankEnvironment, jobs: list[ReplayJob]) -> None:
    rank, num_ranks = environment.rank, environment.num_ranks
    if len({(job.iterations, job.warmup, job.backend, job.realtime) for job in jobs}) > 1:
        raise UsageError("jobs measured together need the same iterations, warmup, backend and realtime")
    if jobs[0].realtime:
        _ask_for_realtime()
    heartbeat = Heartbeat(environment.folder.heartbeats if environment.folder else None, rank)
    device = choose_device(jobs[0].backend, environment, torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    cache: dict[Any, Any] = {}
    prepared = [prepare(job, rank, num_ranks, device, cache) for job in jobs]
    try:
        _join(environment, device, max(job.timeout_s for job in jobs))
        # connections are made by the first message on some back ends, and must not be timed
        exchange(torch.zeros(num_ranks, 4, device=device), [1] * num_ranks, [1] * num_ranks)
        kept = _measure(prepared, _fabrics(prepared, device), rank, heartbeat)
        heartbeat.finish()
        timelines = _collect(prepared, kept, environment)
        _barrier()
        dist.destroy_process_group()
    except (RuntimeError, MemoryError, OSError) as error:
        # gloo, NCCL, CUDA and the rendezvous all report with these
        raise ExecutionError(_first_line(error)) from error
    if rank == 0:
        _say("checking outputs and writing results")
        for one, (timeline, output_TH) in zip(prepared, timelines, strict=True):
            if output_TH is not None:
                timeline.about.update(judge_outputs(one, output_TH))
            timeline.save(Path(one.job.result_path))


def _ask_for_realtime() -> None:
    """Before any thread or process group is made: threads inherit the priority."""
    try:
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(REALTIME_PRIORITY))
    except (AttributeError, OSError) as error:
        raise ExecutionError(
            f"replay.realtime: this machine refuses SCHED_RR ({error}); run as root, or without realtime"
        ) from error


def _join(environment: RankEnvironment, device: torch.device, timeout_s: float) -> None:
    """Joins the group of all ranks, or says within `timeout_s` where the rendezvous is that cannot be had."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    ranks = {"rank": environment.rank, "world_size": environment.num_ranks}
    try:
        dist.init_process_group(backend, **ranks, timeout=timedelta(seconds=timeout_s))
    except (dist.DistStoreError, dist.DistNetworkError) as error:
        where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
        raise ExecutionError(
            f"the rendezvous at {where} did not bring {environment.num_ranks} ranks together within {timeout_s:g} s "
            f"({_first_line(error)}); is every machine started, and can it reach that address?"
        ) from error
    except RuntimeError as error:
        if not _is_own_interface(error):
            raise
        name = os.environ.get("GLOO_SOCKET_IFNAME", "of this host's name")
        raise ExecutionError(
            f"cannot use network interface {name} ({_first_line(error).rpartition('] ')[2]}); set GLOO_SOCKET_IFNAME "
            "to one that this machine has"
        ) from error


def _fabrics(prepared: list[PreparedJob], device: torch.device) -> list[Fabric]:
    """One for each job; nodes of one size share their process groups. Collective."""
    made = {one.plan.ranks_per_node: Fabric.plain() for one in prepared}
    for one in prepared:
        size = one.plan.ranks_per_node
        two_level = one.job.mode == "per_node" or any(carriage.algorithm == "2dh" for carriage in one.carriage_L)
        if two_level and made[size].ranks_per_node != size:
            made[size] = Fabric.create(size, device)
    return [made[one.plan.ranks_per_node] for one in prepared]


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
            _barrier()
            record, output_TH = run_iteration(
                one, index, hidden_TH, fabrics[position], lanes, clock, partial(heartbeat.beat, step)
            )
            if recorded:
                kept[position].records.append(record)
                if one.job.verify:
                    kept[position].outputs.append(output_TH)
        if rank == 0 and time.monotonic_ns() - said_ns > 1_000_000_000:
            said_ns = time.monotonic_ns()
            _say(f"round {round_ + 1} of {first.warmup + first.iterations}")
    gc.enable()
    lanes.close()
    return kept


def _collect(
    prepared: list[PreparedJob], kept: list[Kept], environment: RankEnvironment
) -> list[tuple[Any, Tensor | None]]:
    """Each job's Timeline and its outputs (None where not verified), on rank 0; nothing elsewhere. Collective."""
    rank, num_ranks = environment.rank, environment.num_ranks
    host_R = gather_to_first(np.array([_host_id(rank)], dtype=np.int64), rank, num_ranks)
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


def _barrier() -> None:
    # on the CPU backend, so that it is the same call for gloo and NCCL
    dist.all_reduce(torch.zeros(1))


def _host_id(rank: int) -> int:
    """Equal for ranks that share a monotonic clock (one boot of one kernel), else different."""
    try:
        text = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii")
    except OSError:
        text = f"rank {rank}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:7], "big")


def _is_lost_contact(error: RuntimeError) -> bool:
    gone = isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
    return gone and not _is_own_interface(error)


def _is_own_interface(error: RuntimeError) -> bool:
    # gloo's only words for an interface without address, or one that cannot be bound, are where it checks
    return "transport/tcp/device.cc" in str(error)


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__


def _say(text: str) -> None:
    print(PROGRESS_PREFIX + text, flush=True)


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # not sys.exit: after a failed collective the back ends' destructors may wait for peers that are gone
    os._exit(code)
