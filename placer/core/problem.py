"""PlacementProblem: a profile, a cluster and the limits; checked for feasibility when it is made."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

from placer.core.cluster import ClusterSpec
from placer.core.errors import InfeasibleError, UsageError
from placer.core.modes import DISPATCH_MODES, REPLICA_CHOICES, DispatchMode, ReplicaChoice
from placer.core.profile import Profile

__all__ = ["PlacementProblem"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementProblem:
    """Where may the experts of `profile.model` live on `cluster`, and how will tokens reach them.

    `redundant` slots beyond E are filled with replicas. `max_par` caps PAR, the mean over
    layers of max / mean rank load (None: no cap). `max_window_par` caps the same in windows of the profile, mean over
    windows and layers: what an iteration waits for.
    `batch_tokens` is the number of tokens in one iteration over the whole cluster, for predicted times.
    `allow_empty_slots` admits plans with unequal experts per rank, which engines refuse.
    """

    profile: Profile
    cluster: ClusterSpec
    mode: DispatchMode = "per_rank"
    redundant: int = 0
    max_par: float | None = None
    max_window_par: float | None = None
    replica_choice: ReplicaChoice = "visit_first"
    batch_tokens: int = 2048
    allow_empty_slots: bool = False

    def __post_init__(self) -> None:
        if self.mode not in DISPATCH_MODES:
            raise UsageError(f"mode is {self.mode!r}; use one of {', '.join(DISPATCH_MODES)}")
        if self.replica_choice not in REPLICA_CHOICES:
            raise UsageError(f"replica_choice is {self.replica_choice!r}; use one of {', '.join(REPLICA_CHOICES)}")
        for name, least in (("redundant", 0), ("batch_tokens", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name} is {value!r}; give {least} or more")
        for name in ("max_par", "max_window_par"):
            cap = getattr(self, name)
            if cap is not None and not cap >= 1.0:
                raise UsageError(f"{name} is {cap}; max / mean load cannot be below 1.0")
        model, ranks = self.profile.model, self.cluster.num_ranks
        if not model.is_uniform:
            raise InfeasibleError(
                f"model {model.name!r} has layers with unequal, shared or non-feed-forward experts; "
                "engines place equal feed-forward layers only, so give a trace restricted to those"
            )
        slots = model.num_experts + self.redundant
        if slots > model.num_experts * ranks:
            raise InfeasibleError(
                f"{slots} slots on {ranks} ranks but only {model.num_experts} experts: replicas of one expert "
                f"must lie on distinct ranks; use at most --redundant {model.num_experts * (ranks - 1)}"
            )
        if slots % ranks:
            up = -slots % ranks
            raise InfeasibleError(
                f"{model.num_experts} experts + {self.redundant} redundant = {slots} slots do not divide over "
                f"{ranks} ranks; use --redundant {self.redundant + up}"
            )
        need = self.slots_per_rank * model.num_sites * model.expert_bytes
        if need > self.cluster.memory_bytes:
            raise InfeasibleError(
                f"{self.slots_per_rank} slots x {model.num_sites} layers x {model.expert_bytes / 2**20:.1f} MiB = "
                f"{need / 2**30:.1f} GiB of experts a rank, but {self.cluster.name} has {self.cluster.memory_gib:g} "
                "GiB; use more ranks, fewer redundant slots or smaller weights"
            )

    @property
    def num_slots(self) -> int:
        """P, physical experts per layer."""
        return self.profile.model.num_experts + self.redundant

    @property
    def slots_per_rank(self) -> int:
        """Slots of each rank in each layer; rank = slot // slots_per_rank."""
        return self.num_slots // self.cluster.num_ranks

    def limits(self) -> dict[str, Any]:
        """The part of the problem that is neither trace, model nor cluster."""
        windows = {} if self.max_window_par is None else {"max_window_par": self.max_window_par}
        return windows | {
            "mode": self.mode,
            "redundant": self.redundant,
            "max_par": self.max_par,
            "replica_choice": self.replica_choice,
            "batch_tokens": self.batch_tokens,
            "allow_empty_slots": self.allow_empty_slots,
        }

    def hashes(self) -> dict[str, str]:
        """What a plan must remember of its problem: one SHA-256 each."""
        return {
            "trace": self.profile.trace_sha256,
            "model": self.profile.model.sha256,
            "cluster": self.cluster.sha256,
            "limits": hashlib.sha256(json.dumps(self.limits(), sort_keys=True).encode()).hexdigest(),
        }
