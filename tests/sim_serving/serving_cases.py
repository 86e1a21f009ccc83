"""Deployments for the serving loop's tests whose iterations take what a formula says."""

from collections.abc import Callable

import numpy as np

from sim.serving import (
    Batch,
    HandoffSpec,
    Limits,
    PoolSpec,
    Price,
    Served,
    Streams,
    Workload,
    round_robin,
    serve,
)

ONE_STREAM = Streams.of(np.zeros(1, dtype=np.int32))


class FormulaPricer:
    """Whatever `duration(batch)` says; nothing is loaded."""

    def __init__(self, ranks: int, duration: Callable[[Batch], int]) -> None:
        self.ranks, self.duration = ranks, duration
        self.batches: list[Batch] = []

    def price(self, batch: Batch) -> Price:
        self.batches.append(batch)
        zeros = np.zeros
        return Price(
            duration_ns=self.duration(batch),
            load_LR=np.bincount(batch.source_I, minlength=self.ranks)[None],
            load_LE=zeros((1, 1), dtype=np.int64),
            compute_R=zeros(self.ranks, dtype=np.int64),
            link_DCR=zeros((2, 2, self.ranks), dtype=np.int64),
            uplink_DN=zeros((2, 1), dtype=np.int64),
            sent_bytes_C=zeros(2, dtype=np.int64),
        )


def barrier(fixed_ns: int, token_ns: int) -> Callable[[Batch], int]:
    """An iteration waits for the rank with most tokens."""
    return lambda batch: fixed_ns + token_ns * int(np.bincount(batch.source_I).max())


def workload(*rows: tuple[int, int, int]) -> Workload:
    """From (arrival in ns, prompt, output)."""
    columns = np.array(rows, dtype=np.int64).reshape(-1, 3).T
    return Workload(arrival_ns_Q=columns[0], input_Q=columns[1], output_Q=columns[2])


def pool(ranks: int, duration: Callable[[Batch], int], limits: Limits, **rest: object) -> PoolSpec:
    spec = {"pricer": FormulaPricer(ranks, duration), "ranks": ranks, "policy": round_robin(), "limits": limits}
    return PoolSpec(**(spec | rest))


def run(work: Workload, *pools: PoolSpec, handoff: HandoffSpec | None = None) -> Served:
    return serve(work, ONE_STREAM, pools, handoff=handoff)
