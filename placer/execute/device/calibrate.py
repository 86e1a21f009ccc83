"""Calibration of one machine: its disk, and the loop itself, fitted to a DeviceSpec or refused.

Legend: K levels, N numbers of tokens, I repetitions.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from placer.core.cluster import LinkClass
from placer.core.device.planes import PlaneIndex
from placer.core.device.spec import DeviceCompute, DeviceSpec
from placer.core.errors import ExecutionError, UsageError
from placer.execute.calibrate.fit import MAX_RESIDUAL, fit_line, short
from placer.execute.device.bench import (
    LoopTimes,
    loop_times,
    model_layer_times,
    placeholder_device,
    read_sizes,
    time_reads,
    times_of_loads,
)

__all__ = ["calibrate_device", "fit_compute"]

FloatArray = npt.NDArray[np.float64]
TOKENS = (1, 2, 4, 8, 16, 32, 64)


def calibrate_device(
    index: PlaneIndex,
    *,
    memory_mib: float,
    limit: float | None = None,
    model_path: Path | None = None,
    name: str = "this machine",
    tokens: Sequence[int] = TOKENS,
    top_k: int = 2,
    repetitions: int = 5,
    seed: int = 0,
    progress: Callable[[str], None] | None = None,
) -> tuple[DeviceSpec, dict[str, Any]]:
    """The device that this machine is for planes of this file, and how good its numbers are (plain JSON types).

    limit        megabytes per second that reads are held to, as the runs to be predicted will be
    model_path   a checkpoint whose own attention gives layer_us; None: the block that replay runs
    tokens       numbers of tokens of one expert at which the feed-forward is timed, ascending

    Reads are timed at the planes' sizes, at random places; the rest comes from the loop itself with a few experts
    resident, so that what it does between items is counted.
    Raises ExecutionError where the disk's times are no line, InfeasibleError for too small a memory.
    """
    if len(tokens) < 2 or list(tokens) != sorted(set(tokens)) or tokens[0] < 1:
        raise UsageError(f"tokens is {list(tokens)}; give two or more whole numbers from 1, ascending")
    if repetitions < 2 or top_k < 1:
        raise UsageError(f"repetitions is {repetitions} and top_k {top_k}; give 2 or more, and 1 or more")
    say = progress or (lambda _: None)
    device = placeholder_device(memory_mib, limit)
    say("timing reads of the disk")
    disk, about_disk = _disk(index, device, top_k, repetitions, seed)
    say("timing the loop with everything in memory")
    times = loop_times(index, device, tokens, top_k=top_k, repetitions=repetitions, seed=seed)
    if model_path is not None:
        say("timing the model's own layers")
        tokens_N, layer_N = model_layer_times(model_path, index, device, repetitions=repetitions, seed=seed)
        times = replace(times, tokens_N=tokens_N, layer_N=layer_N)
    compute, about_compute = fit_compute(times, tokens, nested=index.ladder.nested)
    about = {
        "disk": about_disk,
        "compute": about_compute,
        "layers_of": "replay" if model_path is None else Path(model_path).name,
        "shapes": [list(shape) for shape in index.shapes],
        "ladder": index.ladder.to_dict(),
        "repetitions": repetitions,
        "top_k": top_k,
        "torch": torch.__version__,
    }
    return replace(device, name=name, disk=disk, compute=compute), about


def _disk(
    index: PlaneIndex, device: DeviceSpec, top_k: int, repetitions: int, seed: int
) -> tuple[LinkClass, dict[str, Any]]:
    """The line through reads by themselves; what the loop's own take more (or less) goes into its start."""
    limit = device.disk_limit_mbytes_per_s
    sizes = read_sizes(index)
    time_IN = time_reads(index, sizes, limit, 8 * repetitions, np.random.default_rng(seed))
    fit = fit_line("the disk", sizes, time_IN[None])
    loads = times_of_loads(index, device, top_k=top_k, iterations=repetitions, seed=seed)
    more_ns = np.mean([np.median(times) - fit.alpha_ns - size / fit.gbytes_per_s for size, times in loads.items()])
    link = LinkClass(
        gbytes_per_s=short(fit.gbytes_per_s), alpha_us=short(max(0.0, fit.alpha_ns + float(more_ns)) / 1e3)
    )
    about = {
        "r2": short(fit.quality.r2),
        "max_residual": short(fit.quality.max_residual),
        "bytes": sizes,
        "median_us": [short(time / 1e3) for time in np.median(time_IN, axis=0)],
        "loop_median_us": {str(size): short(float(np.median(times)) / 1e3) for size, times in loads.items()},
        "loop_residual": {
            str(size): short((link.alpha_ns + size / link.gbytes_per_s) / float(np.median(times)) - 1)
            for size, times in loads.items()
        },
        "limit_mbytes_per_s": limit,
    }
    return link, about


