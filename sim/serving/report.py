"""What a served workload comes to: latencies, goodput, balance, utilisation, bytes; plain numbers for JSON.

Legend: Q finished requests, R ranks, N nodes, C link classes, D directions.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from sim.serving.engine import Served
from sim.serving.limits import NS_PER_S, checked_number
from sim.serving.pool import Pool

__all__ = ["Slo", "report"]

NS_PER_MS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Service-level objective of a request: time to first token, and mean time per output token after it."""

    ttft_ms: float = 2000.0
    tpot_ms: float = 100.0

    def __post_init__(self) -> None:
        checked_number("slo.ttft_ms", self.ttft_ms)
        checked_number("slo.tpot_ms", self.tpot_ms)


def report(served: Served, slo: Slo) -> dict[str, Any]:
    """Plain JSON types; the same served workload gives the same bytes.

    TTFT runs from arrival to the first token, TPOT = (last - first token) / (output - 1) for outputs of 2 tokens or
    more. Goodput counts finished requests within both limits; a request of one token needs the first only. Rates are
    over the time from 0 to `end_s`. `latency` is None where nothing finished.
    """
    done = served.finished
    seconds = served.end_ns / NS_PER_S
    arrival_Q, first_Q, finish_Q, output_Q, started_Q = (
        np.array([getattr(request, name) for request in done], dtype=np.int64)
        for name in ("arrival_ns", "first_ns", "finish_ns", "output_length", "started_ns")
    )
    ttft_Q = (first_Q - arrival_Q) / NS_PER_MS
    several_Q = output_Q > 1
    tpot_Q = (finish_Q - first_Q) / NS_PER_MS / np.maximum(1, output_Q - 1)
    good = int(((ttft_Q <= slo.ttft_ms) & (~several_Q | (tpot_Q <= slo.tpot_ms))).sum())
    ranks = sum(len(pool.queues) for pool in served.pools)
    kv_bytes = 0 if served.handoff is None else served.handoff.sent_bytes
    pools = {pool.role: _pool(pool, served.end_ns) for pool in served.pools}
    return {
        "stopped_by": served.stopped_by,
        "overloaded": served.overloaded,
        "message": served.message,
        "end_s": seconds,
        "ranks": ranks,
        "requests": {
            "arrived": len(served.requests),
            "finished": len(done),
            "refused": len(served.refused),
            "running": sum(pool.running.value for pool in served.pools),
            "waiting": sum(pool.waiting.value for pool in served.pools),
            "in_transfer": 0 if served.handoff is None else served.handoff.requests,
            "preemptions": sum(request.preemptions for request in served.requests),
            "mean_in_system": served.in_system.mean(served.end_ns),
        },
        "tokens": {
            "prompt": sum(
                min(r.computed, r.input_length) if r.first_ns < 0 else r.input_length for r in served.requests
            ),
            "generated": sum(request.generated for request in served.requests),
            "recomputed": sum(request.recomputed for request in served.requests),
        },
        "slo": {"ttft_ms": slo.ttft_ms, "tpot_ms": slo.tpot_ms},
        "throughput": {
            "requests_per_s": _rate(len(done), seconds),
            "output_tokens_per_s": _rate(sum(request.generated for request in served.requests), seconds),
            "goodput_per_s": _rate(good, seconds),
            "goodput_per_s_and_rank": _rate(good, seconds * ranks),
            "within_slo": good / len(done) if done else None,
        },
        "latency": {
            "ttft_ms": _spread(ttft_Q),
            "tpot_ms": _spread(tpot_Q[several_Q]),
            "e2e_ms": _spread((finish_Q - arrival_Q) / NS_PER_MS),
            "queue_ms": _spread((started_Q - arrival_Q) / NS_PER_MS),
        },
        "transmit_bytes": {
            "inside_nodes": sum(int(pool.log.sent_bytes_C[0]) for pool in served.pools),
            "between_nodes": sum(int(pool.log.sent_bytes_C[1]) for pool in served.pools),
            "kv_handoff": kv_bytes,
            "migration": sum(sum(cost.bytes_C) for pool in served.pools for _, cost in pool.migrations),
        },
        "pools": pools,
    }


def _pool(pool: Pool, end_ns: int) -> dict[str, Any]:
    log = pool.log
    duration = np.array(log.duration_ns, dtype=np.int64)
    prefill = np.array(log.prefill, dtype=bool)
    kinds = {"all": np.ones(len(duration), dtype=bool), "prefill": prefill, "decode": ~prefill}
    return {
        "ranks": len(pool.queues),
        "iterations": len(duration),
        "iteration_ms": {name: _spread(duration[pick] / NS_PER_MS) for name, pick in kinds.items()},
        "tokens_per_iteration": _spread(np.array(log.tokens, dtype=np.float64)),
        "busy": _share(int(duration.sum()), end_ns),
        "par_iteration": _spread(np.array(log.par)),
        "par_windows": pool.window_par,
        "rank_utilisation": _used(log.compute_R, end_ns),
        "link_utilisation": {
            "inside_nodes": _used(None if log.link_DCR is None else log.link_DCR[:, 0], end_ns),
            "network_ports": _used(None if log.link_DCR is None else log.link_DCR[:, 1], end_ns),
            "uplinks": _used(log.uplink_DN, end_ns),
        },
        "queue": {
            "waiting_mean": pool.waiting.mean(end_ns),
            "waiting_most": pool.waiting.most,
            "running_mean": pool.running.mean(end_ns),
            "running_most": pool.running.most,
            "peak_blocks": pool.peak_blocks,
        },
        "migrations": [
            {
                "at_s": at / NS_PER_S,
                "ms": cost.duration_ns / NS_PER_MS,
                "experts": cost.experts,
                "bytes_inside": cost.bytes_C[0],
                "bytes_between": cost.bytes_C[1],
                "most_received_bytes": max(cost.received_bytes_R),
            }
            for at, cost in pool.migrations
        ],
        "paused_s": pool.paused_ns / NS_PER_S,
    }


def _rate(count: int, seconds: float) -> float:
    return count / seconds if seconds else 0.0


def _share(busy_ns: int, end_ns: int) -> float:
    return busy_ns / end_ns if end_ns else 0.0


def _used(busy: npt.NDArray[np.int64] | None, end_ns: int) -> dict[str, float] | None:
    """Mean and largest share of the time that ports or ranks are busy."""
    if busy is None or not busy.size or not end_ns:
        return None
    return {"mean": float(busy.mean() / end_ns), "most": float(busy.max() / end_ns)}


def _spread(values: npt.NDArray[np.floating]) -> dict[str, float] | None:
    if not len(values):
        return None
    quantile = np.quantile(values, [0.5, 0.9, 0.99])
    return {
        "mean": float(values.mean()),
        "p50": float(quantile[0]),
        "p90": float(quantile[1]),
        "p99": float(quantile[2]),
        "most": float(values.max()),
    }
