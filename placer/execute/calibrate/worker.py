"""`python -m placer.execute.calibrate.worker JOB.json SAMPLES.npz`: one rank of a calibration, started by `launch`."""

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from placer.core.errors import ExecutionError, UsageError
from placer.core.modes import DISPATCH_MODES
from placer.execute.calibrate.assemble import exchange_tokens, expert_cases
from placer.execute.calibrate.job import CalibrationJob
from placer.execute.calibrate.measurements import IN_A_ROW, LAYERS, Bench
from placer.execute.collect import gather_to_first
from placer.execute.heartbeat import Heartbeat
from placer.execute.rank import (
    RankEnvironment,
    ask_for_realtime,
    barrier,
    choose_device,
    first_line,
    join_ranks,
    say,
    serve,
)

__all__ = ["main"]

IntArray = npt.NDArray[np.int64]


def main(arguments: Sequence[str]) -> int:
    """Measures what the job asks for; rank 0 writes the samples. The exit code, one line on standard error if not 0."""
    return serve("placer.execute.calibrate.worker", arguments, _run)


def _run(environment: RankEnvironment, paths: list[Path]) -> None:
    if len(paths) != 2:
        raise UsageError("usage: torchrun ... -m placer.execute.calibrate.worker JOB.json SAMPLES.npz")
    job, rank = CalibrationJob.load(paths[0]), environment.rank
    heartbeat = Heartbeat(environment.folder.heartbeats if environment.folder else None, rank)
    if job.realtime:
        ask_for_realtime("calibrate")
    device = choose_device(job.backend, environment, torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        join_ranks(environment, device, job.timeout_s)
        samples = _measure(job, environment, device, heartbeat)
        heartbeat.finish()
        if rank == 0:
            about = {
                "backend": "nccl" if device.type == "cuda" else "gloo",
                "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
                "torch": torch.__version__,
            }
            samples |= {f"about/{key}": np.array(value) for key, value in about.items()}
            np.savez(paths[1], **samples)  # type: ignore[arg-type]  # its stub takes names for its own keyword
        barrier()
        dist.destroy_process_group()
    except (RuntimeError, MemoryError, OSError) as error:
        raise ExecutionError(first_line(error)) from error


def _measure(
    job: CalibrationJob, environment: RankEnvironment, device: torch.device, heartbeat: Heartbeat
) -> dict[str, Any]:
    """Samples by name on rank 0, nothing of use elsewhere.

    link/NAME       (I, N) from the last start to the last end       solo, together  (I, N) one rank's, everybody's
    exchange/MODE   (I, N) likewise                                  layer           (I,)
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
            say(f"measuring {what}")

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

    for name, pattern_RR in job.patterns().items() if job.part != "software" else ():
        begin(f"messages: {name}")
        samples[f"link/{name}"] = last(bench.messages(pattern_RR, job.copies_N(name)))
    if job.part != "links":
        begin("experts")
        cases = expert_cases(job)
        solo_INM = bench.experts(cases, active=rank == 0)
        samples["solo"] = (solo_INM[..., 1] - solo_INM[..., 0]) / IN_A_ROW
        samples["together"] = whole(bench.experts(cases, active=True)) / IN_A_ROW
        for mode in DISPATCH_MODES:
            begin(f"exchanges: {mode}")
            samples[f"exchange/{mode}"] = last(bench.exchanges(mode, exchange_tokens(job))) / LAYERS
        samples["layer"] = gathered(bench.layer()).mean(axis=0)[:, 0]
    bench.close()
    return samples


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    # not sys.exit: after a failed collective the back ends' destructors may wait for peers that are gone
    os._exit(code)
