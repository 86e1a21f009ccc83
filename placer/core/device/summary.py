"""What a device's Timeline adds up to: how long the processor computed, how long it waited, what was read.

Legend: I spans, B iterations.
"""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from placer.core.errors import UsageError
from placer.core.timeline import PHASES, Timeline

__all__ = ["DeviceSummary", "summarize_device"]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSummary:
    """Totals over all iterations, simulated or measured; times in nanoseconds.

    total_ns       of every iteration, from the processor's first span to the end of its last
    attention_ns, experts_ns   the processor's work; wait_ns: the rest of total_ns, D2MoE's sum of T_wait
    stalls         how often the processor waited
    reads, read_bytes, read_ns       planes read from the disk, ahead or not, and how long that kept it busy
    copies, copied_bytes, copy_ns    planes copied to the accelerator (0: there is none)
    tokens         of all iterations
    """

    iterations: int
    tokens: int
    total_ns: int
    attention_ns: int
    experts_ns: int
    wait_ns: int
    stalls: int
    reads: int
    read_bytes: int
    read_ns: int
    copies: int
    copied_bytes: int
    copy_ns: int

    @property
    def tokens_per_s(self) -> float:
        """Tokens of all iterations per second of them; 0 where they took no time."""
        return 1e9 * self.tokens / self.total_ns if self.total_ns else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types."""
        return {**asdict(self), "tokens_per_s": self.tokens_per_s}


def summarize_device(timeline: Timeline) -> DeviceSummary:
    """The totals of one device's Timeline. Raises UsageError for another kind of Timeline. Cost O(I log I)."""
    if timeline.about["mode"] != "device":
        raise UsageError(f"timeline has mode {timeline.about['mode']!r}; give one of a device")
    attention, experts, load, copy = (
        timeline.phase == PHASES.index(name) for name in ("attention", "experts", "load", "copy")
    )
    busy = attention | experts
    order = np.lexsort([timeline.start_ns[busy], timeline.iteration[busy]])
    iteration_I, start_I = timeline.iteration[busy][order], timeline.start_ns[busy][order]
    end_I = start_I + timeline.duration_ns[busy][order]
    gap_I = (start_I[1:] - end_I[:-1])[iteration_I[1:] == iteration_I[:-1]]
    wait_ns = int(gap_I.sum())
    tokens_B = np.zeros(timeline.num_iterations, dtype=np.int64)
    np.maximum.at(tokens_B, timeline.iteration[attention], timeline.tokens[attention])
    spent = {
        name: int(timeline.duration_ns[pick].sum()) for name, pick in (("attention", attention), ("experts", experts))
    }
    return DeviceSummary(
        iterations=timeline.num_iterations,
        tokens=int(tokens_B.sum()),
        total_ns=sum(spent.values()) + wait_ns,
        attention_ns=spent["attention"],
        experts_ns=spent["experts"],
        wait_ns=wait_ns,
        stalls=int((gap_I > 0).sum()),
        reads=int(load.sum()),
        read_bytes=int(timeline.received_bytes[load].sum()),
        read_ns=int(timeline.duration_ns[load].sum()),
        copies=int(copy.sum()),
        copied_bytes=int(timeline.received_bytes[copy].sum()),
        copy_ns=int(timeline.duration_ns[copy].sum()),
    )
