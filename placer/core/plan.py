"""Plan: where every physical expert lives and how tokens reach it. JSON, one line per layer, versioned, hashed.

Legend: L routing sites, P physical slots, R ranks, E logical experts.
"""

import hashlib
import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.atomic import write_text_atomically
from placer.core.errors import InputFileError, UsageError
from placer.core.modes import DISPATCH_MODES, REPLICA_CHOICES, DispatchMode, ReplicaChoice
from placer.core.plan_file import read_plan_fields, refuse_wrong_types
from placer.core.schedule import Kind, Schedule

__all__ = ["Plan", "canonical_slots", "relative_gap"]

FORMAT = "placer-plan"
VERSION = 1
SCHEDULES = ("prefill", "decode")


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One placement. Slot p of every layer lives on rank p // (P / R): contiguous blocks, as every engine has it.

    slot_expert_LP    int64 (L, P)   logical expert in each slot; -1 = empty (uneven experts per rank: placer's own
                      executor and simulator take it, no engine does)
    replica_share_LP  float64 (L, P) or None   share of its expert's tokens that a slot should get (visit_first uses it
                      where a token visits no replica's rank anyway); None means equal shares
    moe_layers        absolute layer id of each row; num_hidden_layers counts dense layers too (engines need it)
    hashes            SHA-256 of the trace, model, cluster and limits it was solved for
    prefill, decode   how the all-to-alls run in either kind of iteration; None: linear, not pipelined
    """

    model: str
    num_experts: int
    num_ranks: int
    ranks_per_node: int
    moe_layers: tuple[int, ...]
    slot_expert_LP: npt.NDArray[np.int64]
    mode: DispatchMode
    replica_choice: ReplicaChoice = "visit_first"
    replica_share_LP: npt.NDArray[np.float64] | None = None
    solver: str = ""
    status: str = ""
    stopped_by: str = ""
    objective_name: str = ""
    objective: float | None = None
    bound: float | None = None
    bound_by: str = ""
    seed: int = 0
    num_hidden_layers: int | None = None
    hashes: dict[str, str] = field(default_factory=dict)
    prefill: Schedule | None = None
    decode: Schedule | None = None

    def __post_init__(self) -> None:
        if self.slot_expert_LP.ndim != 2:
            raise UsageError(f"plan.slot_expert_LP has {self.slot_expert_LP.ndim} axes; it needs (layers, slots)")
        for name in ("num_experts", "num_ranks", "ranks_per_node"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UsageError(f"plan.{name} is {value!r}; give a positive integer")
        if self.num_ranks % self.ranks_per_node:
            raise UsageError(f"plan.num_ranks {self.num_ranks} is no multiple of ranks_per_node {self.ranks_per_node}")
        if self.mode not in DISPATCH_MODES:
            raise UsageError(f"plan.mode is {self.mode!r}; use one of {', '.join(DISPATCH_MODES)}")
        if self.replica_choice not in REPLICA_CHOICES:
            raise UsageError(f"plan.replica_choice is {self.replica_choice!r}; use one of {', '.join(REPLICA_CHOICES)}")
        for schedule in (self.prefill, self.decode):
            if schedule is not None:
                schedule.refuse_misfit(self.mode, len(self.slot_expert_LP), self.num_ranks)

    @property
    def num_slots(self) -> int:
        """P, physical experts per layer."""
        return int(self.slot_expert_LP.shape[1])

    @property
    def slots_per_rank(self) -> int:
        """Slots of each rank in each layer."""
        return self.num_slots // self.num_ranks

    @property
    def gap(self) -> float | None:
        """(objective - bound) / objective, or None where either is unknown."""
        return relative_gap(self.objective, self.bound)

    @property
    def sha256(self) -> str:
        """Hash of the JSON form."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def schedule(self, kind: Kind) -> Schedule:
        """How the all-to-alls run in iterations of this kind."""
        schedule = self.prefill if kind == "prefill" else self.decode
        return Schedule.uniform(len(self.slot_expert_LP)) if schedule is None else schedule

    def to_json(self) -> str:
        """Canonical text: same Plan, same bytes; one line per layer so that `diff` reads well."""
        names = [f.name for f in fields(self) if not f.name.endswith("_LP") and f.name not in SCHEDULES]
        head = {name: getattr(self, name) for name in names}
        head = {"format": FORMAT, "version": VERSION, **head, "gap": self.gap}
        lines = [f" {json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in head.items()]
        lines.append(f' "slot_expert_LP": {_rows(self.slot_expert_LP.tolist())}')
        if self.replica_share_LP is not None:
            lines.append(f' "replica_share_LP": {_rows(np.round(self.replica_share_LP, 6).tolist())}')
        for name, schedule in (("prefill", self.prefill), ("decode", self.decode)):
            if schedule is not None:
                text = json.dumps(schedule.to_dict(), sort_keys=True)
                lines += [f' "{name}": {text}']
        return "{\n" + ",\n".join(lines) + "\n}\n"

    def save(self, path: Path) -> None:
        """Writes the plan, whole or not at all."""
        write_text_atomically(path, self.to_json())

    @classmethod
    def load(cls, path: Path) -> "Plan":
        """Reads what `save` wrote. Raises InputFileError; `check` says whether the plan is legal for a problem."""
        data = read_plan_fields(
            path,
            FORMAT,
            VERSION,
            {f.name for f in fields(cls)},
            what="a placer plan",
            kind="plan",
            maker="placer solve",
        )
        try:
            data["slot_expert_LP"] = _matrix(data["slot_expert_LP"], np.int64, "slot_expert_LP")
            if data.get("replica_share_LP") is not None:
                data["replica_share_LP"] = _matrix(data["replica_share_LP"], np.float64, "replica_share_LP")
            data["moe_layers"] = _layers(data["moe_layers"])
            for name in SCHEDULES:
                if data.get(name) is not None:
                    data[name] = Schedule.from_dict(data[name])
            _refuse_wrong_types(data)
            return cls(**data)
        except KeyError as error:
            raise InputFileError(f"{path}: field {error} is missing; give what `placer solve` wrote") from error
        except (TypeError, ValueError, OverflowError, UsageError) as error:
            raise InputFileError(f"{path}: damaged plan ({error})") from error


def relative_gap(objective: float | None, bound: float | None) -> float | None:
    """(objective - bound) / objective, 0 or more; None where either is unknown."""
    if objective is None or bound is None:
        return None
    return 0.0 if objective == 0 else max(0.0, (objective - bound) / abs(objective))


def canonical_slots(slot_expert_LP: npt.NDArray[np.int64], num_ranks: int) -> npt.NDArray[np.int64]:
    """The same placement with each rank's experts in ascending order, (L, P): equal placements get equal bytes."""
    layers, slots = slot_expert_LP.shape
    return np.sort(slot_expert_LP.reshape(layers, num_ranks, slots // num_ranks), axis=2).reshape(layers, slots)


def _layers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(type(layer) is int and layer >= 0 for layer in value):
        raise ValueError(f"moe_layers is {str(value)[:60]}; give a list of layer numbers from 0")
    return tuple(value)


def _refuse_wrong_types(data: dict[str, Any]) -> None:
    """What JSON may hold in a field that the constructor does not look at."""
    texts = ("model", "solver", "status", "stopped_by", "objective_name", "bound_by")
    refuse_wrong_types(data, texts=texts, numbers=("objective", "bound"))
    if type(data.get("seed", 0)) is not int:
        raise ValueError(f"seed is {data['seed']!r}; give a whole number")
    layers = data.get("num_hidden_layers")
    if layers is not None and (type(layers) is not int or layers < 1):
        raise ValueError(f"num_hidden_layers is {layers!r}; give a positive integer or null")


def _rows(rows: list[list[Any]]) -> str:
    return "[\n" + ",\n".join("  " + json.dumps(row) for row in rows) + "\n ]"


def _matrix(rows: Any, dtype: Any, name: str) -> npt.NDArray[Any]:
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) for row in rows):
        raise ValueError(f"{name} must be a list of rows, one per layer")
    if len({len(row) for row in rows}) != 1:
        widths = sorted({len(row) for row in rows})
        raise ValueError(f"{name} has rows of different lengths {widths}; every layer needs the same number of slots")
    allowed = (int,) if dtype is np.int64 else (int, float)
    for layer, row in enumerate(rows):
        for value in row:
            if isinstance(value, bool) or not isinstance(value, allowed):
                raise ValueError(f"{name} row {layer} has {value!r}; give numbers")
    return np.asarray(rows, dtype=dtype)
