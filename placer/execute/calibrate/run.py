"""Calibrates a cluster: some launches of the ranks that measure, then the fits."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from placer.core.errors import UsageError
from placer.execute.calibrate.assemble import Calibration, assemble
from placer.execute.calibrate.job import CalibrationJob, Part
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
    unshaped: Sequence[Host] = (),
    progress: Callable[[str], None] | None = None,
) -> Calibration:
    """The ClusterSpec of `job.nodes` x `job.ranks_per_node` ranks as measured, on this machine or on a lab's `hosts`.

    unshaped   hosts of an unshaped lab, on which experts and software are measured: behind shaped links what
               processors take would be a small difference of long times
    `timeout_s` is for each launch. Raises ExecutionError for a rank that failed and for a fit that is none,
    DependencyError without torch.
    """
    if launches < 1:
        raise UsageError(f"calibrate.launches is {launches}; give a positive integer")
    parts: dict[Part, Sequence[Host]] = {"links": hosts, "software": unshaped} if unshaped else {"all": hosts}
    samples = []
    with tempfile.TemporaryDirectory(prefix="placer-calibrate-") as folder:
        for index in range(launches):
            found: dict[str, Any] = {}
            for part, where in parts.items():
                job_path, path = Path(folder, f"{part}.json"), Path(folder, f"{part}-{index}.npz")
                replace(job, part=part).save(job_path)
                command = [*WORKER, str(job_path), str(path)]
                launch(command, num_ranks=job.num_ranks, timeout_s=timeout_s, hosts=where, progress=progress)
                with np.load(path, allow_pickle=False) as arrays:
                    found |= {key: arrays[key] for key in arrays.files}
            samples.append(found)
    return assemble(job, samples, name, software_links=not unshaped)
