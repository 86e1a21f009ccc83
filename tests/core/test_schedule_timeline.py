"""Phase times of a timeline in which ranks have several spans of one phase: what pipelined layers give."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from placer.core.timeline import PHASES, Timeline


def timeline(rows: list[tuple[int, int, int, int, int, int]], ranks: int) -> Timeline:
    """Rows of iteration, layer, phase, rank, start, duration."""
    iteration, layer, phase, rank, start, duration = np.array(sorted(rows, key=lambda row: (row[0], row[4], row[3]))).T
    none = np.zeros(len(rows), dtype=np.int64)
    return Timeline(
        about={"source": "simulated", "mode": "per_rank", "num_ranks": ranks},
        iteration=iteration.astype(np.int32),
        layer=layer.astype(np.int32),
        phase=phase.astype(np.int8),
        rank=rank.astype(np.int32),
        start_ns=start,
        duration_ns=duration,
        sent_bytes=none,
        received_bytes=none,
        tokens=none,
    )


def test_a_ranks_chunks_add_up_before_ranks_are_compared() -> None:
    """Rank 0 computes 5 + 1, rank 1 computes 2 + 3: the layer's experts take 6, neither 5 + 3 nor 5."""
    experts = PHASES.index("experts")
    rows = [(0, 0, experts, 0, 0, 5), (0, 0, experts, 0, 5, 1), (0, 0, experts, 1, 0, 2), (0, 0, experts, 1, 2, 3)]
    assert timeline(rows, 2).phase_ns()["experts"].tolist() == [6]


@settings(max_examples=60, deadline=None)
@given(data=st.data(), spans=st.integers(1, 30))
def test_phase_ns_by_counting(data: st.DataObject, spans: int) -> None:
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    columns = [rng.integers(low, high, spans) for low, high in ((0, 2), (-1, 3), (1, 4), (0, 3), (0, 50), (0, 20))]
    rows = [tuple(row) for row in np.array(columns).T.tolist()] + [(0, 0, 1, 0, 0, 0), (1, 0, 1, 0, 0, 0)]
    spent: dict[tuple[int, ...], int] = {}
    for iteration, layer, phase, rank, _, duration in rows:
        spent[iteration, layer, phase, rank] = spent.get((iteration, layer, phase, rank), 0) + duration
    for phase, ns_I in timeline(rows, 3).phase_ns().items():
        for iteration in range(2):
            slowest = [
                max((spent.get((iteration, layer, PHASES.index(phase), rank), 0) for rank in range(3)), default=0)
                for layer in range(-1, 3)
            ]
            assert ns_I[iteration] == sum(slowest)
