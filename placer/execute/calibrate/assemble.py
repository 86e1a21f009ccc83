"""From what the ranks measured to a ClusterSpec, and the block that says how good its numbers are.

Legend: J launches, I repetitions, N sizes, R ranks.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.cluster import ClusterSpec, Compute, LinkClass, Software
from placer.core.cost import leg_times
from placer.core.errors import ExecutionError
from placer.execute.calibrate.fit import LinkFit, Quality, fit_experts, fit_link, fit_tail
from placer.execute.calibrate.job import CalibrationJob
from placer.execute.job import ExecutionMode

__all__ = ["MODES", "Calibration", "assemble", "expert_cases", "packing_tokens"]

Samples = Mapping[str, npt.NDArray[Any]]
MODES: tuple[ExecutionMode, ...] = ("per_expert", "per_rank")
TRIMMED = 0.1
DIGITS = 4


@dataclass(frozen=True, slots=True)
class Calibration:
    """A cluster, and about it: the qualities of its fits in plain JSON types, without a date."""

    cluster: ClusterSpec
    about: dict[str, Any]


def expert_cases(job: CalibrationJob) -> list[tuple[int, int]]:
    """(experts, rows of each) of the GEMM curve: all rows for a rank's experts, and for one expert alone."""
    numbers = sorted({1, job.experts_per_rank})
    return [(experts, rows) for experts in numbers for rows in job.rows]


