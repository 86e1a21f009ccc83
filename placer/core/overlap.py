"""How long a pipelined MoE layer takes on three streams: FSMoE's four cases as printed, and the schedule's own form.

Each of r chunks is sent over the network (a2a), gathered inside the node, computed, scattered inside the node and sent
back. Network, inside and compute are streams; on each, everything of the way out goes before everything of the way
back, and a slice of the gradients' all-reduce takes the network after the last chunk is sent (FSMoE figure 3).
"""

from dataclasses import dataclass
from typing import Literal

from placer.core.errors import UsageError

__all__ = ["ChunkTimes", "fsmoe_case", "fsmoe_time", "overlap_time"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkTimes:
    """Nanoseconds of one chunk's stages at the degree they are used with, and of the whole gradient slice."""

    a2a_ns: float
    gather_ns: float
    scatter_ns: float
    experts_ns: float
    gradient_ns: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"chunk times: {name} is {getattr(self, name)!r}; give nanoseconds, 0 or more")


def fsmoe_case(degree: float, times: ChunkTimes) -> Literal[1, 2, 3, 4]:
    """Which of FSMoE's cases applies: 1 network bound, 2 compute bound, 3 all-to-all bound, 4 inside-node bound.

    `degree` may be any real number: the paper optimises over those. Raises UsageError for one below 1.
    Reference: FSMoE (arXiv 2501.10714), Q1 to Q7 and their table, as printed.
    """
    if isinstance(degree, bool) or not degree >= 1:
        raise UsageError(f"degree is {degree!r}; give 1 or more")
    a2a, inside = times.a2a_ns, times.gather_ns + times.scatter_ns
    experts, gradient = degree * times.experts_ns, times.gradient_ns
    rest = 2 * (degree - 1) * a2a
    q1 = a2a > times.gather_ns
    q2 = experts > rest
    q3 = experts > (degree - 1) * inside
    q4 = gradient > inside
    q5 = gradient > experts - rest + inside
    q6 = gradient > degree * inside - rest
    q7 = gradient > inside + experts - rest
    if q1:
        if q2:
            return 1 if q5 else 2
        return 1 if q4 else 3
    if q3:
        return 1 if q7 else 2
    return 1 if q6 else 4


def fsmoe_time(degree: float, times: ChunkTimes) -> float:
    """The printed closed form of the case that applies, nanoseconds.

    Never above `overlap_time`. Equal to it where gather and scatter take equally long, as FSMoE takes for granted;
    below it exactly where `overlap_time` is none of the four printed forms, which needs degree >= 2 and either
    - a2a strictly between gather and scatter: Q1 asks about the gather alone; or
    - a2a at most both, and (degree - 1) * min(gather, scatter) < experts < max(gather, scatter): compute then makes
      the inside stream wait though it is not the bound.
    Reference: FSMoE (arXiv 2501.10714), cases 1 to 4. Raises UsageError for a degree below 1.
    """
    a2a, inside = times.a2a_ns, times.gather_ns + times.scatter_ns
    case = fsmoe_case(degree, times)
    if case == 1:
        return 2 * degree * a2a + times.gradient_ns
    if case == 2:
        return 2 * a2a + inside + degree * times.experts_ns
    if case == 3:
        return 2 * degree * a2a + inside
    return 2 * a2a + degree * inside


def overlap_time(degree: int, times: ChunkTimes) -> float:
    """The schedule's makespan, nanoseconds, for any times: the longest of three chains.

    The network without a gap; out, the slower of a2a and gather r - 1 times, back, the slower of a2a and scatter r - 1
    times; one chunk's own way with the slowest of its stages r - 1 times more.
    Guarantee: equal to simulating the three streams (tested). Cost O(1). Raises UsageError for a degree below 1.
    """
    _check(degree)
    a2a, gather, scatter, experts = times.a2a_ns, times.gather_ns, times.scatter_ns, times.experts_ns
    ends, more = 2 * a2a + gather + scatter, degree - 1
    return max(
        2 * degree * a2a + times.gradient_ns,
        ends + more * (max(a2a, gather) + max(a2a, scatter)),
        ends + experts + more * max(a2a, gather, scatter, experts),
    )


def _check(degree: int) -> None:
    if isinstance(degree, bool) or not isinstance(degree, int) or degree < 1:
        raise UsageError(f"degree is {degree!r}; give a positive integer")
