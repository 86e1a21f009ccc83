"""PlacementProblem: a profile, a cluster and the limits; checked for feasibility when it is made."""

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from placer.core.cluster import ClusterSpec
from placer.core.errors import InfeasibleError, UsageError
from placer.core.modes import DISPATCH_MODES, REPLICA_CHOICES, DispatchMode, ReplicaChoice
from placer.core.profile import Profile

__all__ = ["PlacementProblem"]

MOST_SHARE = 2.0
"""Room for experts beyond twice an equal share is never used where load counts, and would only slow the search."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementProblem:
    """Where may the experts of `profile.model` live on `cluster`, and how will tokens reach them.

    `redundant` slots beyond E are filled with replicas. `max_par` caps PAR, the mean over
    layers of max / mean rank load (None: no cap). `max_window_par` caps the same in windows of the profile, mean over
    windows and layers: what an iteration waits for.
    `batch_tokens` is the number of tokens in one iteration over the whole cluster, for predicted times.
    `allow_empty_slots` admits plans with unequal experts per rank, which engines refuse; without `redundant` slots each
    rank then holds what its memory can (`room_LR`), equal slots or not.
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
        if self.uneven and self.cluster.rank_memory_gib:
            self._refuse_too_little_memory()
            return
        need = self.slots_per_rank * model.num_sites * model.expert_bytes
        least = int(self.cluster.memory_bytes_R.argmin())
        if self.cluster.rank_memory_gib and need > self.cluster.memory_bytes_R[least]:
            raise InfeasibleError(
                f"rank {least} of {self.cluster.name} has {self.cluster.rank_memory_gib[least]:g} GiB for experts and "
                f"equal slots need {need / 2**30:.3g} GiB; use more ranks, fewer redundant slots, or allow_empty_slots "
                "(fewer experts on that rank, for placer's own executor)"
            )
        if not self.cluster.rank_memory_gib and need > self.cluster.memory_bytes:
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

    @property
    def uneven(self) -> bool:
        """Whether ranks may hold unequal numbers of experts: allowed, and no replicas asked for."""
        return self.allow_empty_slots and self.redundant == 0

    @property
    def room_LR(self) -> npt.NDArray[np.int64]:
        """Experts that each rank may hold in each layer, (L, R): equal slots, or where `uneven` what memory admits.

        A rank's memory is for all layers together and is spread evenly over them; no rank gets more than MOST_SHARE
        times an equal share (in proportion to its speed) unless the others cannot hold the rest.
        """
        model, cluster = self.profile.model, self.cluster
        layers, experts, ranks = model.num_sites, model.num_experts, cluster.num_ranks
        if not self.uneven:
            return np.full((layers, ranks), self.slots_per_rank, dtype=np.int64)
        whole_R, rest_R = np.divmod(cluster.memory_bytes_R // model.expert_bytes, layers)
        # the layers that get one more follow each other over the ranks, so that all layers get about as many
        turn_LR = (np.arange(layers)[:, None] - (np.cumsum(rest_R) - rest_R)) % layers
        room_LR = np.minimum(experts, whole_R + (turn_LR < rest_R))
        speed_R = np.ones(ranks) if cluster.speed_R is None else cluster.speed_R / cluster.speed_R.mean()
        capped_LR = np.minimum(room_LR, np.ceil(MOST_SHARE * experts / ranks * speed_R).astype(np.int64))
        result: npt.NDArray[np.int64] = np.where(capped_LR.sum(axis=1, keepdims=True) >= experts, capped_LR, room_LR)
        return result

    def _refuse_too_little_memory(self) -> None:
        model, cluster = self.profile.model, self.cluster
        room_LR = self.room_LR
        if int(room_LR.sum(axis=1).min()) >= model.num_experts:
            return
        least = int(cluster.memory_bytes_R.argmin())
        raise InfeasibleError(
            f"the ranks of {cluster.name} hold {int(room_LR.sum(axis=1).min())} experts a layer together and the model "
            f"has {model.num_experts}; rank {least} has least, {cluster.memory_bytes_R[least] / 2**30:.3g} GiB for "
            f"{int(cluster.memory_bytes_R[least] // model.expert_bytes)} in all layers; use more ranks or memory"
        )

    def refuse_unlike_ranks(self, solver: str) -> None:
        """Raises UsageError where ranks differ in speed or number of experts, which `solver` does not know."""
        if self.cluster.speed_R is not None:
            raise UsageError(f"{solver} takes all ranks for equally fast; use lpt or coactivation with rank_speed")
        if self.uneven:
            raise UsageError(f"{solver} gives every rank equal slots; use lpt or coactivation with allow_empty_slots")

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
