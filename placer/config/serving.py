"""Settings of `placer simulate --serve` and `--sweep`: strict YAML, every key optional but where it says otherwise."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from placer.config.strict import from_mapping, read_yaml
from placer.core.errors import UsageError
from placer.core.modes import DispatchMode
from sim.serving import Arrivals, Limits, Rebalancing, Slo

__all__ = [
    "DisaggregatedSettings",
    "RebalanceSettings",
    "ServeSettings",
    "SweepSettings",
    "load_serve_settings",
    "load_sweep_settings",
]

MOST_POINTS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class RebalanceSettings:
    """Windows of iterations, and who is asked for a new plan at the end of each (`solver` null: nobody).

    window_iterations, sample_tokens, manner are those of sim.serving.Rebalancing; `solver_time_s` is the solver's own
    time limit, which the simulated clock is not charged with.
    """

    window_iterations: int = 200
    sample_tokens: int = 8192
    manner: Literal["pause", "overlap"] = "pause"
    solver: str | None = None
    solver_time_s: float = 10.0

    def __post_init__(self) -> None:
        self.rebalancing()
        _positive("rebalance.solver_time_s", self.solver_time_s)

    def rebalancing(self) -> Rebalancing:
        """The part that the simulator knows."""
        return Rebalancing(
            window_iterations=self.window_iterations, sample_tokens=self.sample_tokens, manner=self.manner
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DisaggregatedSettings:
    """A prefill pool beside the decode pool, which PLAN and --cluster describe. `kv_bytes_per_token` is required.

    `prefill_plan`, `prefill_cluster`: the prefill pool's own, else the decode pool's again. Keys and values travel over
    the network link of the decode cluster's ranks.
    """

    kv_bytes_per_token: int
    prefill_plan: str | None = None
    prefill_cluster: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ServeSettings:
    """A serving run.

    requests     Mooncake-style JSONL file that takes the place of `arrivals` (arrivals.requests: the first so many)
    placement    on which rank a request's attention runs; affinity: where its prompt's experts live, among ranks with
                 at most `affinity_slack` requests more than the least loaded
    routing      whose rows of the trace a request takes: any request's at random, or the trace's requests in order,
                 which keeps the drift that it has
    """

    seed: int = 0
    requests: str | None = None
    arrivals: Arrivals = field(default_factory=Arrivals)
    limits: Limits = field(default_factory=Limits)
    placement: Literal["round_robin", "least_loaded", "affinity"] = "least_loaded"
    affinity_slack: int = 2
    routing: Literal["random", "in_order"] = "random"
    slo: Slo = field(default_factory=Slo)
    rebalance: RebalanceSettings = field(default_factory=RebalanceSettings)
    disaggregated: DisaggregatedSettings | None = None

    def __post_init__(self) -> None:
        for name in ("seed", "affinity_slack"):
            value = getattr(self, name)
            if isinstance(value, bool) or not 0 <= value < 2**63:
                raise UsageError(f"{name} is {value}; give a whole number, 0 or more")


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """Every combination of the lists is solved for and served.

    clusters    names or YAML files         ep_sizes   numbers of ranks to cut each cluster to (empty: as it is)
    redundant   redundant slots             batches    limits.requests_per_rank (empty: as `serve` has it)
    modes       dispatch modes              solver, time_s   who makes each plan, and in what time
    trace       the routing trace, where --trace is not given
    """

    trace: str | None = None
    clusters: tuple[str, ...] = ("node8",)
    ep_sizes: tuple[int, ...] = ()
    redundant: tuple[int, ...] = (0,)
    batches: tuple[int, ...] = ()
    modes: tuple[DispatchMode, ...] = ("per_rank",)
    solver: str = "auto"
    time_s: float = 30.0
    serve: ServeSettings = field(default_factory=ServeSettings)

    def __post_init__(self) -> None:
        _positive("time_s", self.time_s)
        points = 1
        for name, least in (("clusters", None), ("ep_sizes", 1), ("redundant", 0), ("batches", 1), ("modes", None)):
            values = getattr(self, name)
            if not values and name in ("clusters", "redundant", "modes"):
                raise UsageError(f"{name} is empty; give at least one")
            if len(set(values)) < len(values):
                raise UsageError(f"{name} is {list(values)}; give every value once")
            if least is not None and any(value < least for value in values):
                raise UsageError(f"{name} has {min(values)}; give {least} or more")
            points *= max(1, len(values))
        if points > MOST_POINTS:
            raise UsageError(f"the lists make {points} points; give at most {MOST_POINTS}")
        if self.serve.disaggregated is not None:
            raise UsageError("serve.disaggregated is given; a sweep solves for one mixed pool, leave it out")


def load_serve_settings(path: Path) -> ServeSettings:
    """The settings of a serving run (an empty file has the defaults). Raises InputFileError."""
    data = read_yaml(path)
    return ServeSettings() if data is None else from_mapping(ServeSettings, data, where=str(path))


def load_sweep_settings(path: Path) -> SweepSettings:
    """The settings of a sweep (an empty file has the defaults). Raises InputFileError."""
    data = read_yaml(path)
    return SweepSettings() if data is None else from_mapping(SweepSettings, data, where=str(path))


def _positive(field_name: str, value: float) -> None:
    if not 0 < value < 1e8:
        raise UsageError(f"{field_name} is {value}; give seconds, above 0")
