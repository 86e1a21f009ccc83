"""DevicePlan: which planes stay in memory, how high each expert's bits may go, and how the rest is loaded.

Legend: L routing sites, E experts, K levels of the ladder.
"""

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.atomic import write_text_atomically
from placer.core.device.cache import CACHE_POLICIES, CachePolicy
from placer.core.device.items import ORDER_RULES, OrderRule
from placer.core.device.ladder import BitLadder
from placer.core.errors import InputFileError, UsageError
from placer.core.plan import relative_gap
from placer.core.plan_file import read_plan_fields, refuse_wrong_types

__all__ = ["DevicePlan"]

IntArray = npt.NDArray[np.int64]

FORMAT = "placer-device-plan"
VERSION = 1
TABLES = ("resident_LE", "ceiling_LE")


@dataclass(frozen=True, slots=True, kw_only=True)
class DevicePlan:
    """What one device keeps and how it loads. Sizes are bytes; all experts have the same shape.

    resident_LE      levels in memory for good: nested, so many planes of each expert; copies, the one copy (0: nothing)
    ceiling_LE       the highest level (from 1) that an expert is used at; demand above is clipped to it
    order            rule by which the planes of a layer are loaded and computed
    cache            what stays of the planes that are loaded, in `cache_bytes`
    buffer_bytes     room for planes that are loaded and not done with (one layer's, and prefetched ones)
    prefetch_layers  how many layers ahead planes are loaded that a predictor expects (0: none)
    memory_bytes     the budget: resident planes + cache_bytes + buffer_bytes stay within it
    quality_cost     what clipping costs on the trace planned for, in `quality_name` units; None where not measured
    objective        of the trace planned for, in `objective_name` units; hashes: of trace, model, device and planes
    """

    model: str
    num_hidden_layers: int
    moe_layers: tuple[int, ...]
    num_experts: int
    ladder: BitLadder
    plane_bytes_K: tuple[int, ...]
    resident_LE: IntArray
    ceiling_LE: IntArray
    order: OrderRule = "hebf"
    cache: CachePolicy = "none"
    cache_bytes: int = 0
    buffer_bytes: int = 0
    prefetch_layers: int = 0
    memory_bytes: int = 0
    solver: str = ""
    status: str = ""
    stopped_by: str = ""
    objective_name: str = ""
    objective: float | None = None
    bound: float | None = None
    bound_by: str = ""
    quality_name: str = ""
    quality_cost: float | None = None
    seed: int = 0
    hashes: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (len(self.moe_layers), self.num_experts)
        for name, least in (("resident_LE", 0), ("ceiling_LE", 1)):
            table = getattr(self, name)
            if table.shape != shape:
                raise UsageError(f"plan.{name} is {table.shape}; {shape} (sites, experts) belongs there")
            if table.size and not least <= int(table.min()) <= int(table.max()) <= self.ladder.levels:
                raise UsageError(
                    f"plan.{name} has {int(table.min())} to {int(table.max())}; levels go from {least} to "
                    f"{self.ladder.levels}"
                )
        if len(self.plane_bytes_K) != self.ladder.levels or any(
            type(b) is not int or b < 1 for b in self.plane_bytes_K
        ):
            raise UsageError(
                f"plan.plane_bytes_K is {self.plane_bytes_K}; give the bytes of each of {self.ladder.levels} planes"
            )
        if self.order not in ORDER_RULES:
            raise UsageError(f"plan.order is {self.order!r}; use one of {', '.join(ORDER_RULES)}")
        if self.cache not in CACHE_POLICIES:
            raise UsageError(f"plan.cache is {self.cache!r}; use one of {', '.join(CACHE_POLICIES)}")
        for name in ("cache_bytes", "buffer_bytes", "prefetch_layers", "memory_bytes", "seed"):
            value = getattr(self, name)
            if type(value) is not int or value < 0:
                raise UsageError(f"plan.{name} is {value!r}; give a whole number, 0 or more")
        if self.prefetch_layers > 1:
            raise UsageError(
                f"plan.prefetch_layers is {self.prefetch_layers}; planes are loaded one layer ahead at most"
            )

    @property
    def present_LEK(self) -> npt.NDArray[np.bool_]:
        """Which planes are resident, (L, E, K)."""
        plane_K = np.arange(self.ladder.levels)
        resident_LE1 = self.resident_LE[..., None]
        return plane_K < resident_LE1 if self.ladder.nested else plane_K == resident_LE1 - 1

    @property
    def resident_bytes(self) -> int:
        """Bytes of the resident planes."""
        return int(self.present_LEK.sum(axis=(0, 1)) @ np.asarray(self.plane_bytes_K, dtype=np.int64))

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective, or None where either is unknown."""
        return relative_gap(self.objective, self.bound)

    @property
    def sha256(self) -> str:
        """Hash of the JSON form."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def to_json(self) -> str:
        """Canonical text: same plan, same bytes; one line per layer so that `diff` reads well."""
        head: dict[str, Any] = {"format": FORMAT, "version": VERSION}
        for each in fields(self):
            if each.name not in TABLES:
                head[each.name] = getattr(self, each.name)
        head["ladder"] = self.ladder.to_dict()
        head["gap"] = self.gap
        lines = [f" {json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in head.items()]
        for name in TABLES:
            rows = ",\n".join("  " + json.dumps(row) for row in getattr(self, name).tolist())
            lines.append(f" {json.dumps(name)}: [\n{rows}\n ]")
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def save(self, path: Path) -> None:
        """Writes the plan, whole or not at all."""
        write_text_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "DevicePlan":
        """Reads what `save` wrote. Raises InputFileError."""
        data = read_plan_fields(
            path,
            FORMAT,
            VERSION,
            {each.name for each in fields(cls)},
            what="a device plan",
            kind="device plan",
            maker="placer device plan",
        )
        try:
            data["ladder"] = BitLadder.from_dict(data["ladder"], where=f"{path}: ladder")
            for name in TABLES:
                data[name] = _table(data[name], name)
            for name in ("moe_layers", "plane_bytes_K"):
                data[name] = tuple(_whole_numbers(data[name], name))
            _refuse_wrong_types(data)
            return cls(**data)
        except KeyError as error:
            raise InputFileError(f"{path}: field {error} is missing; give what `placer device plan` wrote") from error
        except (TypeError, ValueError, OverflowError, UsageError) as error:
            raise InputFileError(f"{path}: damaged device plan ({error})") from error


def _whole_numbers(values: Any, name: str) -> list[int]:
    if not isinstance(values, list) or not all(type(value) is int for value in values):
        raise ValueError(f"{name} is {str(values)[:60]!r}; give a list of whole numbers")
    return values


def _table(rows: Any, name: str) -> IntArray:
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{name} must be a list of rows, one for each site")
    if len({len(_whole_numbers(row, name)) for row in rows}) != 1:
        raise ValueError(f"{name} has rows of different lengths")
    return np.array(rows, dtype=np.int64)


def _refuse_wrong_types(data: dict[str, Any]) -> None:
    texts = ("model", "solver", "status", "stopped_by", "objective_name", "bound_by", "quality_name")
    refuse_wrong_types(data, texts=texts, numbers=("objective", "bound", "quality_cost"))
    for name in ("num_experts", "num_hidden_layers"):
        if type(data[name]) is not int or data[name] < 1:
            raise ValueError(f"{name} is {data[name]!r}; give a positive integer")
