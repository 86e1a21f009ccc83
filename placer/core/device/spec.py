"""DeviceSpec: the memory, disk and processor of one machine that loads experts while it computes."""

import hashlib
import itertools
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from placer.core.cluster import LinkClass
from placer.core.errors import InputFileError, UsageError

__all__ = ["DeviceCompute", "DeviceSpec"]

MOST_US = 1e9


def _not_negative(field: str, value: object, most: float = MOST_US) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= most:
        raise UsageError(f"device.{field} is {value!r}; give a number, 0 to {most:g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceCompute:
    """What the processor needs, in microseconds, for experts of one shape (`placer device calibrate` measures it).

    layer_us, layer_token_us   attention, norms and router of one layer: fixed, and for every token
    base_us, residual_us       turning an expert's base plane (or a whole copy) into weights, and adding one residual
    ffn_tokens, ffn_us         the expert's feed-forward at these numbers of tokens, ascending: straight lines between
                               them, through the first two before and through the last two beyond
    io_slowdown                factor on all of it while the disk is read (1: none)
    """

    layer_us: float
    layer_token_us: float = 0.0
    base_us: float
    residual_us: float
    ffn_tokens: tuple[int, ...]
    ffn_us: tuple[float, ...]
    io_slowdown: float = 1.0

    def __post_init__(self) -> None:
        for field in ("layer_us", "layer_token_us", "base_us", "residual_us"):
            _not_negative(f"compute.{field}", getattr(self, field))
        tokens, microseconds = self.ffn_tokens, self.ffn_us
        if len(tokens) != len(microseconds) or len(tokens) < 2:
            raise UsageError(
                f"device.compute.ffn_tokens has {len(tokens)} numbers and ffn_us {len(microseconds)}; give the same "
                "number of both, two or more"
            )
        if any(isinstance(t, bool) or not isinstance(t, int) or t < 1 for t in tokens) or any(
            a >= b for a, b in itertools.pairwise(tokens)
        ):
            raise UsageError(f"device.compute.ffn_tokens is {tokens!r}; give whole numbers from 1, ascending")
        for value in microseconds:
            _not_negative("compute.ffn_us", value)
        _not_negative("compute.io_slowdown", self.io_slowdown, 100)
        if self.io_slowdown < 1:
            raise UsageError(f"device.compute.io_slowdown is {self.io_slowdown!r}; give a factor, 1 or more")

    def ffn_time_us(self, tokens: int) -> float:
        """Microseconds of one expert's feed-forward for so many tokens; 0 for none."""
        if tokens <= 0:
            return 0.0
        x, y = self.ffn_tokens, self.ffn_us
        at = min(max(int(np.searchsorted(x, tokens)), 1), len(x) - 1)
        slope = (y[at] - y[at - 1]) / (x[at] - x[at - 1])
        return max(0.0, y[at - 1] + slope * (tokens - x[at - 1]))

    def item_ns(self, *, base: bool, tokens: int) -> int:
        """Nanoseconds to turn one plane into weights, and to run `tokens` tokens with them."""
        return round(1e3 * ((self.base_us if base else self.residual_us) + self.ffn_time_us(tokens)))

    def layer_ns(self, tokens: int) -> int:
        """Nanoseconds of one layer outside its experts."""
        return round(1e3 * (self.layer_us + self.layer_token_us * tokens))


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSpec:
    """One machine. `memory_mib` is what planes may fill: resident, cached, and loaded but not yet used.

    disk           one read of n bytes takes alpha_us + n / gbytes_per_s; reads follow one another
    to_device      the second hop, from host memory to an accelerator's (None: planes are computed where they land); it
                   works beside the disk
    disk_limit_mbytes_per_s   the bandwidth that `run` holds the reads to (None: as fast as the disk is); `disk` then
                   has no more than that
    """

    name: str
    memory_mib: float
    disk: LinkClass
    compute: DeviceCompute
    to_device: LinkClass | None = None
    disk_limit_mbytes_per_s: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.name, str):
            raise UsageError(f"device.name is {self.name!r}; give a text")
        _not_negative("memory_mib", self.memory_mib, 1e9)
        kinds = {"disk": LinkClass, "compute": DeviceCompute, "to_device": LinkClass}
        for field, kind in kinds.items():
            value = getattr(self, field)
            if not isinstance(value, kind) and not (field == "to_device" and value is None):
                raise UsageError(f"device.{field} is {value!r}; give a {kind.__name__}")
        limit = self.disk_limit_mbytes_per_s
        if limit is not None:
            _not_negative("disk_limit_mbytes_per_s", limit)
            if limit <= 0:
                raise UsageError(f"device.disk_limit_mbytes_per_s is {limit!r}; give a number above 0, or leave it out")

    @property
    def memory_bytes(self) -> int:
        """The budget in bytes."""
        return int(self.memory_mib * 2**20)

    def read_ns(self, nbytes: int) -> int:
        """Nanoseconds of one read from the disk; 0 for no bytes."""
        return _hop_ns(self.disk, nbytes)

    def copy_ns(self, nbytes: int) -> int:
        """Nanoseconds of one copy to the accelerator; 0 where there is none."""
        return 0 if self.to_device is None else _hop_ns(self.to_device, nbytes)

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON form."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the YAML form of a device has the same keys."""
        data = asdict(self)
        for field in ("ffn_tokens", "ffn_us"):
            data["compute"][field] = list(data["compute"][field])
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "device") -> "DeviceSpec":
        """Inverts `to_dict`. Raises InputFileError naming `where`."""
        try:
            fields = dict(data)
            compute = dict(fields["compute"])
            for field in ("ffn_tokens", "ffn_us"):
                compute[field] = tuple(compute[field])
            fields["compute"] = DeviceCompute(**compute)
            for field in ("disk", "to_device"):
                if fields.get(field) is not None:
                    fields[field] = LinkClass(**fields[field])
            return cls(**fields)
        except (TypeError, KeyError, ValueError) as error:
            raise InputFileError(f"{where}: not a device description ({error})") from error
        except UsageError as error:
            raise InputFileError(f"{where}: {error}") from error


def _hop_ns(link: LinkClass, nbytes: int) -> int:
    # gigabytes per second are bytes per nanosecond
    return round(link.alpha_ns + nbytes / link.gbytes_per_s) if nbytes else 0
