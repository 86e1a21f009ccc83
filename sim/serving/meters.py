"""Quantities over simulated time: their area (for means), their largest value, and iterations' logs."""

import numpy as np
import numpy.typing as npt

from placer.core.cluster import ClusterSpec
from placer.core.evaluate import par
from sim.serving.pricer import Batch, Price

__all__ = ["Meter", "PoolLog"]

IntArray = npt.NDArray[np.int64]


class Meter:
    """A count that changes at instants: its value now, the largest, and its integral over time."""

    __slots__ = ("_since", "area", "most", "value")

    def __init__(self) -> None:
        self.value = self.most = self.area = self._since = 0

    def add(self, now: int, change: int) -> None:
        """The count changes by `change` at `now`; the clock never runs back."""
        assert now >= self._since, "the clock ran back"
        self.area += self.value * (now - self._since)
        self._since = now
        self.value += change
        assert self.value >= 0, "fewer than none"
        self.most = max(self.most, self.value)

    def mean(self, now: int) -> float:
        """Mean over the time from 0 to `now`."""
        self.add(now, 0)
        return self.area / now if now else 0.0


class PoolLog:
    """What a pool's iterations add up to.

    start_ns, duration_ns, tokens, prefill   one entry an iteration (prefill: it had prompt tokens)
    par                                      max / mean rank load, mean over layers, one an iteration
    """

    def __init__(self) -> None:
        self.start_ns: list[int] = []
        self.duration_ns: list[int] = []
        self.tokens: list[int] = []
        self.prefill: list[bool] = []
        self.par: list[float] = []
        self.compute_R: IntArray | None = None
        self.link_DCR: IntArray | None = None
        self.uplink_DN: IntArray | None = None
        self.sent_bytes_C: IntArray = np.zeros(2, dtype=np.int64)

    def add(self, start_ns: int, batch: Batch, price: Price, cluster: ClusterSpec | None) -> None:
        """One finished iteration."""
        self.start_ns.append(start_ns)
        self.duration_ns.append(price.duration_ns)
        self.tokens.append(len(batch.row_I))
        self.prefill.append(batch.kind == "prefill")
        speed_R = None if cluster is None else cluster.speed_R
        self.par.append(float(par(price.load_LR, speed_R).mean()))
        if self.compute_R is None or self.link_DCR is None or self.uplink_DN is None:
            self.compute_R, self.link_DCR = price.compute_R.copy(), price.link_DCR.copy()
            self.uplink_DN = price.uplink_DN.copy()
        else:
            self.compute_R += price.compute_R
            self.link_DCR += price.link_DCR
            self.uplink_DN += price.uplink_DN
        self.sent_bytes_C = self.sent_bytes_C + price.sent_bytes_C
