"""Calibrates a cluster: some launches of the ranks that measure, then the fits."""

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from placer.core.errors import UsageError
from placer.execute.calibrate.assemble import Calibration, assemble
from placer.execute.calibrate.job import CalibrationJob
from placer.execute.launch import Host, launch

__all__ = ["calibrate"]

WORKER = ("-m", "placer.execute.calibrate.worker")


def calibrate(
    job: CalibrationJob,
    *,
    name: str,
    launches: int = 2,
    timeout_s: float = 300.0,
    hosts: Sequence[Host] = (),
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """The ClusterSpec of `job.nodes` x `job.ranks_per_node` ranks as measured, on this machine or on a lab's `hosts`.

    `timeout_s` is for each launch. Raises ExecutionError for a rank that failed and for a fit that is none,
    DependencyError without torch.
    """
    if launches < 1:
        raise UsageError(f"calibrate.launches is {launches}; give a positive integer")
    samples = []
    with tempfile.TemporaryDirectory(prefix="placer-calibrate-") as folder:
        job_path = Path(folder, "job.json")
        job.save(job_path)
        for index in range(launches):
            path = Path(folder, f"samples-{index}.npz")
            command = [*WORKER, str(job_path), str(path)]
            launch(command, num_ranks=job.num_ranks, timeout_s=timeout_s, hosts=hosts, progress=progress)
            with np.load(path, allow_pickle=False) as found:
                samples.append({key: found[key] for key in found.files})
    return assemble(job, samples, name)
