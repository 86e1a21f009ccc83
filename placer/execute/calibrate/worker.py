"""`python -m placer.execute.calibrate.worker JOB.json SAMPLES.npz`: one rank of a calibration, started by `launch`."""

import os
import platform
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from placer.core.errors import ExecutionError, PlacerError, UsageError
from placer.execute.calibrate.assemble import MODES, expert_cases, packing_tokens
from placer.execute.calibrate.job import CalibrationJob
from placer.execute.calibrate.measurements import IN_A_ROW, Bench
from placer.execute.collect import gather_to_first
from placer.execute.dispatch import exchange
from placer.execute.heartbeat import Heartbeat, die_with
from placer.execute.protocol import PROGRESS_PREFIX
from placer.execute.worker import RankEnvironment, choose_device

__all__ = ["main"]

IntArray = npt.NDArray[np.int64]
REALTIME_PRIORITY = 10


def main(arguments: Sequence[str]) -> int:
    """Measures everything; rank 0 writes the samples. The exit code, one line on standard error if it is not 0."""
    rank, folder = int(os.environ.get("RANK", "0")), None
    try:
        environment = RankEnvironment.read(os.environ)
        folder = environment.folder
        if folder is not None and folder.lock.exists():
            die_with(folder.lock)
        if len(arguments) != 2:
            raise UsageError("usage: torchrun ... -m placer.execute.calibrate.worker JOB.json SAMPLES.npz")
        _run(environment, CalibrationJob.load(Path(arguments[0])), Path(arguments[1]))
    except (PlacerError, RuntimeError, MemoryError, OSError) as error:
        known = error if isinstance(error, PlacerError) else ExecutionError(f"{type(error).__name__}: {error}")
        lost = isinstance(error, dist.DistError) or "gloo" in str(error) or "NCCL" in str(error)
        text = " ".join(str(known).split())
        if folder is not None:
            folder.report(rank, type(known).__name__, text, lost_contact=lost)
        print(f"rank {rank}: {text}", file=sys.stderr, flush=True)
        return known.exit_code
    return 0


def _run(environment: RankEnvironment, job: CalibrationJob, samples_path: Path) -> None:
    rank, num_ranks = environment.rank, environment.num_ranks
    heartbeat = Heartbeat(environment.folder.heartbeats if environment.folder else None, rank)
    if job.realtime:
        _ask_for_realtime()
    device = choose_device(job.backend, environment, torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, rank=rank, world_size=num_ranks, timeout=timedelta(seconds=job.timeout_s))
    exchange(torch.zeros(num_ranks, 4, device=device), [1] * num_ranks, [1] * num_ranks)
    samples = _measure(job, environment, device, heartbeat)
    heartbeat.finish()
    if rank == 0:
        about = {
            "backend": "nccl" if device.type == "cuda" else "gloo",
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
            "torch": torch.__version__,
        }
        samples |= {f"about/{key}": np.array(value) for key, value in about.items()}
        np.savez(samples_path, **samples)  # type: ignore[arg-type]  # its stub takes names for its own keyword
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()


def _ask_for_realtime() -> None:
    try:
        # before the group is made, so that its threads inherit it
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(REALTIME_PRIORITY))
    except (OSError, AttributeError) as error:
        raise ExecutionError(
            f"realtime priority cannot be had ({error}); run as root or set realtime: false"
        ) from error


def _measure(
    job: CalibrationJob, environment: RankEnvironment, device: torch.device, heartbeat: Heartbeat
) -> dict[str, Any]:
    """Samples by name on rank 0, nothing of use elsewhere.

    link/NAME      (I, N) from the last start to the last end        solo, together  (I, N) one rank's, everybody's
    packing/MODE   (I, N) and moved/MODE (N,), means over ranks      few/MODE, layer  (I,)
    """
    rank, num_ranks = environment.rank, environment.num_ranks
    bench = Bench(job, rank, device)
    samples: dict[str, npt.NDArray[Any]] = {}
    step = 0

    def begin(what: str) -> None:
        nonlocal step
        heartbeat.beat(step, 0, 0)
        step += 1
        if rank == 0:
            print(f"{PROGRESS_PREFIX}measuring {what}", flush=True)

    def gathered(values: IntArray) -> IntArray:
        found = gather_to_first(values, rank, num_ranks)
        return values[None] if found is None else found

    def last(marks_INM: IntArray) -> IntArray:
        marks_RINM = gathered(marks_INM)
        return np.asarray(marks_RINM[..., 1].max(axis=0) - marks_RINM[..., 0].max(axis=0))

    def whole(marks_INM: IntArray) -> IntArray:
        # ranks that share a core start when others are done
        marks_RINM = gathered(marks_INM)
        return np.asarray(marks_RINM[..., 1].max(axis=0) - marks_RINM[..., 0].min(axis=0))

    for name, pattern_RR in job.patterns().items():
        begin(f"messages: {name}")
        samples[f"link/{name}"] = last(bench.messages(pattern_RR, job.copies_N(name)))
    begin("experts")
    cases = expert_cases(job)
    solo_INM = bench.experts(cases, active=rank == 0)
    samples["solo"] = (solo_INM[..., 1] - solo_INM[..., 0]) / IN_A_ROW
    samples["together"] = whole(bench.experts(cases, active=True)) / IN_A_ROW
    begin("packing and fixed costs")
    for mode in MODES:
        times_IN, moved_N = bench.packing(mode, packing_tokens(job))
        samples[f"packing/{mode}"], samples[f"moved/{mode}"] = gathered(times_IN).mean(axis=0), gathered(moved_N)
        samples[f"moved/{mode}"] = samples[f"moved/{mode}"].mean(axis=0)
        samples[f"few/{mode}"] = last(bench.few(mode))[:, 0]
    samples["layer"] = gathered(bench.layer()).mean(axis=0)[:, 0]
    return samples


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # not sys.exit: after a failed collective the back ends' destructors may wait for peers that are gone
    os._exit(code)
