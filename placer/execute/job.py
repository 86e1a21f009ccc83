"""ReplayJob: everything the ranks of one measured run must agree on, as a JSON file beside a few arrays.

Legend: L sites, T tokens, K top-k.
"""

import json
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from placer.core.atomic import write_text_atomically
from placer.core.errors import InputFileError, UsageError
from placer.core.modes import DISPATCH_MODES, DispatchMode
from placer.core.schedule import KINDS, Kind, Schedule

__all__ = [
    "BACKENDS",
    "DTYPES",
    "EXECUTION_MODES",
    "Backend",
    "DType",
    "ExecutionMode",
    "ReplayJob",
    "metadata_bytes",
    "packed_bytes",
]

ExecutionMode = DispatchMode
"""The dispatch modes that the executor runs: all."""

Backend = Literal["auto", "gloo", "nccl"]
"""What carries the all-to-all. auto: NCCL where every rank of a machine has a CUDA device of its own, else gloo."""

DType = Literal["float32", "bfloat16"]
"""Type of weights and hidden states."""

EXECUTION_MODES: tuple[ExecutionMode, ...] = DISPATCH_MODES
BACKENDS: tuple[Backend, ...] = get_args(Backend)
DTYPES: tuple[DType, ...] = get_args(DType)

FORMAT = "placer-replay-job"
VERSION = 1
PATHS = ("plan_path", "expert_path", "weight_path", "source_path", "experts_path", "result_path")


def packed_bytes(top_k: int, *, named: bool = False) -> int:
    """Bytes in front of a packed copy's hidden state: a float32 weight and an int32 slot per choice, an int32 name."""
    return 8 * top_k + 4 * named


def metadata_bytes(mode: DispatchMode, top_k: int) -> int:
    """Bytes that travel with each dispatched copy beside its hidden state."""
    return 0 if mode == "per_expert" else packed_bytes(top_k, named=mode == "coherent")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplayJob:
    """One plan, the routed tokens to replay through it, and how.

    plan_path      a Plan                       experts_path  safetensors of the experts, a file or a checkpoint folder
    expert_path    .npy of expert_LTK           weight_path   .npy of weight_LTK, or None for equal weights
    source_path    .npy of source_T             result_path   where rank 0 writes the Timeline
    stored_layers  the layer under which each site's experts are stored, length L
    kind, schedule how the all-to-alls run: the plan's schedule for this kind of iteration, or `schedule` instead
    order_seed     of the order in which the jobs of a launch take turns
    realtime       ranks ask the kernel for real-time priority (SCHED_RR, 10), which needs root

    Iteration i replays tokens i * tokens_per_iteration and following; `warmup` iterations run before, unrecorded.
    `timeout_s` is how long one collective may take. `verify` makes rank 0 compare all outputs with a single-process
    reference. `about` is copied into the Timeline. Relative paths in a file are relative to the file's folder.
    """

    plan_path: str
    expert_path: str
    source_path: str
    experts_path: str
    result_path: str
    stored_layers: tuple[int, ...]
    mode: ExecutionMode
    tokens_per_iteration: int
    iterations: int
    warmup: int = 1
    seed: int = 0
    dtype: DType = "float32"
    weight_path: str | None = None
    verify: bool = True
    backend: Backend = "auto"
    timeout_s: float = 600.0
    kind: Kind = "prefill"
    schedule: Schedule | None = None
    realtime: bool = False
    order_seed: int = 0
    about: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        choices = (("mode", EXECUTION_MODES), ("dtype", DTYPES), ("backend", BACKENDS), ("kind", KINDS))
        for name, allowed in choices:
            if getattr(self, name) not in allowed:
                raise UsageError(f"replay.{name} is {getattr(self, name)!r}; use one of {', '.join(allowed)}")
        for name, least in (
            ("tokens_per_iteration", 1),
            ("iterations", 1),
            ("warmup", 0),
            ("seed", 0),
            ("order_seed", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"replay.{name} is {value!r}; give an integer of at least {least}")
        if isinstance(self.timeout_s, bool) or not isinstance(self.timeout_s, int | float) or not self.timeout_s > 0:
            raise UsageError(f"replay.timeout_s is {self.timeout_s!r}; give a positive number of seconds")

    @property
    def num_tokens(self) -> int:
        """Tokens that the recorded iterations replay."""
        return self.iterations * self.tokens_per_iteration

    def save(self, path: Path) -> None:
        """Writes the job as JSON, whole or not at all."""
        values = asdict(replace(self, schedule=None))
        schedule = None if self.schedule is None else self.schedule.to_dict()
        data = {"format": FORMAT, "version": VERSION, **values, "schedule": schedule}
        write_text_atomically(path, json.dumps(data, indent=1, sort_keys=True) + "\n")

    @classmethod
    def load(cls, path: Path) -> "ReplayJob":
        """Reads what `save` wrote, relative paths resolved. Raises InputFileError."""
        path = Path(path)
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise InputFileError(f"{path}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise InputFileError(f"{path}: is not JSON ({error}); give a replay job that placer wrote") from error
        if not isinstance(data, dict) or (data.pop("format", None), data.pop("version", None)) != (FORMAT, VERSION):
            raise InputFileError(f"{path}: is not a replay job of version {VERSION}; give one that placer wrote")
        if unknown := sorted(set(data) - {item.name for item in fields(cls)}):
            raise InputFileError(f"{path}: unknown field {unknown[0]!r}; remove it or use a newer placer")
        try:
            schedule = None if data.get("schedule") is None else Schedule.from_dict(data["schedule"])
            stored = tuple(int(layer) for layer in data["stored_layers"])
            job = cls(**data | {"stored_layers": stored, "schedule": schedule})
            paths: dict[str, Any] = {name: getattr(job, name) for name in PATHS}
            paths = {name: None if value is None else str(path.parent / value) for name, value in paths.items()}
            return replace(job, **paths)
        except KeyError as error:
            raise InputFileError(f"{path}: field {error} is missing") from error
        except (TypeError, ValueError, UsageError) as error:
            raise InputFileError(f"{path}: damaged replay job ({error})") from error