def fit_compute(times: LoopTimes, tokens: Sequence[int], *, nested: bool) -> tuple[DeviceCompute, dict[str, Any]]:
    """What the loop's times say: base and residual planes, the feed-forward's curve, a layer's fixed part and tokens'.

    Only base_us + ffn_us can be told apart from residual_us; the curve begins at 0 tokens by its own slope, and the
    rest is base_us. Raises ExecutionError where an expert's time does not grow with its tokens, or where it is not a
    plane's time for every level and the feed-forward's.
    """
    expert_KN = times.expert_KN / 1e3
    level_K = np.arange(len(expert_KN))
    residual_us = 0.0
    if nested and len(expert_KN) > 1:
        steps = (expert_KN[1:] - expert_KN[0]) / level_K[1:, None]
        residual_us = max(0.0, float(np.median(steps)))
    whole_N = np.median(expert_KN - residual_us * level_K[:, None], axis=0)
    if not whole_N[-1] > whole_N[0]:
        raise ExecutionError(
            f"calibration of experts refused: {tokens[-1]} tokens take {whole_N[-1]:.1f} us and {tokens[0]} "
            f"{whole_N[0]:.1f} us; measure on a quiet machine, or more tokens"
        )
    found_KN = whole_N + residual_us * level_K[:, None]
    residual = float(np.abs(found_KN / expert_KN - 1).max())
    if nested and not residual <= MAX_RESIDUAL:
        raise ExecutionError(
            f"calibration of experts refused: {residual_us:.3g} us a residual plane leave {100 * residual:.0f} % (at "
            f"most {100 * MAX_RESIDUAL:.0f} %); measure on a quiet machine"
        )
    slope = (whole_N[-1] - whole_N[0]) / (tokens[-1] - tokens[0])
    base_us = max(0.0, float(min(whole_N)) - slope * tokens[0])
    layer_us, layer_token_us, r2 = _line(times.tokens_N, times.layer_N / 1e3)
    compute = DeviceCompute(
        layer_us=short(layer_us),
        layer_token_us=short(layer_token_us),
        base_us=short(base_us),
        residual_us=short(residual_us),
        ffn_tokens=tuple(int(n) for n in tokens),
        ffn_us=tuple(short(max(0.0, float(value) - base_us)) for value in whole_N),
        io_slowdown=short(times.slowdown),
    )
    about = {
        "expert_us": [[short(value) for value in row] for row in expert_KN.tolist()],
        "expert_max_residual": short(residual),
        "layer_tokens": times.tokens_N.tolist(),
        "layer_median_us": [short(value / 1e3) for value in times.layer_N.tolist()],
        "layer_r2": short(r2),
    }
    return compute, about


def _line(x_N: npt.NDArray[np.int64], y_N: FloatArray) -> tuple[float, float, float]:
    """Start and slope, neither below 0, of the least relative squares; and R2."""
    x_N = x_N.astype(np.float64)
    design = np.stack([np.ones_like(x_N), x_N], axis=1) / y_N[:, None]
    start, slope = np.linalg.lstsq(design, np.ones_like(y_N), rcond=None)[0].tolist()
    if slope < 0:
        start, slope = float(np.median(y_N)), 0.0
    elif start < 0:
        start, slope = 0.0, float((x_N / y_N).sum() / ((x_N / y_N) ** 2).sum())
    total = float(((y_N - y_N.mean()) ** 2).sum())
    left = float(((y_N - start - slope * x_N) ** 2).sum())
    return start, slope, 1 - left / total if total > 0 else 0.0