def packing_tokens(job: CalibrationJob) -> list[int]:
    """Tokens of each rank when packing is measured: a quarter of an iteration's to twice as many."""
    return [job.tokens_per_rank // 4, job.tokens_per_rank // 2, job.tokens_per_rank, 2 * job.tokens_per_rank]


def assemble(job: CalibrationJob, launches: Sequence[Samples], name: str) -> Calibration:
    """The cluster that the samples of one or more launches give.

    Raises ExecutionError, with the numbers, where a fit is none.
    """
    about: dict[str, Any] = {key: str(launches[0][f"about/{key}"]) for key in ("backend", "device", "torch")}
    about |= {
        "dtype": job.dtype,
        "hidden_size": job.hidden_size,
        "moe_intermediate_size": job.moe_intermediate_size,
        "realtime": job.realtime,
        "launches": len(launches),
        "repetitions": job.repetitions,
    }
    empty_ns = float(np.median(_stack(launches, "link/empty")))
    about["empty_exchange_us"] = _short(empty_ns / 1e3)
    links = {}
    for kind in ("intra", "inter", "uplink"):
        if f"link/{kind}" in launches[0]:
            links[kind], about[kind] = _link(job, launches, kind, empty_ns)
    compute, shared, about["experts"] = _experts(job, launches)
    # a link that does not exist is never used, but must be there
    intra, inter = (links.get(kind, links.get(other)) for kind, other in (("intra", "inter"), ("inter", "intra")))
    assert intra is not None
    assert inter is not None
    cluster = ClusterSpec(
        name=name,
        nodes=job.nodes,
        ranks_per_node=job.ranks_per_node,
        memory_gib=_memory_gib(job.num_ranks),
        intra=intra,
        inter=inter,
        uplink=links.get("uplink"),
        compute=compute,
    )
    for kinds, pattern in ((("intra",), "intra_all"), (("inter", "uplink"), "all")):
        if f"link/{pattern}" in launches[0]:
            cluster, about[f"{kinds[0]}_tail"] = _with_tail(job, launches, cluster, kinds, pattern, empty_ns)
    waiting = 1.0 if shared is None else max(1.0, job.num_ranks / shared)
    software, about["packing"] = _software(job, launches, cluster, waiting)
    return Calibration(replace(cluster, software=replace(software, shared_cores=shared)), about)


def _link(
    job: CalibrationJob, launches: Sequence[Samples], kind: str, empty_ns: float
) -> tuple[LinkClass, dict[str, Any]]:
    """One class of link; what an exchange costs without a message is the software's, not the link's."""
    messages = job.ranks_per_node if kind == "uplink" else 1
    bytes_N = np.array(job.copies_N(kind)) * job.row_bytes * messages
    time_JIN = _stack(launches, f"link/{kind}")
    fit: LinkFit = fit_link(f"link class {kind}", bytes_N, time_JIN)
    link = LinkClass(gbytes_per_s=_short(fit.gbytes_per_s), alpha_us=_short(max(0.0, fit.alpha_ns - empty_ns) / 1e3))
    median_N = np.median(time_JIN.reshape(-1, len(bytes_N)), axis=0)
    about = _about(fit.quality) | {
        "burst_bytes": round(fit.burst_bytes),
        "bytes": bytes_N.tolist(),
        "median_us": [_short(value / 1e3) for value in median_N],
    }
    return link, about


def _with_tail(
    job: CalibrationJob,
    launches: Sequence[Samples],
    cluster: ClusterSpec,
    kinds: tuple[str, ...],
    pattern: str,
    empty_ns: float,
) -> tuple[ClusterSpec, dict[str, Any]]:
    """The cluster with the tail of an even all-to-all on these link classes."""
    copies_NRR = np.array(job.copies_N(pattern))[:, None, None] * job.patterns()[pattern]
    # a mean, as an iteration adds many legs up, but not of the few that something else held up
    time_N = _trimmed_mean(_stack(launches, f"link/{pattern}").reshape(-1, len(copies_NRR)))

    def tailed(tail: float) -> ClusterSpec:
        found = {kind: getattr(cluster, kind) for kind in kinds if getattr(cluster, kind) is not None}
        links = {kind: replace(link, tail=tail) for kind, link in found.items()}
        if cluster.nodes == 2 and "uplink" in links:
            # all that crosses an uplink counts as one message there, so the tail is a slower uplink
            uplink = found["uplink"]
            links["uplink"] = replace(uplink, gbytes_per_s=_short(uplink.gbytes_per_s / tail))
        return replace(cluster, **links)

    def predict(tail: float) -> npt.NDArray[np.float64]:
        return np.asarray(leg_times(tailed(tail), copies_NRR, job.row_bytes).slowest_W + empty_ns, dtype=np.float64)

    tail, residual = fit_tail(predict, time_N)
    about = {
        "tail": _short(tail),
        "max_residual": _short(residual),
        "mean_us": [_short(value / 1e3) for value in time_N],
        "closed_form_us": [_short(value / 1e3) for value in predict(tail)],
    }
    return tailed(max(1.0, _short(tail))), about


def _experts(job: CalibrationJob, launches: Sequence[Samples]) -> tuple[Compute, int | None, dict[str, Any]]:
    """Speed of one rank when all compute at once, and how many cores they share."""
    experts_N, rows_N = np.array(expert_cases(job)).T
    solo_JIN, together_JIN = _stack(launches, "solo"), _stack(launches, "together")
    slower = float(np.median(np.median(together_JIN, axis=(0, 1)) / np.median(solo_JIN, axis=(0, 1))))
    cores = round(job.num_ranks / slower)
    shared = max(1, cores) if cores < job.num_ranks else None
    # cores with everybody's work are what the closed form multiplies by, so it is taken out here
    share = 1.0 if shared is None else shared / job.num_ranks
    fit = fit_experts("experts", experts_N, rows_N, together_JIN * share)
    # the closed form has the greater of reading and computing; where both count, all of a rank's experts are read
    # before, and what is left of reading is that a few rows cost as much as the fewest measured
    launch_ns = fit.launch_ns + (job.experts_per_rank * fit.read_ns if fit.form == "sum" else 0.0)
    read_ns = max(fit.read_ns if fit.form == "max" else 0.0, job.rows[0] * fit.row_ns)
    compute = Compute(
        tflops=_short(2 * job.expert_params / fit.row_ns / 1e3),
        weight_read_gbytes_per_s=_short(job.expert_bytes / read_ns),
        launch_us=_short(launch_ns / 1e3),
    )
    solo = fit_experts("experts of one rank alone", experts_N, rows_N, solo_JIN)
    about = _about(fit.quality) | {
        "experts": experts_N.tolist(),
        "rows": rows_N.tolist(),
        "median_us": [_short(value / 1e3) for value in np.median(together_JIN, axis=(0, 1))],
        "form": fit.form,
        "read_us": _short(fit.read_ns / 1e3),
        "together_over_solo": _short(slower),
        "solo_tflops": _short(2 * job.expert_params / solo.row_ns / 1e3),
    }
    return compute, shared, about


def _software(
    job: CalibrationJob, launches: Sequence[Samples], cluster: ClusterSpec, waiting: float
) -> tuple[Software, dict[str, Any]]:
    """Fixed costs and the rate of packing; `waiting` is how much longer work takes where ranks share cores."""
    time_JIN = np.concatenate([_stack(launches, f"packing/{mode}") for mode in MODES], axis=2)
    # dispatch and combine both pack what one of them sends and unpack what it receives
    bytes_N = np.concatenate([launches[0][f"moved/{mode}"] for mode in MODES]) * (2 * job.row_bytes)
    rates, offsets = [], []
    quality: list[Quality] = []
    for part in np.split(np.arange(len(bytes_N)), len(MODES)):
        fit = fit_link("packing", bytes_N[part], time_JIN[:, :, part])
        rates.append(fit.gbytes_per_s)
        offsets.append(fit.alpha_ns)
        quality.append(fit.quality)
    few_ns = np.median([np.median(_stack(launches, f"few/{mode}")) for mode in MODES])
    to_next_RR = np.roll(np.eye(job.num_ranks, dtype=np.int64), 1, axis=1)
    leg_ns = int(leg_times(cluster, to_next_RR[None], job.row_bytes).slowest_W[0])
    layer_ns = float(np.median(_stack(launches, "layer"))) * waiting
    software = Software(
        layer_us=_short(layer_ns / 1e3),
        exchange_us=_short(max(0.0, float(few_ns) / 2 - leg_ns) / 1e3),
        permute_gbytes_per_s=_short(1 / float(np.mean([1 / rate for rate in rates])) / waiting),
    )
    about: dict[str, Any] = {
        mode: _about(found) | {"gbytes_per_s": _short(rate), "fixed_us": _short(offset / 1e3)}
        for mode, found, rate, offset in zip(MODES, quality, rates, offsets, strict=True)
    }
    return software, about


def _stack(launches: Sequence[Samples], key: str) -> npt.NDArray[np.float64]:
    values = np.stack([np.asarray(samples[key], dtype=np.float64) for samples in launches])
    if not (values > 0).all():
        raise ExecutionError(f"calibration refused: {key} has times of {values.min():g} ns; the clock is unfit for it")
    return values


def _trimmed_mean(values_IN: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    cut = int(TRIMMED * len(values_IN))
    return np.asarray(np.sort(values_IN, axis=0)[cut : len(values_IN) - cut].mean(axis=0))


def _about(quality: Quality) -> dict[str, Any]:
    return {
        "r2": round(quality.r2, 5),
        "max_residual": _short(quality.max_residual),
        "spread": _short(quality.spread),
    }


def _short(value: float) -> float:
    return float(f"{value:.{DIGITS}g}")


def _memory_gib(num_ranks: int) -> float:
    """An equal share of half this machine's memory, in quarters of a GiB."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0.25, total / 2**30 / 2 / num_ranks // 0.25 * 0.25)
