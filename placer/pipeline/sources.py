"""What a station of the arrow reads: traces, counts and profiles by content; and whether they fit a plan."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import numpy.typing as npt

from placer.config.settings import ProfileSettings
from placer.core.cluster import ClusterSpec
from placer.core.dispatch import source_ranks
from placer.core.errors import InputFileError, MismatchError, UsageError
from placer.core.model import ModelSpec
from placer.core.plan import Plan
from placer.core.profile import Profile
from traces.counts import LoadCounts, load_counts_profile
from traces.profile_store import PROFILE_FORMAT, load_profile
from traces.readers import read_any
from traces.summarize import summarize
from traces.tensorfile import looks_like_tensor_file, read_tensor_file
from traces.trace import RoutingTrace

__all__ = [
    "Progress",
    "Source",
    "model_of_plan",
    "open_source",
    "open_trace",
    "profile_of",
    "sources_of",
    "warn_mismatch",
]

Progress = Callable[[int, int], None]
Source = RoutingTrace | LoadCounts | Profile


def open_source(path: Path, model: ModelSpec | None = None, progress: Progress | None = None) -> Source:
    """A trace, counts or a profile, recognised by content. Raises InputFileError."""
    path = Path(path)
    head = b""
    try:
        if path.is_file():
            with path.open("rb") as file:
                head = file.read(16)
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror})") from error
    if looks_like_tensor_file(head) and read_tensor_file(path).metadata.get("format") == PROFILE_FORMAT:
        return load_profile(path)
    return read_any(path, None, model, progress)


def open_trace(path: Path, model: ModelSpec | None = None, progress: Progress | None = None) -> RoutingTrace:
    """A per-token trace. Raises InputFileError where the file holds counts only."""
    source = open_source(path, model, progress)
    if not isinstance(source, RoutingTrace):
        raise InputFileError(f"{path}: holds load counts only; this needs a trace of every token's experts")
    if source.num_tokens == 0:
        raise InputFileError(f"{path}: holds no tokens; record at least one request")
    return source


def profile_of(source: Source, settings: ProfileSettings, progress: Progress | None = None) -> Profile:
    """The profile of any source; counts and profiles are taken as they are."""
    if isinstance(source, Profile):
        return source
    if isinstance(source, LoadCounts):
        return load_counts_profile(source)
    return summarize(
        source,
        window_tokens=settings.window_tokens,
        folds=settings.folds,
        max_sets_per_layer=settings.max_sets_per_layer,
        progress=progress,
    )


def sources_of(trace: RoutingTrace, num_ranks: int) -> npt.NDArray[np.int64]:
    """Source rank of each token: the trace's own where it has them, else requests dealt to ranks in turn, (T,)."""
    if trace.source_rank_T is None:
        return source_ranks(trace.request_id_T, num_ranks)
    worst = int(trace.source_rank_T.max(initial=0))
    if worst >= num_ranks:
        raise MismatchError(
            f"the trace's source ranks go up to {worst}, the cluster has {num_ranks} ranks; "
            "use the cluster it was recorded on, or a trace without source ranks"
        )
    return trace.source_rank_T.astype(np.int64)


def model_of_plan(plan: Plan, model: ModelSpec | None = None) -> ModelSpec:
    """The model an exporter needs: `model` if it fits the plan, else what the plan remembers of its own.

    Raises MismatchError where `model` is another, UsageError where the plan does not say how many layers there are.
    """
    if model is not None:
        if (model.num_experts, model.moe_layers) != (plan.num_experts, tuple(plan.moe_layers)):
            raise MismatchError(
                f"model {model.name!r} has {model.num_experts} experts in {model.num_sites} MoE layers, the plan "
                f"{plan.num_experts} in {len(plan.moe_layers)}; give the plan's model or leave it out"
            )
        return model
    if plan.num_hidden_layers is None:
        raise UsageError("the plan does not say how many layers its model has; give --model")
    return ModelSpec.uniform(
        plan.model,
        num_experts=plan.num_experts,
        top_k=1,
        moe_layers=tuple(plan.moe_layers),
        num_hidden_layers=plan.num_hidden_layers,
    )


def warn_mismatch(plan: Plan, model: ModelSpec, cluster: ClusterSpec, trace_sha256: str = "") -> list[str]:
    """Warnings where the plan was solved for another trace or cluster of the same shape.

    Raises MismatchError where the shapes differ, so that the plan cannot be used at all.
    """
    if len(plan.slot_expert_LP) != model.num_sites or plan.num_experts != model.num_experts:
        raise MismatchError(
            f"the plan has {len(plan.slot_expert_LP)} MoE layers of {plan.num_experts} experts, the trace "
            f"{model.num_sites} of {model.num_experts}; use the trace's own plan or solve again"
        )
    if (plan.num_ranks, plan.ranks_per_node) != (cluster.num_ranks, cluster.ranks_per_node):
        raise MismatchError(
            f"the plan is for {plan.num_ranks} ranks, {plan.ranks_per_node} a node; cluster {cluster.name!r} has "
            f"{cluster.num_ranks}, {cluster.ranks_per_node} a node; use the plan's cluster or solve again"
        )
    warnings = []
    for name, now in (("trace", trace_sha256), ("model", model.sha256), ("cluster", cluster.sha256)):
        if now and plan.hashes.get(name, now) != now:
            warnings.append(f"the plan was solved for another {name} (hash {plan.hashes[name][:12]}, here {now[:12]})")
    return warnings
