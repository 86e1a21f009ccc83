"""One piece of memory for all packed planes, taken whole before a run: what a plan may hold is what the system shows.

Memory is dealt out in units that divide every plane, so planes of several sizes come and go without gaps between them.
Legend: K planes of an expert, U units of one plane.
"""

import math
import mmap
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from placer.core.errors import ExecutionError

__all__ = ["Arena"]

SMALLEST_UNIT_BYTES = 64


class Arena:
    """Memory for planes of sizes `plane_bytes_K` that together never have more than `capacity_bytes`.

    Exactly so many bytes where the sizes have a common divisor of 64 or more; else planes are rounded up to 64 bytes.
    Raises ExecutionError where the system does not give that much.
    """

    def __init__(self, plane_bytes_K: Sequence[int], capacity_bytes: int) -> None:
        common = math.gcd(*plane_bytes_K)
        unit = common if common >= SMALLEST_UNIT_BYTES else SMALLEST_UNIT_BYTES
        self._bytes_K = tuple(plane_bytes_K)
        self._units_K = tuple(-(-size // unit) for size in plane_bytes_K)
        # as many units as the worst mixture of planes needs
        count = max(capacity_bytes * units // size for units, size in zip(self._units_K, plane_bytes_K, strict=True))
        self.nbytes = count * unit
        try:
            self._memory = np.frombuffer(mmap.mmap(-1, max(1, self.nbytes)), dtype=np.uint8)[: self.nbytes]
        except (OSError, ValueError, OverflowError) as error:
            raise ExecutionError(
                f"the system does not give {self.nbytes} bytes of memory for planes ({error}); give a smaller budget"
            ) from error
        # touched, so that the whole budget is resident from the start
        self._memory.fill(0)
        self._unit_UB = self._memory.reshape(count, unit)
        self._free = list(range(count - 1, -1, -1))
        self._scratch_K = [np.empty((units, unit), dtype=np.uint8) for units in self._units_K]

    @property
    def scratch_bytes(self) -> int:
        """Bytes beside the arena, in which a plane whose units lie apart is put together before it is used."""
        return sum(one.nbytes for one in self._scratch_K)

    def take(self, plane: int) -> npt.NDArray[np.int64]:
        """Units for one plane of kind `plane`; the caller has made sure that there is room."""
        units = self._units_K[plane]
        assert len(self._free) >= units, "more planes than the arena was made for"
        return np.sort(np.array([self._free.pop() for _ in range(units)], dtype=np.int64))

    def give_back(self, units_U: npt.NDArray[np.int64]) -> None:
        """Frees a plane's units."""
        self._free.extend(reversed(units_U.tolist()))

    def write(self, units_U: npt.NDArray[np.int64], data: npt.NDArray[np.uint8]) -> None:
        """Copies a plane's bytes into its units."""
        first, count = int(units_U[0]), len(units_U)
        unit = self._unit_UB.shape[1]
        if int(units_U[-1]) - first == count - 1:
            self._memory[first * unit : first * unit + len(data)] = data
            return
        whole = len(data) // unit
        self._unit_UB[units_U[:whole]] = data[: whole * unit].reshape(whole, unit)
        if whole < count:
            self._unit_UB[units_U[whole], : len(data) - whole * unit] = data[whole * unit :]

    def read(self, units_U: npt.NDArray[np.int64], plane: int) -> Tensor:
        """A plane's bytes, uint8; valid until the next plane of the same kind is read or its units are freed."""
        first, count = int(units_U[0]), len(units_U)
        unit, size = self._unit_UB.shape[1], self._bytes_K[plane]
        if int(units_U[-1]) - first == count - 1:
            return torch.from_numpy(self._memory[first * unit : first * unit + size])
        np.take(self._unit_UB, units_U, axis=0, out=self._scratch_K[plane])
        return torch.from_numpy(self._scratch_K[plane].reshape(-1)[:size])
