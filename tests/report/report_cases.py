"""Timelines and evaluations small enough to check by hand."""

import numpy as np

from placer.core.evaluate import Evaluation
from placer.core.timeline import PHASES, Timeline

ABOUT = {
    "source": "simulated",
    "mode": "per_rank",
    "num_ranks": 2,
    "ranks_per_node": 1,
    "plan_sha256": "a" * 64,
    "trace_sha256": "b" * 64,
    "tokens_per_iteration": 2,
    "model": "tiny",
    "cluster": "pair",
}

Row = tuple[int, int, str, int, int, int, int, int, int]
"""iteration, layer, phase, rank, start, duration, sent, received, tokens"""


def timeline(rows: list[Row], **about: object) -> Timeline:
    columns = list(zip(*rows, strict=True)) if rows else [()] * 9
    return Timeline(
        about={**ABOUT, **about},
        iteration=np.array(columns[0], dtype=np.int32),
        layer=np.array(columns[1], dtype=np.int32),
        phase=np.array([PHASES.index(name) for name in columns[2]], dtype=np.int8),
        rank=np.array(columns[3], dtype=np.int32),
        **{
            name: np.array(column, dtype=np.int64)
            for name, column in zip(
                ("start_ns", "duration_ns", "sent_bytes", "received_bytes", "tokens"), columns[4:], strict=True
            )
        },
    )


def iteration_rows(iteration: int, start: int, stretch: int = 1) -> list[Row]:
    """Rank 0 sends its token to rank 1 (1000 ns), which computes both (4000 ns) and returns one (1000 ns)."""
    s = stretch
    return [
        (iteration, 0, "dispatch", 0, start, 1000 * s, 1000, 0, 1),
        (iteration, 0, "dispatch", 1, start, 1000 * s, 0, 1000, 0),
        (iteration, 0, "experts", 0, start + 1000 * s, 0, 0, 0, 0),
        (iteration, 0, "combine", 0, start + 1000 * s, 5000 * s, 0, 1000, 0),
        (iteration, 0, "experts", 1, start + 1000 * s, 4000 * s, 0, 0, 2),
        (iteration, 0, "combine", 1, start + 5000 * s, 1000 * s, 1000, 0, 1),
    ]


def one(stretch: int = 1, **about: object) -> Timeline:
    return timeline(iteration_rows(0, 0, stretch), **about)


def evaluation(scale: float = 1.0, tokens: int = 1000, modes: tuple[str, ...] = ("per_rank",)) -> Evaluation:
    return Evaluation(
        tokens=tokens,
        ranks_touched=6.25 * scale,
        nodes_touched=1.5,
        copies_sent=5.4321,
        par=1.1,
        par_max=1.3,
        par_window_mean=1.4567,
        par_window_p99=2.0,
        kept=0.125,
        iteration_us=dict.fromkeys(modes, 12345.678 * scale),
    )
