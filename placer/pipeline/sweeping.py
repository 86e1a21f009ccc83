"""A sweep: every combination of cluster, EP size, redundancy, batch and mode is solved for, served, and kept.

After every point the output is written anew, so that a sweep that was stopped goes on where it was.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from placer.config.clusters import load_cluster
from placer.config.serving import SweepSettings
from placer.config.settings import SolveSettings
from placer.core.atomic import write_text_atomically
from placer.core.cluster import ClusterSpec
from placer.core.errors import InfeasibleError, InputFileError, UsageError
from placer.core.modes import DispatchMode
from placer.pipeline.planning import solve
from placer.pipeline.serving import serve
from solvers.registry import SOLVERS
from traces.trace import RoutingTrace

__all__ = ["cut_cluster", "pareto", "sweep"]

FORMAT = "placer-sweep"
VERSION = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Point:
    cluster: ClusterSpec
    redundant: int
    batch: int
    mode: DispatchMode

    @property
    def parameters(self) -> dict[str, Any]:
        return {
            "cluster": self.cluster.name,
            "ranks": self.cluster.num_ranks,
            "redundant": self.redundant,
            "batch": self.batch,
            "mode": self.mode,
        }


def sweep(
    settings: SweepSettings,
    trace: RoutingTrace,
    output: Path,
    *,
    folder: Path = Path(),
    note: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Every point's parameters and serving report, and `pareto`: the ids of points that no other dominates.

    Points that `output` holds already are kept, those of other settings too. A point for which there is no plan is kept
    with its `error`. Raises InputFileError where `output` is no sweep, UsageError.
    """
    if settings.solver != "auto" and settings.solver not in SOLVERS:
        raise UsageError(f"solver is {settings.solver!r}; use auto or one of {', '.join(sorted(SOLVERS))}")
    served = None if settings.serve.requests is None else _sha256(folder / settings.serve.requests)
    wanted = [(_identity(settings, point, trace, served), point) for point in _points(settings)]
    known = _known(output)
    for number, (identity, point) in enumerate(wanted, 1):
        if identity in known:
            continue
        if note is not None:
            said = ", ".join(f"{key} {value}" for key, value in point.parameters.items())
            note(f"point {number} of {len(wanted)}: {said}")
        known[identity] = {"id": identity, **point.parameters, **_serve_point(settings, point, trace, folder)}
        _write(output, known)
    points = [known[identity] for identity, _ in wanted]
    _write(output, known)
    return {"points": points, "pareto": pareto(points), "output": str(output)}


def pareto(points: list[dict[str, Any]]) -> list[str]:
    """Ids of the points with no other that has as much goodput, as low a median TPOT and as few ranks, and one better.

    Points without a report, overloaded ones and those that finished nothing are never among them.
    """
    scored = {}
    for point in points:
        report = point.get("report")
        if report is None or report["overloaded"] or report["latency"]["tpot_ms"] is None:
            continue
        score = (-report["throughput"]["goodput_per_s"], report["latency"]["tpot_ms"]["p50"], report["ranks"])
        scored[point["id"]] = score
    return [
        one
        for one, score in scored.items()
        if not any(
            other != score and all(theirs <= ours for theirs, ours in zip(other, score, strict=True))
            for other in scored.values()
        )
    ]


def cut_cluster(cluster: ClusterSpec, ranks: int) -> ClusterSpec:
    """The cluster with so many equal ranks: fewer or more of its nodes, or a part of one. Raises UsageError."""
    if ranks == cluster.num_ranks:
        return cluster
    if cluster.rank_speed or cluster.rank_memory_gib:
        raise UsageError(f"ep_sizes has {ranks}; cluster {cluster.name!r} has unlike ranks and cannot be cut")
    if ranks > cluster.ranks_per_node and ranks % cluster.ranks_per_node:
        raise UsageError(f"ep_sizes has {ranks}; no multiple of the {cluster.ranks_per_node} ranks of a node")
    per_node = min(ranks, cluster.ranks_per_node)
    return replace(cluster, nodes=ranks // per_node, ranks_per_node=per_node)


def _points(settings: SweepSettings) -> Iterator[_Point]:
    for name in settings.clusters:
        whole = load_cluster(name)
        cut = [cut_cluster(whole, ranks) for ranks in settings.ep_sizes] or [whole]
        batches = settings.batches or (settings.serve.limits.requests_per_rank,)
        for cluster, redundant, batch, mode in product(cut, settings.redundant, batches, settings.modes):
            yield _Point(cluster=cluster, redundant=redundant, batch=batch, mode=mode)


def _identity(settings: SweepSettings, point: _Point, trace: RoutingTrace, served: str | None) -> str:
    told = {
        **point.parameters,
        "cluster": point.cluster.sha256,
        "solver": settings.solver,
        "time_s": settings.time_s,
        "serve": asdict(settings.serve),
        "trace": trace.sha256,
        "requests": served,
    }
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _sha256(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise InputFileError(f"{path}: cannot be read ({error.strerror})") from error


def _serve_point(settings: SweepSettings, point: _Point, trace: RoutingTrace, folder: Path) -> dict[str, Any]:
    limits = replace(settings.serve.limits, requests_per_rank=point.batch)
    try:
        solved = solve(
            trace,
            point.cluster,
            mode=point.mode,
            redundant=point.redundant,
            solver=settings.solver,
            time_limit_s=settings.time_s,
            seed=settings.serve.seed,
            solve_settings=SolveSettings(batch_tokens=point.batch * point.cluster.num_ranks),
        )
    except InfeasibleError as error:
        return {"error": str(error)}
    told, warnings = serve(solved.plan, trace, point.cluster, replace(settings.serve, limits=limits), folder=folder)
    plan = {"solver": solved.result.solver, "objective": solved.result.objective, "gap": solved.plan.gap}
    return {"plan": plan, "report": told, "warnings": warnings}


def _known(output: Path) -> dict[str, dict[str, Any]]:
    if not output.exists():
        return {}
    try:
        data = json.loads(output.read_text(encoding="utf-8"))
        if data["format"] != FORMAT or data["version"] != VERSION:
            raise InputFileError(f"{output}: is not a sweep of this placer; give another -o")
        return {point["id"]: point for point in data["points"]}
    except OSError as error:
        raise InputFileError(f"{output}: cannot be read ({error.strerror})") from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputFileError(f"{output}: exists and is not a sweep that could be resumed; give another -o") from error


def _write(output: Path, known: dict[str, dict[str, Any]]) -> None:
    points = list(known.values())
    data = {"format": FORMAT, "version": VERSION, "pareto": pareto(points), "points": points}
    write_text_atomically(output, json.dumps(data, indent=1, allow_nan=False) + "\n")
