"""FSMoE's gradient partition: how many gradient bytes each MoE layer's backward pass reduces beside its own exchanges.

Legend: L layers in the order in which the backward pass meets them. Slot l is the backward pass of layer l; one more
slot, the last, comes after all layers, where nothing hides a reduction. Gradients of layer l exist once its backward
pass is done, so slot l may carry those of layers before l only.
Reference: FSMoE (arXiv 2501.10714), section 5. Times are nanoseconds.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from placer.core.errors import UsageError
from solvers.schedule.fsmoe import LayerTimes, algorithm_1

__all__ = ["AllReduce", "BackwardLayer", "GradientPartition", "partition_gradients", "slot_ns"]

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class AllReduce:
    """Time of one all-reduce of n bytes: alpha + n / rate; nothing for no bytes."""

    alpha_ns: float
    bytes_per_ns: float

    def time_ns(self, size: float) -> float:
        """Time of `size` bytes."""
        return self.alpha_ns + size / self.bytes_per_ns if size > 0 else 0.0

    def fits(self, span_ns: float) -> float:
        """Most bytes that are reduced within a span."""
        return max(0.0, (span_ns - self.alpha_ns) * self.bytes_per_ns)


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardLayer:
    """One layer: its MoE operations going back, the dense part that also hides a reduction, and its gradients."""

    times: LayerTimes
    dense_ns: float
    gradient_bytes: float

    def __post_init__(self) -> None:
        for name in ("dense_ns", "gradient_bytes"):
            if not getattr(self, name) >= 0:
                raise UsageError(f"layer.{name} is {getattr(self, name)}; give 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientPartition:
    """Bytes of each slot, (L + 1,), their time in all, and the time when everything is reduced at the end."""

    slot_bytes: FloatArray
    time_ns: float
    at_the_end_ns: float


def slot_ns(layer: BackwardLayer, size: float, reduce: AllReduce, most_chunks: int) -> float:
    """What a layer's backward pass takes if it reduces `size` bytes: the dense part hides what it can, the rest delays
    or hides behind the MoE part, whose pipeline degree is chosen for it (Algorithm 1)."""
    beside = max(0.0, reduce.time_ns(size) - layer.dense_ns)
    return layer.dense_ns + algorithm_1(layer.times, most_chunks, beside).time_ns


def partition_gradients(
    layers: Sequence[BackwardLayer], reduce: AllReduce, *, most_chunks: int = 16, units: int = 64
) -> GradientPartition:
    """Slices of all gradients over the slots such that the backward pass is short.

    Step 1 fills what a layer hides for nothing, with the earliest gradients. Step 2 spreads what is left, in `units`
    equal parts, by dynamic programming over slots (the paper: differential evolution). Also tried: step 2 alone.
    Guarantee: slices are 0 or more, add up to all bytes and start no earlier than their gradients exist; no slower
    than all at the end, than step 1 with its rest at the end, or than any partition into `units` equal parts.
    Complexity: O(L U) times of a layer, O(L U^2) steps.
    """
    sizes = np.array([layer.gradient_bytes for layer in layers])
    # bytes that exist when each slot starts
    ready = np.concatenate([[0.0], np.cumsum(sizes)])

    def time_of(slot: int, size: float) -> float:
        if slot == len(layers):
            return reduce.time_ns(size)
        return slot_ns(layers[slot], size, reduce, most_chunks)

    filled = _fill(layers, reduce, most_chunks, ready)
    at_the_end = np.zeros(len(layers) + 1)
    at_the_end[-1] = ready[-1]
    last = filled.copy()
    last[-1] += ready[-1] - filled.sum()
    found = [at_the_end, last, *(_spread(start, ready, time_of, units) for start in (filled, np.zeros(len(filled))))]
    times = [sum(time_of(slot, size) for slot, size in enumerate(one.tolist())) for one in found]
    best = int(np.argmin(times))
    return GradientPartition(slot_bytes=found[best], time_ns=times[best], at_the_end_ns=times[0])


def _fill(layers: Sequence[BackwardLayer], reduce: AllReduce, most_chunks: int, ready: FloatArray) -> FloatArray:
    """Step 1: bytes (L + 1,) that slots carry without getting longer."""
    filled = np.zeros(len(layers) + 1)
    for slot, layer in enumerate(layers):
        way = algorithm_1(layer.times, most_chunks)
        # how long the network idles in cases 2 to 4: the layer's time less its own A2A
        idle = max(0.0, way.time_ns - 2 * way.degree * layer.times.a2a.at(way.degree))
        filled[slot] = min(ready[slot] - filled.sum(), reduce.fits(layer.dense_ns + idle))
    return np.maximum(filled, 0.0)


def _spread(start: FloatArray, ready: FloatArray, time_of: Callable[[int, float], float], units: int) -> FloatArray:
    """Step 2: `start` and the rest of the bytes in equal parts where they cost least, over the slots in turn."""
    rest = ready[-1] - start.sum()
    if rest <= 0:
        return start
    part = rest / units
    slots = len(start)
    # parts that may have been sent by the end of each slot
    room = (ready - np.cumsum(start)) / part
    most = np.minimum(units, np.floor(room + 1e-9)).astype(np.int64)
    most[-1] = units
    best_U = np.full(units + 1, np.inf)
    best_U[0] = 0.0
    taken = np.zeros((slots, units + 1), dtype=np.int64)
    for slot in range(slots):
        cost_U = np.array([time_of(slot, start[slot] + part * count) for count in range(int(most[slot]) + 1)])
        next_U = np.full(units + 1, np.inf)
        for sent in range(int(most[slot]) + 1):
            total = best_U[sent::-1] + cost_U[: sent + 1]
            taken[slot, sent] = total.argmin()
            next_U[sent] = total.min()
        best_U = next_U
    spread, sent = start.copy(), units
    for slot in range(slots - 1, -1, -1):
        spread[slot] += part * taken[slot, sent]
        sent -= int(taken[slot, sent])
    return spread
