"""From what the ranks measured to a ClusterSpec, and the block that says how good its numbers are.

Legend: J launches, I repetitions, N sizes, R ranks.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.cluster import ClusterSpec, Compute, ExchangeCost, LinkClass, Software
from placer.core.cost import leg_times
from placer.core.dispatch import layer_traffic
from placer.core.errors import ExecutionError
from placer.core.modes import DISPATCH_MODES, DispatchMode
from placer.core.replicas import layer_slots
from placer.execute.calibrate.fit import LinkFit, Quality, fit_experts, fit_line, fit_link, fit_tail, short
from placer.execute.calibrate.job import CalibrationJob

__all__ = ["Calibration", "assemble", "exchange_tokens", "expert_cases"]

Samples = Mapping[str, npt.NDArray[Any]]
TRIMMED = 0.1


@dataclass(frozen=True, slots=True)
class Calibration:
    """A cluster, and about it: the qualities of its fits in plain JSON types, without a date."""

    cluster: ClusterSpec
    about: dict[str, Any]


def expert_cases(job: CalibrationJob) -> list[tuple[int, int]]:
    """(experts, rows of each) of the GEMM curve: all rows for a rank's experts, and for one expert alone."""
    numbers = sorted({1, job.experts_per_rank})
    return [(experts, rows) for experts in numbers for rows in job.rows]


def exchange_tokens(job: CalibrationJob) -> list[int]:
    """Tokens of each rank when exchanges are measured: a quarter of an iteration's to twice as many."""
    quarter = job.tokens_per_rank // 4
    return [quarter, 2 * quarter, 4 * quarter, 6 * quarter, 8 * quarter]


def assemble(
    job: CalibrationJob, launches: Sequence[Samples], name: str, *, software_links: bool = True
) -> Calibration:
    """The cluster that the samples of one or more launches give.

    `software_links`: exchanges were measured on the same links as messages.
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
    about["empty_exchange_us"] = short(empty_ns / 1e3)
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
    # what unshaped links of one machine take is a copy of memory, and counts as software
    software, about["exchanges"] = _software(job, launches, cluster if software_links else None, waiting)
    return Calibration(replace(cluster, software=replace(software, shared_cores=shared)), about)


def _link(
    job: CalibrationJob, launches: Sequence[Samples], kind: str, empty_ns: float
) -> tuple[LinkClass, dict[str, Any]]:
    """One class of link; what an exchange costs without a message is the software's, not the link's."""
    messages = job.ranks_per_node if kind == "uplink" else 1
    bytes_N = np.array(job.copies_N(kind)) * job.row_bytes * messages
    time_JIN = _stack(launches, f"link/{kind}")
    fit: LinkFit = fit_link(f"link class {kind}", bytes_N, time_JIN)
    link = LinkClass(gbytes_per_s=short(fit.gbytes_per_s), alpha_us=short(max(0.0, fit.alpha_ns - empty_ns) / 1e3))
    median_N = np.median(time_JIN.reshape(-1, len(bytes_N)), axis=0)
    about = _about(fit.quality) | {
        "burst_bytes": round(fit.burst_bytes),
        "bytes": bytes_N.tolist(),
        "median_us": [short(value / 1e3) for value in median_N],
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
            links["uplink"] = replace(uplink, gbytes_per_s=short(uplink.gbytes_per_s / tail))
        return replace(cluster, **links)

    def predict(tail: float) -> npt.NDArray[np.float64]:
        return np.asarray(leg_times(tailed(tail), copies_NRR, job.row_bytes).slowest_W + empty_ns, dtype=np.float64)

    tail, residual = fit_tail(predict, time_N)
    about = {
        "tail": short(tail),
        "max_residual": short(residual),
        "mean_us": [short(value / 1e3) for value in time_N],
        "closed_form_us": [short(value / 1e3) for value in predict(tail)],
    }
    return tailed(max(1.0, short(tail))), about


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
        tflops=short(2 * job.expert_params / fit.row_ns / 1e3),
        weight_read_gbytes_per_s=short(job.expert_bytes / read_ns),
        launch_us=short(launch_ns / 1e3),
    )
    solo = fit_experts("experts of one rank alone", experts_N, rows_N, solo_JIN)
    about = _about(fit.quality) | {
        "experts": experts_N.tolist(),
        "rows": rows_N.tolist(),
        "median_us": [short(value / 1e3) for value in np.median(together_JIN, axis=(0, 1))],
        "form": fit.form,
        "read_us": short(fit.read_ns / 1e3),
        "together_over_solo": short(slower),
        "solo_tflops": short(2 * job.expert_params / solo.row_ns / 1e3),
    }
    return compute, shared, about


def _software(
    job: CalibrationJob, launches: Sequence[Samples], cluster: ClusterSpec | None, waiting: float
) -> tuple[Software, dict[str, Any]]:
    """Costs of a layer and, by mode, of an exchange; `waiting`: how much longer work takes where ranks share cores."""
    tokens_N = np.array(exchange_tokens(job), dtype=np.float64)
    exchanges: dict[str, ExchangeCost] = {}
    about: dict[str, Any] = {}
    for mode in DISPATCH_MODES:
        # a dispatch and a combine, without what their messages take on links
        links_N = np.array([0 if cluster is None else _links_ns(job, cluster, mode, n) for n in exchange_tokens(job)])
        time_JIN = np.maximum(1.0, _stack(launches, f"exchange/{mode}") - links_N) / 2
        fit = fit_line(f"exchanges under {mode}", tokens_N, time_JIN)
        exchanges[mode] = ExchangeCost(
            fixed_us=short(max(0.0, fit.alpha_ns) / 1e3), token_us=short(1 / fit.gbytes_per_s / 1e3)
        )
        about[mode] = _about(fit.quality) | {
            "tokens": tokens_N.astype(int).tolist(),
            "median_us": [short(value / 1e3) for value in np.median(time_JIN, axis=(0, 1))],
        }
    layer_ns = float(np.median(_stack(launches, "layer"))) * waiting
    return Software(layer_us=short(layer_ns / 1e3), exchanges=exchanges), about


def _links_ns(job: CalibrationJob, cluster: ClusterSpec, mode: DispatchMode, tokens: int) -> int:
    """Closed form of the messages of one measured dispatch and combine."""
    ranks, per_rank = job.num_ranks, job.experts_per_rank
    slots = layer_slots(np.arange(ranks * per_rank), ranks * per_rank, ranks, job.ranks_per_node)
    slot_TK = np.concatenate([job.slots_TK(rank, tokens) for rank in range(ranks)])
    home_T = np.repeat(np.arange(ranks), tokens)
    traffic, _ = layer_traffic(slots, mode, slot_TK, home_T, np.zeros(len(home_T), dtype=np.int64), 1)
    legs = (*traffic.legs_WRR, *traffic.returns_WRR)
    return sum(int(leg_times(cluster, leg_WRR, job.row_bytes).slowest_W[0]) for leg_WRR in legs)


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
        "max_residual": short(quality.max_residual),
        "spread": short(quality.spread),
    }


def _memory_gib(num_ranks: int) -> float:
    """An equal share of half this machine's memory, in quarters of a GiB."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(0.25, total / 2**30 / 2 / num_ranks // 0.25 * 0.25)
