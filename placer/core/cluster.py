"""ClusterSpec: ranks, nodes, links and the speed of one rank.

One rank is one accelerator (an EP rank). Ranks are numbered node by node: rank = node * ranks_per_node + local rank.
Gigabytes per second are bytes per nanosecond, so bandwidths need no conversion against the nanosecond clock.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from dataclasses import field as field_of
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.errors import InputFileError, UsageError
from placer.core.modes import DISPATCH_MODES

__all__ = ["ClusterSpec", "Compute", "ExchangeCost", "LinkClass", "Software"]


LEAST, MOST = 1e-9, 1e12
"""Beyond these, times would not fit 64-bit nanoseconds."""


def _positive(owner: str, field: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not LEAST <= value <= MOST:
        raise UsageError(f"{owner}.{field} is {value!r}; give a positive number, {LEAST:g} to {MOST:g}")


def _microseconds(owner: str, field: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= MOST / 1e3:
        raise UsageError(f"{owner}.{field} is {value!r}; give microseconds, 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkClass:
    """One class of port: time of a message of n bytes = alpha_us + n / gbytes_per_s, each direction by itself.

    `tail` is what bytes cost more where several messages share the port, as `placer calibrate` finds it.
    """

    gbytes_per_s: float
    alpha_us: float = 0.0
    tail: float = 1.0

    def __post_init__(self) -> None:
        _positive("link", "gbytes_per_s", self.gbytes_per_s)
        _microseconds("link", "alpha_us", self.alpha_us)
        if isinstance(self.tail, bool) or not isinstance(self.tail, int | float) or not 1 <= self.tail <= 100:
            raise UsageError(f"link.tail is {self.tail!r}; give a factor, 1 to 100")

    @property
    def alpha_ns(self) -> float:
        """Fixed cost of one message in nanoseconds."""
        return self.alpha_us * 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class Compute:
    """Speed of one rank. A grouped expert GEMM takes launch + sum over experts of max(weight read, flops)."""

    tflops: float
    weight_read_gbytes_per_s: float
    launch_us: float = 0.0

    def __post_init__(self) -> None:
        _positive("compute", "tflops", self.tflops)
        _positive("compute", "weight_read_gbytes_per_s", self.weight_read_gbytes_per_s)
        _microseconds("compute", "launch_us", self.launch_us)

    @property
    def flops_per_ns(self) -> float:
        """Floating-point operations per nanosecond."""
        return self.tflops * 1e3


@dataclass(frozen=True, slots=True, kw_only=True)
class ExchangeCost:
    """What a rank's software adds to one dispatch or one combine: fixed, and for each of its own tokens."""

    fixed_us: float = 0.0
    token_us: float = 0.0

    def __post_init__(self) -> None:
        _microseconds("software.exchanges", "fixed_us", self.fixed_us)
        _microseconds("software.exchanges", "token_us", self.token_us)


