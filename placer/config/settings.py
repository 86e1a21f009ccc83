"""Settings beyond the command line's few flags: one YAML file, every key optional."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from placer.config.device_settings import DeviceSettings
from placer.config.strict import from_mapping, read_yaml
from placer.core.errors import UsageError
from placer.core.modes import ReplicaChoice
from placer.core.schedule import MOST_CHUNKS

__all__ = [
    "CalibrateSettings",
    "ProfileSettings",
    "RunSettings",
    "ScheduleSettings",
    "Settings",
    "SolveSettings",
    "load_settings",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProfileSettings:
    """How a trace is counted: tokens per load window, request folds, expert sets kept per layer."""

    window_tokens: int = 2048
    folds: int = 64
    max_sets_per_layer: int = 131_072

    def __post_init__(self) -> None:
        _positive(self, "profile", ("window_tokens", "folds", "max_sets_per_layer"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SolveSettings:
    """What the engine will do with the plan: its replica choice and the tokens of one iteration over all ranks.

    max_window_par: cap on max / mean rank load in windows of profile.window_tokens, mean over windows and layers.
    "balanced" is what a load-only plan has on unseen windows; null is none. There is none either where PAR has no cap.
    `max_moved_gib`, `max_moved_layers`: how many GiB of weights a plan made with --from may have sent, and in how many
    layers it may differ (None: no limit). `allow_empty_slots`: ranks may hold unequal numbers of experts: placer's
    own executor and simulator take that, no engine does.
    """

    replica_choice: ReplicaChoice = "visit_first"
    batch_tokens: int = 2048
    max_window_par: float | Literal["balanced"] | None = "balanced"
    max_moved_gib: float | None = None
    max_moved_layers: int | None = None
    allow_empty_slots: bool = False

    def __post_init__(self) -> None:
        _positive(self, "solve", ("batch_tokens",))
        if isinstance(self.max_window_par, float | int) and not self.max_window_par >= 1:
            raise UsageError(f"solve.max_window_par is {self.max_window_par}; max / mean load cannot be below 1.0")
        for name in ("max_moved_gib", "max_moved_layers"):
            value = getattr(self, name)
            if value is not None and not 0 <= value < math.inf:
                raise UsageError(f"solve.{name} is {value}; give 0 or more, or leave it out for no limit")


@dataclass(frozen=True, slots=True, kw_only=True)
class RunSettings:
    """Size of a measured replay. Weights are random and small unless --model gives a checkpoint.

    `launches`: how often the ranks are started afresh. `realtime`: ranks run at real-time priority (needs root).
    """

    hidden_size: int = 256
    moe_intermediate_size: int = 512
    tokens_per_iteration: int = 512
    iterations: int = 8
    warmup: int = 2
    dtype: Literal["float32", "bfloat16"] = "float32"
    timeout_s: float = 300.0
    launches: int = 1
    realtime: bool = False

    def __post_init__(self) -> None:
        sizes = ("hidden_size", "moe_intermediate_size", "tokens_per_iteration", "iterations", "timeout_s", "launches")
        _positive(self, "run", sizes)
        if self.warmup < 0:
            raise UsageError(f"run.warmup is {self.warmup}; give 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduleSettings:
    """What `placer schedule` tries. Tokens of a prefill iteration are solve.batch_tokens.

    decode_tokens   tokens of a decode iteration over all ranks
    max_degree      pipeline degrees 1 to this
    iterations      how many iterations, spread evenly over the trace, candidates are priced on
    """

    decode_tokens: int = 256
    max_degree: int = 4
    iterations: int = 32

    def __post_init__(self) -> None:
        _positive(self, "schedule", ("decode_tokens", "max_degree", "iterations"))
        if self.max_degree > MOST_CHUNKS:
            raise UsageError(f"schedule.max_degree is {self.max_degree}; give 1 to {MOST_CHUNKS}")


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateSettings:
    """At which shapes and sizes `placer calibrate` measures; what is left out is as in section `run`.

    realtime: ask for realtime priority (root only): far less noise, but everything else on the machine waits.
    """

    hidden_size: int | None = None
    moe_intermediate_size: int | None = None
    dtype: Literal["float32", "bfloat16"] | None = None
    message_bytes: tuple[int, ...] = (16_384, 32_768, 65_536, 131_072, 262_144, 524_288, 1_048_576)
    rows: tuple[int, ...] = (8, 16, 32, 64, 128, 256)
    experts_per_rank: int = 8
    top_k: int = 2
    repetitions: int = 9
    launches: int = 2
    realtime: bool = False

    def __post_init__(self) -> None:
        optional = [name for name in ("hidden_size", "moe_intermediate_size") if getattr(self, name) is not None]
        _positive(self, "calibrate", (*optional, "experts_per_rank", "top_k", "repetitions", "launches"))


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """All settings; the sections of the YAML file: `profile`, `solve`, `run`, `schedule`, `calibrate` and `device`."""

    profile: ProfileSettings = field(default_factory=ProfileSettings)
    solve: SolveSettings = field(default_factory=SolveSettings)
    run: RunSettings = field(default_factory=RunSettings)
    schedule: ScheduleSettings = field(default_factory=ScheduleSettings)
    calibrate: CalibrateSettings = field(default_factory=CalibrateSettings)
    device: DeviceSettings = field(default_factory=DeviceSettings)


def load_settings(path: Path | None) -> Settings:
    """The settings in a YAML file, or the defaults (an empty file has them too). Raises InputFileError."""
    data = None if path is None else read_yaml(path)
    return Settings() if data is None else from_mapping(Settings, data, where=str(path))


def _positive(settings: object, section: str, names: tuple[str, ...]) -> None:
    for name in names:
        value = getattr(settings, name)
        if not (value > 0 and math.isfinite(value)):
            raise UsageError(f"{section}.{name} is {value}; give a number above 0")
