"""A Timeline from what the two threads of a session noted.

Legend: I spans.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from placer.core.timeline import PHASES, Timeline
from placer.execute.device.session import Session

__all__ = ["session_timeline"]

LOAD = PHASES.index("load")


def session_timeline(session: Session, about: Mapping[str, Any]) -> Timeline:
    """The measured Timeline of a session that is over; `about` is what the caller knows of the work."""
    plan = session.plan
    rows = []
    for iteration, (spans, loads) in enumerate(session.iterations):
        rows += [(iteration, site, phase, begin, end, 0, tokens) for site, phase, begin, end, tokens in spans]
        rows += [
            (iteration, plane[0], LOAD, begin, end, plan.plane_bytes_K[plane[2]], 0) for plane, begin, end in loads
        ]
    table = np.array(rows, dtype=np.int64).reshape(-1, 7)
    table = table[np.lexsort([table[:, 2], table[:, 3], table[:, 0]])]
    iteration_I, layer_I, phase_I, begin_I, end_I, bytes_I, tokens_I = table.T
    zero_ns = int(begin_I.min(initial=np.iinfo(np.int64).max))
    return Timeline(
        about={
            "trace_sha256": "",
            **about,
            "source": "measured",
            "mode": "device",
            "num_ranks": 1,
            "ranks_per_node": 1,
            "model": plan.model,
            "order": plan.order,
            "cache": plan.cache,
            "plan_sha256": plan.sha256,
            "memory_bytes": plan.memory_bytes,
            "resident_bytes": plan.resident_bytes,
            "cache_bytes": plan.cache_bytes,
            "buffer_bytes": plan.buffer_bytes,
            **session.about(),
        },
        iteration=iteration_I.astype(np.int32),
        layer=layer_I.astype(np.int32),
        phase=phase_I.astype(np.int8),
        rank=np.zeros(len(table), dtype=np.int32),
        start_ns=begin_I - zero_ns if len(table) else begin_I,
        duration_ns=end_I - begin_I,
        sent_bytes=np.zeros(len(table), dtype=np.int64),
        received_bytes=bytes_I,
        tokens=tokens_I,
    )