@dataclass(frozen=True, slots=True, kw_only=True)
class Software:
    """What running a layer costs beside links and GEMMs, as `placer calibrate` finds it. Nothing where not calibrated.

    layer_us       fixed, once a layer (norms, launches, the interpreter)
    exchanges      cost of an exchange by dispatch mode; a mode that is not there costs nothing
    shared_cores   processor cores that all ranks share, where they do (ranks on one machine's CPU)
    """

    layer_us: float = 0.0
    exchanges: Mapping[str, ExchangeCost] = field_of(default_factory=dict)
    shared_cores: int | None = None

    def __post_init__(self) -> None:
        _microseconds("software", "layer_us", self.layer_us)
        if not isinstance(self.exchanges, Mapping):
            raise UsageError(f"software.exchanges is {self.exchanges!r}; give a cost for each dispatch mode")
        for mode, cost in self.exchanges.items():
            if mode not in DISPATCH_MODES or not isinstance(cost, ExchangeCost):
                raise UsageError(
                    f"software.exchanges has {mode!r}: {cost!r}; give fixed_us and token_us for any of "
                    f"{', '.join(DISPATCH_MODES)}"
                )
        cores = self.shared_cores
        if cores is not None and (isinstance(cores, bool) or not isinstance(cores, int) or cores < 1):
            raise UsageError(f"software.shared_cores is {cores!r}; give a positive integer or leave it out")


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """`nodes` x `ranks_per_node` ranks, equal but for `rank_speed` and `rank_memory_gib`.

    `rank_speed` is the speed of each rank's compute as a multiple of `compute` (empty: 1 for all), `rank_memory_gib`
    its memory for expert weights (empty: `memory_gib` for all).
    `intra` is each rank's port to its node's other ranks, `inter` each rank's own network port (its NIC), `uplink` the
    network port that a whole node shares (None: the sum of the NICs is the only limit). Full duplex everywhere.
    """

    name: str
    nodes: int
    ranks_per_node: int
    memory_gib: float
    intra: LinkClass
    inter: LinkClass
    compute: Compute
    uplink: LinkClass | None = None
    rank_speed: tuple[float, ...] = ()
    rank_memory_gib: tuple[float, ...] = ()
    software: Software | None = None

    def __post_init__(self) -> None:
        for field in ("nodes", "ranks_per_node"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"cluster.{field} is {value!r}; give a positive integer")
        _positive("cluster", "memory_gib", self.memory_gib)
        if not isinstance(self.name, str):
            raise UsageError(f"cluster.name is {self.name!r}; give a text")
        kinds = {"intra": LinkClass, "inter": LinkClass, "uplink": LinkClass, "compute": Compute, "software": Software}
        for field, kind in kinds.items():
            value = getattr(self, field)
            if not isinstance(value, kind) and not (field in ("uplink", "software") and value is None):
                raise UsageError(f"cluster.{field} is {value!r}; give a {kind.__name__}")
        for field in ("rank_speed", "rank_memory_gib"):
            values = getattr(self, field)
            if not isinstance(values, tuple):
                raise UsageError(f"cluster.{field} is {values!r}; give a list with a number for every rank")
            if values and len(values) != self.num_ranks:
                raise UsageError(
                    f"cluster.{field} has {len(values)} numbers for {self.num_ranks} ranks; give one for every rank, "
                    "or leave it out where all are equal"
                )
            for rank, value in enumerate(values):
                _positive("cluster", f"{field}[{rank}]", value)

    @property
    def num_ranks(self) -> int:
        """R, the EP size."""
        return self.nodes * self.ranks_per_node

    @property
    def memory_bytes(self) -> int:
        """Bytes of one rank's memory that expert weights may fill, where `rank_memory_gib` does not say otherwise."""
        return int(self.memory_gib * 2**30)

    @property
    def memory_bytes_R(self) -> npt.NDArray[np.int64]:
        """Bytes of each rank's memory that expert weights may fill, (R,)."""
        gib = self.rank_memory_gib or (self.memory_gib,) * self.num_ranks
        return np.array([int(value * 2**30) for value in gib], dtype=np.int64)

    @property
    def speed_R(self) -> npt.NDArray[np.float64] | None:
        """Relative compute speed of each rank, (R,), or None where all are equal."""
        return np.array(self.rank_speed, dtype=np.float64) if len(set(self.rank_speed)) > 1 else None

    @property
    def kind_R(self) -> npt.NDArray[np.int64]:
        """Equal numbers for ranks of equal speed and memory, (R,): only those may take each other's label."""
        pairs = np.stack([self.rank_speed or np.ones(self.num_ranks), self.memory_bytes_R])
        kinds: npt.NDArray[np.int64] = np.unique(pairs, axis=1, return_inverse=True)[1].reshape(-1)
        return kinds

    @property
    def node_R(self) -> npt.NDArray[np.int64]:
        """Node of each rank, (R,)."""
        return np.arange(self.num_ranks) // self.ranks_per_node

    @property
    def sha256(self) -> str:
        """Hash of the canonical JSON form."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types; the YAML form of a cluster has the same keys. What is empty is left out."""
        data = asdict(self)
        for field in ("rank_speed", "rank_memory_gib"):
            if data[field]:
                data[field] = list(data[field])
            else:
                # a cluster of equal ranks has the hash it had before ranks could differ
                del data[field]
        for field in ("intra", "inter", "uplink"):
            # and one without a tail the hash it had before there were tails
            if data[field] is not None and data[field]["tail"] == 1:
                del data[field]["tail"]
        if data["software"] is None:
            del data["software"]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "cluster") -> "ClusterSpec":
        """Inverts `to_dict`. Raises InputFileError naming `where`."""
        try:
            fields = dict(data)
            for link in ("intra", "inter", "uplink"):
                if fields.get(link) is not None:
                    fields[link] = LinkClass(**fields[link])
            for field in ("rank_speed", "rank_memory_gib"):
                if field in fields:
                    fields[field] = tuple(fields[field])
            fields["compute"] = Compute(**fields["compute"])
            if fields.get("software") is not None:
                software = dict(fields["software"])
                costs = dict(software.get("exchanges") or {})
                software["exchanges"] = {mode: ExchangeCost(**cost) for mode, cost in costs.items()}
                fields["software"] = Software(**software)
            return cls(**fields)
        except (TypeError, KeyError, ValueError) as error:
            raise InputFileError(f"{where}: not a cluster description ({error})") from error
        except UsageError as error:
            raise InputFileError(f"{where}: {error}") from error
