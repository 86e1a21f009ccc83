"""FSMoE's pipeline degree: Algorithm 1 (the best real degree of each of four regimes, rounded) and brute force.

Chunk times in r chunks: t(r) = alpha + volume / r, the volume being in nanoseconds for the whole layer. A2A crosses
nodes; all-gather and reduce-scatter stay inside; a slice of gradients (t_gar) shares the network with the A2A.
Reference: FSMoE (arXiv 2501.10714), section 4.
"""

import math
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from placer.core.overlap import ChunkTimes, fsmoe_case, fsmoe_time

__all__ = ["ChunkTime", "DegreeChoice", "LayerTimes", "algorithm_1", "best_degree"]


@dataclass(frozen=True, slots=True)
class ChunkTime:
    """Time of one of r chunks: alpha + volume / r."""

    alpha_ns: float
    volume_ns: float

    def at(self, degree: float) -> float:
        """One chunk's time."""
        return self.alpha_ns + self.volume_ns / degree


@dataclass(frozen=True, slots=True)
class LayerTimes:
    """The four operations of one MoE layer."""

    a2a: ChunkTime
    ag: ChunkTime
    rs: ChunkTime
    exp: ChunkTime

    def at(self, degree: float, gradient_ns: float = 0.0) -> ChunkTimes:
        """What each of so many chunks takes."""
        return ChunkTimes(
            a2a_ns=self.a2a.at(degree),
            gather_ns=self.ag.at(degree),
            scatter_ns=self.rs.at(degree),
            experts_ns=self.exp.at(degree),
            gradient_ns=gradient_ns,
        )

    def time_ns(self, degree: float, gradient_ns: float = 0.0) -> float:
        """The layer in so many chunks, by the paper's printed forms."""
        return fsmoe_time(degree, self.at(degree, gradient_ns))

    def backward(self) -> "LayerTimes":
        """The same layer going back: each expert GEMM becomes two."""
        return replace(self, exp=ChunkTime(2 * self.exp.alpha_ns, 2 * self.exp.volume_ns))


@dataclass(frozen=True, slots=True)
class DegreeChoice:
    """A degree, its time, and for Algorithm 1 the real degree that it was rounded from."""

    degree: int
    time_ns: float
    real_degree: float


def best_degree(times: LayerTimes, most: int, t_gar: float = 0.0) -> DegreeChoice:
    """The best of 1 .. `most` by trying all; the smallest of equals."""
    time, degree = min((times.time_ns(r, t_gar), r) for r in range(1, most + 1))
    return DegreeChoice(degree, time, float(degree))


def algorithm_1(times: LayerTimes, most: int, t_gar: float = 0.0) -> DegreeChoice:
    """The best degree by the continuous optima of the four cases, rounded; forward and `backward()` are separate calls.

    The paper runs SLSQP under each case's conditions, then rounds the best. Here the conditions, times r, are
    quadratics in r, so their roots cut [1, most] into intervals of one case each, in which the time a + b / r + c r is
    least at an end or at sqrt(b / c). Every such degree is rounded both ways, not the best one alone.
    Guarantee: as fast as `best_degree`, since a convex time is least, over whole degrees, beside its real optimum or at
    an end. `real_degree` is the best real one (where cases meet with a jump, as they may if ag and rs differ: of those
    looked at). Complexity: constant, whatever `most` is.
    """
    ends = _breakpoints(times, float(most), t_gar)
    candidates = set(ends)
    for low, high in pairwise(ends):
        case = fsmoe_case((low + high) / 2, times.at((low + high) / 2, t_gar))
        falling, rising = _slopes(case, times)
        if rising > 0 and low < (turn := math.sqrt(falling / rising)) < high:
            candidates.add(turn)
    _, real = min((times.time_ns(r, t_gar), r) for r in candidates)
    whole = {min(most, max(1, rounded(at))) for at in candidates for rounded in (math.floor, math.ceil)}
    time, degree = min((times.time_ns(r, t_gar), r) for r in whole)
    return DegreeChoice(degree, time, real)


def _slopes(case: int, times: LayerTimes) -> tuple[float, float]:
    """b and c of a case's time a + b / r + c r."""
    a2a, inside_alpha = times.a2a, times.ag.alpha_ns + times.rs.alpha_ns
    inside = times.ag.volume_ns + times.rs.volume_ns
    return {
        1: (0.0, 2 * a2a.alpha_ns),
        2: (2 * a2a.volume_ns + inside, times.exp.alpha_ns),
        3: (inside, 2 * a2a.alpha_ns),
        4: (2 * a2a.volume_ns, inside_alpha),
    }[case]


def _breakpoints(times: LayerTimes, most: float, t_gar: float) -> list[float]:
    """1, `most` and every degree between at which a condition may change, ascending."""
    a2a, exp = times.a2a, times.exp
    alpha, inside = times.ag.alpha_ns + times.rs.alpha_ns, times.ag.volume_ns + times.rs.volume_ns
    # each condition times r, as a polynomial (r^2, r, 1)
    computed = np.array([exp.alpha_ns, exp.volume_ns, 0.0])
    between = np.array([2 * a2a.alpha_ns, 2 * (a2a.volume_ns - a2a.alpha_ns), -2 * a2a.volume_ns])
    once = np.array([0.0, alpha, inside])
    often = np.array([alpha, inside, 0.0])
    gradients = np.array([0.0, t_gar, 0.0])
    first = np.array([0.0, a2a.alpha_ns - times.ag.alpha_ns, a2a.volume_ns - times.ag.volume_ns])
    conditions = (
        first,
        computed - between,
        computed - often + once,
        gradients - once,
        gradients - computed + between - once,
        gradients - often + between,
    )
    found = {1.0, most}
    for condition in conditions:
        found |= {root for root in _roots(*condition.tolist()) if 1 < root < most}
    return sorted(found)


def _roots(square: float, linear: float, constant: float) -> list[float]:
    """Real roots, without the loss of digits of the school's formula; none of a constant."""
    if square == 0:
        return [] if linear == 0 else [-constant / linear]
    under = linear * linear - 4 * square * constant
    if under < 0:
        return []
    half = -(linear + math.copysign(math.sqrt(under), linear)) / 2
    return [half / square] if half == 0 else [half / square, constant / half]
