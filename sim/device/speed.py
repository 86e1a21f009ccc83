"""How fast the processor is beside the disk: exact in whole nanoseconds, however often reads begin and end."""

from dataclasses import dataclass

from placer.core.device.spec import DeviceSpec

__all__ = ["Speed"]

STEPS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Speed:
    """Units of work in a nanosecond: `alone`, and `beside` a read. A span of t ns alone has `t * alone` units.

    A span that runs partly beside reads is stretched for that part; it ends with the first whole nanosecond in which
    its work is done. The device's slowdown counts to the nearest thousandth.
    """

    alone: int
    beside: int

    @classmethod
    def of(cls, device: DeviceSpec) -> "Speed":
        """The device's."""
        return cls(alone=round(STEPS * device.compute.io_slowdown), beside=STEPS)

    @property
    def even(self) -> bool:
        """Whether reads do not slow the processor."""
        return self.alone == self.beside

    def stretched_ns(self, alone_ns: int, beside_ns: int) -> int:
        """How long a span of `alone_ns` takes when the disk is read for its first `beside_ns` and not after."""
        units = alone_ns * self.alone
        if units <= beside_ns * self.beside:
            return -(-units // self.beside)
        return beside_ns - (beside_ns * self.beside - units) // self.alone
