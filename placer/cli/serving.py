"""What `placer simulate --serve` and `--sweep` do: serving runs and sweeps of them, told to people and machines."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from placer.cli.common import emit, read_source, require_distinct, require_parent, status_line, warn
from placer.core.errors import UsageError

if TYPE_CHECKING:
    from placer.report.tables import Cell, DataTable

__all__ = ["run_serve", "run_sweep", "serve_or_sweep"]


def serve_or_sweep(
    serve: Path | None,
    sweep: Path | None,
    plan: Path | None,
    trace: Path | None,
    cluster: str | None,
    output: Path,
    mode: str | None,
    model: str | None,
    as_json: bool,
    *,
    plain: bool,
) -> None:
    """What `simulate` does with --serve or --sweep. `plain`: no flag was given that neither takes. UsageError."""
    if serve is not None and sweep is not None:
        raise UsageError("--serve and --sweep are both given; SWEEP.yaml has a section serve, give --sweep alone")
    if not plain:
        raise UsageError("--serve and --sweep take no --fidelity, --iterations, --chrome or --config; leave them out")
    if sweep is not None:
        if plan is not None or cluster is not None or mode is not None:
            raise UsageError("--sweep solves for its own plans; leave out PLAN, --cluster and --mode")
        run_sweep(sweep, output, trace=trace, model=model, as_json=as_json)
        return
    assert serve is not None
    if plan is None or trace is None or cluster is None:
        raise UsageError("--serve needs PLAN, --trace and --cluster; see --help")
    run_serve(plan, trace, cluster, serve, output, mode=mode, model=model, as_json=as_json)


def run_serve(
    plan: Path,
    trace: Path,
    cluster: str,
    settings_file: Path,
    output: Path,
    *,
    mode: str | None = None,
    model: str | None = None,
    as_json: bool = False,
) -> None:
    """Serves requests on the plan and writes the report. Raises PlacerError for whatever cannot be."""
    import json

    from placer.config import load_cluster
    from placer.config.serving import load_serve_settings
    from placer.core.atomic import write_text_atomically
    from placer.core.plan import Plan
    from placer.pipeline.serving import serve

    require_parent(output)
    require_distinct(output, inputs=(plan, trace, settings_file))
    settings = load_serve_settings(settings_file)
    report, warnings = serve(
        Plan.load(plan),
        read_source(trace, model, tokens=True),
        load_cluster(cluster),
        settings,
        mode=mode,  # type: ignore[arg-type]  # serve refuses unknown names
        folder=settings_file.parent,
        note=status_line,
    )
    warn(warnings)
    write_text_atomically(output, json.dumps(report, indent=1, allow_nan=False) + "\n")
    emit(as_json, {"output": str(output), **report}, _serve_tables(report), (f"wrote {output}",))


def run_sweep(
    settings_file: Path,
    output: Path,
    *,
    trace: Path | None = None,
    model: str | None = None,
    as_json: bool = False,
) -> None:
    """Solves and serves every point of the sweep that the output does not hold yet; Pareto points are marked."""
    from placer.config.serving import load_sweep_settings
    from placer.pipeline.sweeping import sweep

    require_parent(output)
    settings = load_sweep_settings(settings_file)
    if trace is None and settings.trace is None:
        raise UsageError(f"{settings_file}: names no trace; add trace: FILE or give --trace")
    source = trace if trace is not None else settings_file.parent / str(settings.trace)
    require_distinct(output, inputs=(source, settings_file))
    told = sweep(
        settings, read_source(source, model, tokens=True), output, folder=settings_file.parent, note=status_line
    )
    emit(as_json, told, (_sweep_table(told),), (f"wrote {output}",))


def _serve_tables(report: dict[str, Any]) -> "tuple[DataTable, ...]":
    from placer.report.tables import DataTable

    requests, throughput = report["requests"], report["throughput"]
    latency = tuple(
        (name, *(None if spread is None else spread[key] for key in ("mean", "p50", "p90", "p99", "most")))
        for name, spread in report["latency"].items()
    )
    pools = tuple(
        (
            name,
            pool["ranks"],
            pool["iterations"],
            _of(pool["iteration_ms"]["all"], "mean"),
            _of(pool["par_iteration"], "mean"),
            _of(pool["rank_utilisation"], "mean"),
            _of(pool["link_utilisation"]["network_ports"], "most"),
            pool["queue"]["waiting_mean"],
            len(pool["migrations"]),
        )
        for name, pool in report["pools"].items()
    )
    slo = report["slo"]
    return (
        DataTable(
            title=f"Served in {report['end_s']:.3f} s on {report['ranks']} ranks",
            columns=("arrived", "finished", "unfinished", "preemptions", "requests/s", "tokens/s", "goodput/s"),
            rows=(
                (
                    requests["arrived"],
                    requests["finished"],
                    requests["arrived"] - requests["finished"],
                    requests["preemptions"],
                    throughput["requests_per_s"],
                    throughput["output_tokens_per_s"],
                    throughput["goodput_per_s"],
                ),
            ),
            notes=(f"goodput: TTFT within {slo['ttft_ms']:g} ms and TPOT within {slo['tpot_ms']:g} ms",),
        ),
        DataTable(title="Latency", columns=("", "mean", "p50", "p90", "p99", "most"), rows=latency),
        DataTable(
            title="Pools",
            columns=("pool", "ranks", "iterations", "ms each", "PAR", "ranks busy", "port busy", "waiting", "moves"),
            rows=pools,
            notes=("port busy: the busiest network port's share of the time; waiting: mean over time",),
        ),
    )


def _sweep_table(told: dict[str, Any]) -> "DataTable":
    from placer.report.tables import DataTable

    rows: list[tuple[Cell, ...]] = []
    for point in told["points"]:
        report = point.get("report")
        head: tuple[Cell, ...] = (
            "*" if point["id"] in told["pareto"] else "",
            point["cluster"],
            point["ranks"],
            point["redundant"],
        )
        head += (point["batch"], point["mode"])
        if report is None:
            rows.append((*head, None, None, None, None, "no plan"))
            continue
        latency, through = report["latency"], report["throughput"]
        state = "overloaded" if report["overloaded"] else report["stopped_by"]
        ends = (_of(latency["tpot_ms"], "p50"), _of(latency["ttft_ms"], "p99"))
        rows.append((*head, through["output_tokens_per_s"], through["goodput_per_s"], *ends, state))
    return DataTable(
        title="Sweep",
        columns=(
            "best",
            "cluster",
            "ranks",
            "redundant",
            "batch",
            "mode",
            "tokens/s",
            "goodput/s",
            "TPOT p50 ms",
            "TTFT p99 ms",
            "ended",
        ),
        rows=tuple(rows),
        notes=("best: no other point has as much goodput, as low a TPOT and as few ranks, and one of them better",),
    )


def _of(spread: dict[str, float] | None, key: str) -> float | None:
    return None if spread is None else spread[key]
